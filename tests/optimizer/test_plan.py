"""What is asked once holds: a Lion that keeps its plans goes the way of one that asks anew in every
step, whatever happens to parameters, gradients, states and options in between."""

import copy
import weakref

import pytest
import torch

from common import bits_equal, generator
from lion_kernels import DistributedLion, Lion, bucket, native
from lion_kernels.simulate import loopback

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def tensors(plain=False):
    """With ``plain``, one bucket without stand-ins, of which the op alone is asked."""
    gen = generator(0)
    image = torch.randn(4, 6, 5, 3, generator=gen)
    return [
        torch.randn(40, 30, generator=gen),
        image.contiguous(memory_format=torch.channels_last),
        torch.randn(7, generator=gen, dtype=torch.float32 if plain else torch.float64),
        torch.randn(20, generator=gen).bfloat16(),
        *([] if plain else [torch.view_as_complex(torch.randn(9, 2, generator=gen))]),
    ]


def gapped(params):
    params[0].data = torch.randn(40, 60, generator=generator(9))[:, ::2]


def changed_format(params):
    params[1].data = params[1].data.contiguous()


def event(name, opt, params):
    """Something that users do between two steps."""
    group = opt.param_groups[0]
    if name == "lr":
        group["lr"] *= 0.5
    elif name == "betas in place":
        group["betas"] = [0.5, 0.6]
    elif name == "betas in place again":
        group["betas"][0] = 0.7
    elif name == "tensor lr":
        group["lr"] = torch.tensor(0.1)
    elif name == "tensor lr written":
        group["lr"].fill_(0.03)
    elif name == "rounding":
        group["rounding"] = "compensated"
    elif name == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif name == "state replaced":
        opt.state[params[0]] = {"exp_avg": torch.ones_like(params[0])}
    elif name == "momentum replaced":
        opt.state[params[0]]["exp_avg"] = torch.ones(40, 30)
    elif name == "momentum deleted":
        opt.state[params[3]].pop("exp_avg", None)
    elif name == "new weights":
        params[0].data = params[0].data * 2
    elif name == "another format":
        changed_format(params)
    elif name == "gaps":
        gapped(params)
    elif name == "double":
        params[0].grad = None
        params[0].data = params[0].data.double()
    elif name == "reversed":
        group["params"].reverse()
    elif name == "left out":
        opt.state.pop(group["params"].pop(), None)
    elif name == "joined":
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))], "lr": 0.3})


EVENTS = [
    "nothing", "lr", "betas in place", "betas in place again", "tensor lr", "tensor lr written",
    "rounding", "load", "state replaced", "momentum replaced", "momentum deleted", "new weights",
    "another format", "reversed", "joined", "double", "nothing", "gaps", "left out",
]  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("stride", range(1, 6))
def test_a_plan_is_no_memory(stride, plain):
    """Every event, one after the other in several orders."""
    order = [EVENTS[i * stride % len(EVENTS)] for i in range(len(EVENTS))]
    if order.index("betas in place") > order.index("betas in place again"):
        order.remove("betas in place again")
    if order.index("tensor lr") > order.index("tensor lr written"):
        order.remove("tensor lr written")
    runs = []
    for keeps in (True, False):
        params = [torch.nn.Parameter(t.clone()) for t in tensors(plain)]
        opt = Lion(params, **OPTIONS)
        for step, name in enumerate(order):
            event(name, opt, params)
            for k, p in enumerate(p for group in opt.param_groups for p in group["params"]):
                gen = generator(100 * step + k)
                g = torch.randn(p.shape, generator=gen, dtype=p.dtype)
                if step % 3 == 1 and p.dim() == 4:
                    g = g.contiguous()
                elif p.dim() == 4:
                    g = g.contiguous(memory_format=torch.channels_last)
                p.grad = None if (step + k) % 7 == 0 else g
            if not keeps:
                opt._plans.clear()
                opt._settings.clear()
            opt.step()
        runs.append([p.detach() for group in opt.param_groups for p in group["params"]])
    for p, q in zip(*runs, strict=True):
        real = [torch.view_as_real(t) if t.is_complex() else t for t in (p, q)]
        assert bits_equal(*real)


def test_gradients_are_let_go():
    """zero_grad frees them: a plan that kept them would cost a model's memory."""
    params = [torch.nn.Parameter(t) for t in tensors()]
    opt = Lion(params, **OPTIONS)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        alive = [weakref.ref(p.grad) for p in params]
        opt.step()
        opt.zero_grad()
        assert [ref() for ref in alive] == [None] * len(params)


def test_an_unchanged_model_is_asked_once(monkeypatch):
    made = []
    plan = bucket.Plan.__init__
    monkeypatch.setattr(
        bucket.Plan, "__init__", lambda self, *args: made.append(1) or plan(self, *args)
    )
    params = [torch.nn.Parameter(torch.ones(n)) for n in range(1, 20)]
    opt = Lion(params, **OPTIONS)
    for step in range(5):
        for p in params:
            p.grad = torch.ones_like(p)  # at another address
        opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        opt.step()
    assert len(made) == 1


def test_a_single_group_is_asked_by_the_op_alone_until_it_refuses(monkeypatch):
    """An op looks at its tensors before it writes; asking first is for groups that wait behind."""
    p, q = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(3))
    alone, beside = Lion([p], lr=0.5), Lion([{"params": [p]}, {"params": [q]}], lr=0.5)
    q.grad = torch.ones(3)
    counts, asked = [], []
    odd_gradients = native.odd_gradients
    monkeypatch.setattr(
        native, "odd_gradients", lambda *args: asked.append(1) or odd_gradients(*args)
    )
    for opt in (alone, beside):
        for g in (torch.ones(4, 6), torch.ones(4, 6), torch.ones(6, 4).T, torch.ones(4, 6)):
            p.grad = g
            asked.clear()
            opt.step()
            counts.append(len(asked))
    assert counts == [0, 0, 1, 1, 0, 2, 2, 2]
    assert torch.equal(p, torch.full((4, 6), -4.0))  # each step once, also the refused one


def test_a_refused_step_of_a_single_group_writes_nothing():
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = Lion([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.ones(4, 4)
        opt.step()
    before, state = p.detach().clone(), opt.state[p]
    state["exp_avg"].data = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg of parameter 0 of group 0 must have shape"):
        opt.step()
    del state["exp_avg"]
    p.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(p, before)


def test_gaps_in_parameter_and_gradient():
    p = torch.nn.Parameter(torch.zeros(4, 4)[:, :2])
    opt = Lion([p], lr=0.5)
    for step in range(3):
        p.grad = torch.ones(4, 4)[:, :2]
        opt.step()
        assert torch.equal(p, torch.full((4, 2), -0.5 * (step + 1)))


def test_a_changed_tensor_lr_is_checked_before_anything_is_written():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = Lion([{"params": [a]}, {"params": [b]}], lr=0.5)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    opt.step()
    before, alive = a.detach().clone(), weakref.ref(a.grad)
    opt.param_groups[1]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match=r"a tensor lr must be on the CPU.*group 1 has"):
        opt.step()
    assert torch.equal(a, before)
    a.grad = None
    assert alive() is None  # nothing keeps the gradients of a step that failed


def test_who_joins_is_on_the_device_of_the_others():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    opt = Lion([a, b], lr=0.5)
    a.grad = torch.ones(3)
    opt.step()
    b.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="on one device: parameter 1 of group 0 is on meta"):
        opt.step()


def test_a_load_frees_what_it_replaces():
    p = torch.nn.Parameter(torch.ones(30))
    opt = Lion([p], lr=0.5)
    p.grad = torch.ones(30)
    opt.step()
    state, alive = copy.deepcopy(opt.state_dict()), weakref.ref(opt.state[p]["exp_avg"])
    opt.load_state_dict(state)
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_states_may_move_in_place(dtype):
    """`v.data = v.data.to(...)`, as recipes move an optimizer: what is written is the state."""
    params = [torch.nn.Parameter(torch.ones(30, dtype=dtype)) for _ in range(2)]
    opts = [Lion([p], lr=1e-4, rounding="compensated") for p in params]
    for step in range(4):
        for p, opt in zip(params, opts, strict=True):
            if step == 2 and opt is opts[0]:
                for t in opt.state[p].values():
                    t.data = t.data.clone()
            p.grad = torch.ones_like(p)
            opt.step()
    for key, t in opts[0].state[params[0]].items():
        other = opts[1].state[params[1]][key]
        assert torch.equal(*(torch.view_as_real(x) if x.is_complex() else x for x in (t, other)))


def test_a_momentum_that_changed_in_place_is_named_before_anything_is_written():
    a, b = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    opt = Lion([{"params": [a]}, {"params": [b]}], lr=0.5)
    a.grad, b.grad = torch.ones(4, 4), torch.ones(4, 4)
    opt.step()
    before = a.detach().clone()
    opt.state[b]["exp_avg"].data = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg of parameter 0 of group 1 must have shape"):
        opt.step()
    assert torch.equal(a, before)


def test_a_state_that_is_moved_away_is_let_go():
    p = torch.nn.Parameter(torch.ones(30))
    opt = Lion([p], lr=0.5)
    p.grad = torch.ones(30)
    opt.step()
    alive = weakref.ref(opt.state[p]["exp_avg"])
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()
    assert alive() is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_momenta_follow_the_dtype_of_parameters(groups, dtypes):
    """Which an op would take as they come; with one group as with two."""
    params = [torch.nn.Parameter(torch.ones(30, dtype=dtypes[0])) for _ in range(2)]
    opt = Lion([{"params": params}] if groups == 1 else [{"params": [p]} for p in params], lr=1e-3)
    for dtype in dtypes:
        for p in params:
            p.grad = None
            p.data = p.data.to(dtype)
            p.grad = torch.ones_like(p)
        for _ in range(2):
            opt.step()
        assert [opt.state[p]["exp_avg"].dtype for p in params] == [dtype] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replaced_momentum_takes_the_storage_of_the_option(dtype):
    p = torch.nn.Parameter(torch.ones(30))
    opt = Lion([p], lr=1e-3, momentum_dtype=dtype)
    for replaced in (torch.float16, torch.float64):
        p.grad = torch.ones(30)
        opt.step()
        opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].to(replaced)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == dtype


def test_who_joins_a_single_group_has_the_others_asked():
    p, late = torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(3))
    opt = Lion([p, late], lr=0.5)
    for _ in range(2):
        p.grad = torch.ones(4, 5)
        opt.step()
    p.grad = None
    p.data = torch.ones(3, 4, 5)
    p.grad, late.grad = torch.ones(3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match="exp_avg of parameter 0 of group 0 must have shape"):
        opt.step()
    assert torch.equal(p, torch.ones(3, 4, 5)) and torch.equal(late, torch.ones(3))


def test_a_compensation_of_another_shape_is_named():
    p = torch.nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16))
    opt = Lion([p], lr=0.5, rounding="compensated")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    before = p.detach().clone()
    opt.state[p]["compensation"] = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="compensation of parameter 0 of group 0 must have shape"):
        opt.step()
    assert torch.equal(p, before)


def test_who_has_a_gradient_is_asked_for_dtypes():
    """The head changes, and the frozen backbone comes first."""
    backbone, head = (torch.nn.Parameter(torch.ones(30)) for _ in range(2))
    opt = Lion([backbone, head], lr=1e-3)
    for _ in range(2):
        backbone.grad = head.grad = torch.ones(30)
        opt.step()
    backbone.grad = head.grad = None
    head.data = head.data.bfloat16()
    head.grad = torch.ones_like(head)
    opt.step()
    assert opt.state[head]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("momentum", [None, "x"])
def test_a_momentum_that_is_none_is_named(momentum):
    params = [torch.nn.Parameter(torch.ones(30)) for _ in range(2)]
    opt = Lion(params, lr=1e-3, momentum_dtype="int8")
    for p in params:
        p.grad = torch.ones(30)
    opt.step()
    opt.state[params[1]]["exp_avg"] = momentum
    with pytest.raises(ValueError, match="exp_avg of parameter 1 of group 0 must have shape"):
        opt.step()


@pytest.mark.parametrize("n", [1, 2])
def test_a_parameter_that_is_the_negative_of_its_storage(n):
    """Which is what the imaginary part of a conjugate is; dense where it has one element."""
    rows = [torch.nn.Parameter(torch._neg_view(torch.full((5,), -1.0))) for _ in range(n)]
    if n == 1:
        opts = [Lion(rows, lr=0.25)]
    else:
        ends = loopback(n)
        opts = [
            DistributedLion([p], lr=0.25, process_group=e) for p, e in zip(rows, ends, strict=True)
        ]
    for _ in range(3):
        for p, opt in zip(rows, opts, strict=True):
            p.grad = torch.ones(5)
            opt.step()
    assert all(p.is_neg() and torch.equal(p, torch.full((5,), 0.25)) for p in rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_default_dtype(dtype):
    """What a GradScaler takes is float32, and so is what the ops take of a vote in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        p = torch.nn.Parameter(torch.ones(5, dtype=torch.float32))
        opt, scaler = Lion([p], lr=0.25), torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(p.sum()).backward()
        scaler.step(opt)
        assert torch.equal(p, torch.full_like(p, 0.75)) and torch.equal(p.grad, torch.ones_like(p))
        ends = loopback(3)
        rows = [[torch.nn.Parameter(torch.ones(33, dtype=torch.float64))] for _ in ends]
        opts = [
            DistributedLion(row, lr=0.25, process_group=e)
            for row, e in zip(rows, ends, strict=True)
        ]
        for (q,), opt in zip(rows, opts, strict=True):
            q.grad = torch.ones_like(q)
            opt.step()
        assert all(torch.equal(q, torch.full_like(q, 0.75)) for (q,) in rows)
        opts[0].found_inf = opts[1].found_inf = torch.zeros(1, dtype=torch.float32)
        opts[2].found_inf = 0.0  # of a rank where no parameter has a gradient
        rows[2][0].grad = None
        for opt in opts:
            opt.step()
        assert all(torch.equal(q, torch.full_like(q, 0.5)) for (q,) in rows)
    finally:
        torch.set_default_dtype(before)
