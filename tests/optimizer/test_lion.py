"""Lion, the optimizer: everything around the fused pass."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import oracle
from common import array, bits_equal, exact, generator
from lion_kernels import Lion

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def eager(params, exp_avgs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, sign=1.0):
    """Lion as its authors wrote it, in PyTorch: updates params and exp_avgs in place."""
    with torch.no_grad():
        for p, m in zip(params, exp_avgs, strict=True):
            if p.grad is not None:
                g = sign * p.grad
                c = m * betas[0] + g * (1 - betas[0])
                p.mul_(1 - lr * weight_decay).add_(torch.sign(c), alpha=-lr)
                m.mul_(betas[1]).add_(g, alpha=1 - betas[1])


def parameters(*shapes, seed=0):
    gen = generator(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]


def set_grads(params, seed):
    gen = generator(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen)


def close(ours, theirs):
    """Equal to eager Lion up to the second rounding that it makes in each step; one sign apart
    would be 2 * lr, ten thousand times the bound."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("maximize", [False, True])
def test_many_steps_match_eager_lion(maximize):
    params = parameters((30, 20), (7,), (), (0,), (3, 2, 2, 2))
    twins = copy.deepcopy(params)
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion(params, **OPTIONS, maximize=maximize)
    for step in range(20):
        set_grads(params, step)
        set_grads(twins, step)
        opt.step()
        eager(twins, exp_avgs, sign=-1.0 if maximize else 1.0)
    close(params, twins)
    for p, m in zip(params, exp_avgs, strict=True):
        torch.testing.assert_close(opt.state[p]["exp_avg"], m)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", -1.0, "lr must be at least 0 and finite, got -1.0"),
        ("lr", float("nan"), "lr must be at least 0 and finite, got nan"),
        ("lr", float("inf"), "lr must be at least 0 and finite, got inf"),
        ("lr", torch.zeros(2), r"Tensor lr must be 1-element, got shape \(2,\)"),
        ("lr", torch.tensor(-1.0), "lr must be at least 0 and finite, got tensor"),
        ("lr", torch.tensor([torch.nan]), "lr must be at least 0 and finite, got tensor"),
        ("lr", np.float32(-1), "lr must be at least 0 and finite, got np.float32"),
        ("lr", np.array([np.inf]), "lr must be at least 0 and finite, got array"),
        ("lr", "1e-4", "lr must be a number, at least 0 and finite, got '1e-4'"),
        ("lr", None, "lr must be a number, at least 0 and finite, got None"),
        ("lr", True, "lr must be a number, at least 0 and finite, got True"),
        ("betas", (1.2, 0.9), r"beta1 must be in \[0, 1\), got 1.2"),
        ("betas", (0.9, 1.0), r"beta2 must be in \[0, 1\), got 1.0"),
        ("betas", (0.9, torch.tensor(torch.nan)), r"beta2 must be in \[0, 1\), got tensor"),
        ("betas", ("0.9", 0.99), r"beta1 must be a number, in \[0, 1\), got '0.9'"),
        ("betas", (0.9,), "betas must be a pair of numbers"),
        ("betas", 0.9, "betas must be a pair of numbers"),
        ("betas", None, "betas must be a pair of numbers"),
        ("betas", "ab", "betas must be a pair of numbers"),
        ("weight_decay", -0.1, "weight_decay must be at least 0"),
        ("weight_decay", float("inf"), "weight_decay must be at least 0 and finite, got inf"),
        ("weight_decay", "0.1", "weight_decay must be a number"),
        ("weight_decay", np.float64("nan"), "weight_decay must be at least 0"),
        ("maximize", "false", "maximize must be False or True, got 'false'"),
        ("maximize", None, "maximize must be False or True, got None"),
        ("independent_weight_decay", 2, "independent_weight_decay must be False or True, got 2"),
        ("cautious_weight_decay", [], "cautious_weight_decay must be False or True"),
        ("cautious", 0.5, "cautious must be False, True or 'rescaled', got 0.5"),
        ("rounding", None, "rounding must be 'nearest', 'stochastic' or 'compensated', got None"),
        ("nonfinite", ["skip"], "nonfinite must be 'propagate' or 'skip'"),
        ("momentum_dtype", "float8", "momentum_dtype must be None or one of float32"),
        ("momentum_dtype", torch.int16, "momentum_dtype must be"),
    ],
)
def test_bad_options(option, value, message):
    with pytest.raises(ValueError, match=message):
        Lion(parameters((3,)), **{option: value})
    opt = Lion(parameters((3,)))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": parameters((4,)), option: value})
    assert len(opt.param_groups) == 1
    params = opt.param_groups[0]["params"]
    set_grads(params, 0)
    before = params[0].clone()
    opt.param_groups[0][option] = value
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("make", [float, np.float64, torch.tensor, lambda x: np.array([x])])
def test_numbers_of_any_kind(make):
    """An option is what it says, whatever holds it."""
    (p,), (q,) = parameters((50,)), parameters((50,))
    betas = tuple(make(b) for b in OPTIONS["betas"])
    given = {"lr": make(0.5), "betas": betas, "weight_decay": make(0.25)}
    opts = Lion([p], **given), Lion([q], lr=0.5, betas=OPTIONS["betas"], weight_decay=0.25)
    for t, opt in zip((p, q), opts, strict=True):
        set_grads([t], 0)
        opt.step()
        opt.step()
    assert torch.equal(p, q)


def test_unknown_option():
    with pytest.raises(TypeError, match="learning_rate"):
        Lion(parameters((3,)), learning_rate=0.1)


def windows(shape, strides):
    return torch.zeros(20).as_strided(shape, strides)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.zeros(3), torch.zeros(3, device="meta")], "on one device: parameter 1 of group 1"),
        ([torch.zeros(3, device="meta")], "must be on the CPU or a CUDA device"),
        ([torch.zeros(3, 1).expand(3, 4)], "must not overlap themselves: parameter 0 of group 1"),
        ([windows((3, 4), (2, 1))], "must not overlap themselves"),
        ([windows((2, 3), (3, 3))], "must not overlap themselves"),
        ([torch.zeros(3).to(torch.float8_e4m3fn)], "must be a dense tensor of float32, bfloat16"),
        ([torch.eye(3).to_sparse()], "with layout torch.sparse_coo"),
    ],
)
def test_bad_parameters(params, message):
    """Named when they first have a gradient, before anything is written."""
    (good,) = parameters((3,))
    opt = Lion([{"params": [good]}, {"params": params}], **OPTIONS)
    set_grads([good], 0)
    opt.step()
    before = good.detach().clone()
    for p in params:
        p.grad = torch.empty_like(p)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(good, before)


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (3, 2)), ((0, 4), (0, 0)), ((3,), (7,))])
def test_odd_strides_without_overlaps(shape, strides):
    """(2, 3) with strides (3, 2) has no two elements in one place, though its rows interleave."""
    p = torch.nn.Parameter(torch.zeros(20).as_strided(shape, strides))
    opt = Lion([p], lr=0.5)
    p.grad = torch.ones(shape)
    opt.step()
    assert torch.equal(p, torch.full(shape, -0.5))


def test_bad_gradients_write_nothing():
    good, bad = parameters((5,), (4, 3))
    opt = Lion([("good", good), ("bad", bad)], **OPTIONS)
    set_grads([good, bad], 0)
    opt.step()
    before = copy.deepcopy([good, bad, opt.state_dict()["state"]])
    sparse = torch.eye(4, 3).to_sparse()
    bad.grad = sparse
    with pytest.raises(
        RuntimeError, match=r"Lion does not support sparse gradients: parameter 1 of group 0 .'bad'"
    ):
        opt.step()
    after = [good, bad, opt.state_dict()["state"]]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    for i in (0, 1):
        assert torch.equal(before[2][i]["exp_avg"], after[2][i]["exp_avg"])


def test_a_gradient_of_another_dtype_is_refused():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    opt = Lion([p])
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    p.data = p.data.float()  # what a careless cast does
    with pytest.raises(ValueError, match=r"must be torch.float32 .* got torch.bfloat16"):
        opt.step()


def test_options_are_checked_again_in_the_step():
    params = parameters((3,))
    opt = Lion(params)
    set_grads(params, 0)
    before = params[0].clone()
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be at least 0"):
        opt.step()
    assert torch.equal(params[0], before)


def test_groups_and_their_options():
    a, b, c = parameters((40,), (50,), (60,))
    twins = copy.deepcopy([a, b, c])
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion([{"params": [a]}, {"params": [b], "lr": 5e-2, "betas": (0.5, 0.6)}], **OPTIONS)
    opt.add_param_group({"params": [c], "weight_decay": 0.9})
    for step in range(3):
        set_grads([a, b, c], step)
        set_grads(twins, step)
        opt.step()
        eager(twins[:1], exp_avgs[:1])
        eager(twins[1:2], exp_avgs[1:2], lr=5e-2, betas=(0.5, 0.6))
        eager(twins[2:], exp_avgs[2:], weight_decay=0.9)
    close([a, b, c], twins)


def test_missing_gradients_and_frozen_parameters():
    a, b, c = parameters((4,), (5,), (6,))
    c.requires_grad_(False)
    opt = Lion([a, b, c], **OPTIONS)
    a.grad = torch.ones(4)
    before = copy.deepcopy([b, c])
    opt.step()
    assert torch.equal(b, before[0]) and torch.equal(c, before[1])
    assert list(opt.state) == [a]


def test_closure():
    params = parameters((6,))
    opt = Lion(params, **OPTIONS)

    def closure():
        opt.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    first = opt.step(closure)
    assert first is not None and opt.step(closure) < first
    assert params[0].grad.requires_grad is False


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
def test_schedulers(name):
    params = parameters((10,))
    twins = copy.deepcopy(params)
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion(params, **OPTIONS)
    make = getattr(torch.optim.lr_scheduler, name)
    kwargs = {
        "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False},
        "CosineAnnealingLR": {"T_max": 10},
    }[name]
    scheduler = make(opt, **kwargs)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        lr = opt.param_groups[0]["lr"]
        opt.step()
        eager(twins, exp_avgs, lr=lr)
        scheduler.step()
    close(params, twins)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(shape):
    params = parameters((100,))
    twins = copy.deepcopy(params)
    lr = torch.full(shape, 1e-2)
    opt = Lion(params, **{**OPTIONS, "lr": lr})
    reference = Lion(twins, **{**OPTIONS, "lr": lr.item()})
    for step in range(3):
        lr.fill_(10.0 ** (-1 - step))
        reference.param_groups[0]["lr"] = lr.item()
        set_grads(params, step)
        set_grads(twins, step)
        opt.step()
        reference.step()
    assert bits_equal(params[0], twins[0])


def layouts():
    base = generator(3)
    image = torch.randn(4, 6, 5, 3, generator=base)
    return {
        "transposed": torch.randn(8, 5, generator=base).t(),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "column slice": torch.randn(9, 10, generator=base)[:, ::2],
        "transposed slice": torch.randn(9, 10, generator=base)[:, :7].t(),
        "offset": torch.randn(50, generator=base)[7:30],
    }


@pytest.mark.parametrize("grad_like", ["parameter", "contiguous", "expanded"])
@pytest.mark.parametrize("layout", layouts())
def test_memory_layouts(layout, grad_like):
    """Any strides of parameter and gradient give the result of the contiguous ones, and nothing
    beside the parameter is written."""
    p = torch.nn.Parameter(layouts()[layout])
    storage = p.data.untyped_storage()
    everything = torch.empty(0).set_(storage).clone()
    twin = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    opt, reference = Lion([p], **OPTIONS), Lion([twin], **OPTIONS)
    for step in range(3):
        g = torch.randn(p.shape, generator=generator(step))
        if grad_like == "expanded":
            g = g[:1].expand(p.shape)
        twin.grad = g.clone(memory_format=torch.contiguous_format)
        p.grad = torch.empty_like(p).copy_(g) if grad_like == "parameter" else g
        before = p.grad.clone()
        opt.step()
        reference.step()
        assert torch.equal(p.grad, before)
    assert torch.equal(p, twin)
    assert p.data.untyped_storage().data_ptr() == storage.data_ptr()
    inside = torch.zeros_like(everything)
    inside.as_strided(p.size(), p.stride(), p.storage_offset()).fill_(1.0)
    outside = inside == 0
    assert torch.equal(torch.empty(0).set_(storage)[outside], everything[outside])


def test_the_memory_format_may_change_between_steps():
    p = torch.nn.Parameter(torch.randn(4, 6, 5, 3, generator=generator(1)))
    twin = torch.nn.Parameter(p.detach().clone())
    opt, reference = Lion([p], **OPTIONS), Lion([twin], **OPTIONS)
    for step in range(4):
        if step == 2:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        g = torch.randn(p.shape, generator=generator(step))
        p.grad, twin.grad = torch.empty_like(p).copy_(g), g
        opt.step()
        reference.step()
    assert torch.equal(p, twin)


def test_complex_parameters_are_pairs_of_reals():
    gen = generator(1)
    real = torch.nn.Parameter(torch.randn(20, 2, generator=gen))
    p = torch.nn.Parameter(torch.view_as_complex(real.detach().clone()))
    opt, reference = Lion([p], **OPTIONS), Lion([real], **OPTIONS)
    for _ in range(3):
        real.grad = torch.randn(20, 2, generator=gen)
        p.grad = torch.view_as_complex(real.grad.clone())
        opt.step()
        reference.step()
    assert torch.equal(torch.view_as_real(p.detach()), real)
    p.grad = p.grad.conj()  # a lazy view: its memory holds the unconjugated values
    real.grad = torch.view_as_real(p.grad.resolve_conj()).clone()
    opt.step()
    reference.step()
    assert torch.equal(torch.view_as_real(p.detach()), real)
    with pytest.raises(ValueError, match="momentum_dtype must be None for complex"):
        Lion([p], momentum_dtype="float32").step()


@pytest.mark.parametrize("given", [torch.float32, "float32"])
def test_momentum_dtype(given):
    p = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    opt = Lion([p], **OPTIONS, momentum_dtype=given)
    p.grad = torch.full((10,), 0.37, dtype=torch.bfloat16)
    opt.step()
    m = opt.state[p]["exp_avg"]
    assert m.dtype == torch.float32
    expected = np.float32(oracle.interpolate(0.0, array(p.grad), 0.95))
    np.testing.assert_allclose(array(m), expected, rtol=2**-23)
    assert Lion([p]).defaults["momentum_dtype"] is None


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("momentum_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_resume(dtype, momentum_dtype):
    """A run that is saved and loaded half-way ends with the bits of one that was not."""

    def build():
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters((300,), (7, 5))]
        return params, Lion(params, **OPTIONS, momentum_dtype=momentum_dtype)

    def train(params, opt, steps):
        for step in steps:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator(step)).to(dtype)
            opt.step()

    straight, opt = build()
    train(straight, opt, range(6))
    first, saved = build()
    train(first, saved, range(3))
    state = round_trip(saved.state_dict())
    second, loaded = build()
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q)
    loaded.load_state_dict(state)
    train(second, loaded, range(3, 6))
    for p, q in zip(straight, second, strict=True):
        assert bits_equal(p, q)
        assert bits_equal(opt.state[p]["exp_avg"], loaded.state[q]["exp_avg"])


def test_loads_the_state_of_other_lions():
    """lion-pytorch, google's and timm's Lion keep exp_avg and the group keys lr, betas,
    weight_decay, and some more."""
    params = parameters((6,), (4, 3))
    foreign = {
        "state": {0: {"exp_avg": torch.arange(6.0)}, 1: {"exp_avg": torch.ones(4, 3)}},
        "param_groups": [
            {"params": [0, 1], "lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.7, "foreach": None}
        ],
    }
    opt = Lion(params, momentum_dtype="bfloat16", maximize=True)
    opt.load_state_dict(foreign)
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.7)
    assert group["maximize"] is True
    assert opt.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(opt.state[params[0]]["exp_avg"].float(), torch.arange(6.0))
    set_grads(params, 0)
    opt.step()


def test_loads_lion_pytorch_itself():
    lion_pytorch = pytest.importorskip("lion_pytorch")
    params = parameters((30,), (4, 3))
    twins = copy.deepcopy(params)
    theirs = lion_pytorch.Lion(twins, **OPTIONS)
    for step in range(3):
        set_grads(twins, step)
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        p.data.copy_(q)
    ours = Lion(params)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3, 6):
        set_grads(params, step)
        set_grads(twins, step)
        ours.step()
        theirs.step()
    close(params, twins)
    for p, q in zip(params, twins, strict=True):
        assert bits_equal(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])


def test_optimi_and_back():
    """Their state loads here, and ours there: the same momenta."""
    optimi = pytest.importorskip("optimi")
    params = parameters((30,), (4, 3))
    twins = copy.deepcopy(params)
    theirs, ours = optimi.Lion(twins, lr=1e-2, betas=(0.8, 0.95)), Lion(params)
    set_grads(twins, 0)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(params, twins, strict=True):
        assert bits_equal(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])
        assert set(ours.state[p]) == {"exp_avg"}
    assert ours.param_groups[0]["betas"] == (0.8, 0.95)
    back = optimi.Lion(twins, lr=1.0)
    back.load_state_dict(ours.state_dict())
    for p, q in zip(params, twins, strict=True):
        assert bits_equal(ours.state[p]["exp_avg"], back.state[q]["exp_avg"])


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_8_bit_state_of_bitsandbytes(n):
    """By their layout: uint8 indices into qmap1, a maximum for every 256 elements."""
    gen = generator(n)
    codes = torch.randint(0, 256, (n,), generator=gen).to(torch.uint8)
    qmap, absmax = torch.linspace(-1, 1, 256), torch.rand(-(-n // 256), generator=gen)
    quantized = {"state1": codes, "qmap1": qmap, "absmax1": absmax}
    state = {
        "state": {0: {"step": 2, "__bnb_optimizer_quant_state__": quantized}},
        "param_groups": [{"params": [0], "lr": 0.5, "betas": (0.9, 0.99), "eps": 0.0}],
    }
    (p,) = parameters((n,))
    opt = Lion([p])
    opt.load_state_dict(state)
    wanted = [qmap[c].item() * absmax[i // 256].item() for i, c in enumerate(codes.tolist())]
    torch.testing.assert_close(opt.state[p]["exp_avg"], torch.tensor(wanted))
    assert set(opt.state[p]) == {"exp_avg"}
    quantized["absmax1"] = torch.rand(99)
    with pytest.raises(
        ValueError, match="absmax1 of parameter 0 of group 0 must have an element for every 256"
    ):
        opt.load_state_dict(state)


@pytest.mark.parametrize("name", ["Lion", "Lion8bit"])
def test_bitsandbytes_itself(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (p,) = parameters((5000,))
    twin = torch.nn.Parameter(p.detach().clone())
    theirs, ours = getattr(bitsandbytes.optim, name)([twin], lr=1e-2), Lion([p])
    set_grads([twin], 0)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    exact = 0.01 * twin.grad
    error = (ours.state[p]["exp_avg"] - exact).abs().max() / exact.abs().max()
    assert error < (1e-6 if name == "Lion" else 0.02)


def build(library, params, **options):
    """Another library's Lion, named as export_state_dict names it."""
    if library.startswith("bitsandbytes"):
        module = pytest.importorskip("bitsandbytes").optim
        return (module.Lion8bit if library.endswith("8bit") else module.Lion)(params, **options)
    return pytest.importorskip(library.replace("-", "_")).Lion(params, **options)


@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("library", ["lion-pytorch", "optimi", "bitsandbytes", "bitsandbytes-8bit"])
def test_a_run_goes_on_in_another_library(library, momentum_dtype):
    """Three steps here, three there, as six here; with the options that were set here."""
    params = parameters((80, 70), (10,))
    ours = Lion(params, **OPTIONS, momentum_dtype=momentum_dtype)
    for step in range(3):
        set_grads(params, step)
        ours.step()
    twins = copy.deepcopy(params)
    theirs = build(library, twins, lr=1.0)
    theirs.load_state_dict(ours.export_state_dict(library))
    for step in range(3, 6):
        set_grads(params, step)
        set_grads(twins, step)
        ours.step()
        theirs.step()
    is_exact = momentum_dtype is None and library != "bitsandbytes-8bit"
    apart = [(p - q).detach().abs() > OPTIONS["lr"] / 2 for p, q in zip(params, twins, strict=True)]
    assert torch.cat([a.flatten() for a in apart]).float().mean() <= (0 if is_exact else 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimi_keeps_an_exported_momentum(dtype):
    """Of a plain state it clears the momentum in its first step: the compensation is missing."""
    optimi = pytest.importorskip("optimi")
    (p,) = parameters((300,))
    p.data = p.data.to(dtype)
    ours = Lion([p], **OPTIONS)
    p.grad = torch.ones_like(p)
    ours.step()
    for state, kept in ((ours.state_dict(), False), (ours.export_state_dict("optimi"), True)):
        twin = torch.nn.Parameter(p.detach().clone())
        theirs = optimi.Lion([twin], lr=1e-2, weight_decay=0.0)
        if not kept:
            state["param_groups"] = theirs.state_dict()["param_groups"]
        theirs.load_state_dict(copy.deepcopy(state))
        twin.grad = torch.zeros_like(twin)
        theirs.step()
        assert theirs.state[twin]["exp_avg"].bool().all().item() == kept


def test_exports_by_layout():
    """What no library here can check: keys and values of each layout."""
    params = parameters((64, 100), (10,))
    opt = Lion(params, **OPTIONS, momentum_dtype="bfloat16", independent_weight_decay=True)
    set_grads(params, 0)
    opt.step()
    momenta = [opt.state[p]["exp_avg"].float() for p in params]
    for library in ("google", "timm", "lion-pytorch"):
        state = opt.export_state_dict(library)
        (group,) = state["param_groups"]
        assert (group["lr"], group["betas"], group["params"]) == (0.01, (0.8, 0.95), [0, 1])
        assert group["weight_decay"] == OPTIONS["weight_decay"] / 0.01
        for i, m in enumerate(momenta):
            assert set(state["state"][i]) == {"exp_avg"}
            assert bits_equal(state["state"][i]["exp_avg"], m)
    assert state["state"][0]["exp_avg"].data_ptr() != opt.state[params[0]]["exp_avg"].data_ptr()
    pytest.importorskip("bitsandbytes")
    state = opt.export_state_dict("bitsandbytes-8bit")["state"]
    assert set(state[1]) == {"step", "state1"}  # too small for 8 bits there
    assert state[0]["state1"].dtype == torch.uint8 and state[0]["absmax1"].shape == (25,)
    again = Lion(params)
    again.load_state_dict({"state": state, "param_groups": [{"params": [0, 1]}]})
    error = (again.state[params[0]]["exp_avg"] - momenta[0]).norm() / momenta[0].norm()
    assert error < 0.02 and bits_equal(again.state[params[1]]["exp_avg"], momenta[1])
    with pytest.raises(ValueError, match="library must be one of lion-pytorch, google"):
        opt.export_state_dict("adam")
    opt.param_groups[0].update(maximize=True, cautious="rescaled")
    (group,) = opt.export_state_dict("timm")["param_groups"]
    assert group["maximize"] is True and group["caution"] is True
    with pytest.raises(ValueError, match="optimi cannot maximize"):
        opt.export_state_dict("optimi")


@pytest.mark.parametrize("change", ["shape", "lr"])
def test_a_bad_state_changes_nothing(change):
    params = parameters((6,))
    opt = Lion(params, **OPTIONS)
    set_grads(params, 0)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    if change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(5)
    state["param_groups"][0]["lr"] = -3.0 if change == "lr" else 3.0
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"\(6,\), got \(5,\)" if change == "shape" else "lr must"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    assert torch.equal(opt.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_hooks_of_a_load_change_and_see_the_state():
    (p,) = parameters((6,))
    opt, seen = Lion([p], **OPTIONS), []
    set_grads([p], 0)
    opt.step()
    m = opt.state[p]["exp_avg"].clone()

    def halve(_, state):
        kept = {"exp_avg": state["state"][0]["exp_avg"] / 2}
        return {**state, "state": {0: kept}}

    opt.register_load_state_dict_pre_hook(halve)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(seen[0], m / 2) and torch.equal(opt.state[p]["exp_avg"], m / 2)
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(seen[1], m / 4) and len(seen) == 2


def test_a_loaded_momentum_takes_its_parameters_layout():
    p = torch.nn.Parameter(torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last))
    opt = Lion([p], **OPTIONS)
    p.grad = torch.randn_like(p)
    opt.step()
    state = opt.state_dict()
    m = state["state"][0]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = m.contiguous()
    opt.load_state_dict(state)
    assert opt.state[p]["exp_avg"].stride() == p.stride()
    assert torch.equal(opt.state[p]["exp_avg"], m)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent_and_equal(copier):
    params = parameters((20,))
    opt = Lion(params, **OPTIONS)
    set_grads(params, 0)
    opt.step()
    twin = copier(opt)
    theirs = twin.param_groups[0]["params"]
    theirs[0].grad = params[0].grad.clone()
    opt.step()
    assert not torch.equal(theirs[0], params[0])
    twin.step()
    assert torch.equal(theirs[0], params[0])


def test_a_step_allocates_nothing_of_parameter_size():
    p = torch.nn.Parameter(torch.randn(1_000_000))
    opt = Lion([p], **OPTIONS)
    p.grad = torch.randn_like(p)
    opt.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < 1000


def test_beside_a_compiled_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model)
    opt, reference = Lion(model.parameters(), **OPTIONS), Lion(twin.parameters(), **OPTIONS)
    x = torch.randn(32, 8)
    losses = []
    for _ in range(5):
        for net, optimizer in ((compiled, opt), (twin, reference)):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_ops_compile_without_graph_breaks():
    def step(p, g, m, lr):
        torch.ops.lion_kernels.lion_step([p], [g], [m], lr, 0.9, 0.99, 0.1, False, None)
        return p * 2

    p, g, m = (torch.randn(40, generator=generator(i)) for i in range(3))
    q, n = p.clone(), m.clone()
    lr = torch.tensor(0.1)
    expected = step(p, g, m, lr)
    assert torch.equal(torch.compile(step, fullgraph=True)(q, g, n, lr), expected)
    assert torch.equal(p, q) and torch.equal(m, n)


@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grad_scaler(dtype, unscaled_first):
    """A step through GradScaler equals one on the unscaled gradients, and leaves those, as torch's
    fused optimizers do; one that overflows changes nothing, gradients and momenta included, and
    halves the scale."""
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters((30, 20), (7,))]
    twins = copy.deepcopy(params)
    opt, plain = Lion(params, **OPTIONS), Lion(twins, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for step in range(6):
        for p, twin in zip(params, twins, strict=True):
            twin.grad = torch.randn(p.shape, generator=generator(step)).to(dtype)
            p.grad = twin.grad * scaler.scale(torch.ones(())).item()
        if step == 3:
            params[1].grad[2] = torch.inf
            state = copy.deepcopy([opt.state[p]["exp_avg"] for p in params])
        if unscaled_first and dtype is not torch.float16:  # which GradScaler.unscale_ refuses
            scaler.unscale_(opt)
        grads = [p.grad.clone() for p in params]
        before, scale = copy.deepcopy(params), scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if step != 3:
            grads = [twin.grad for twin in twins]
        assert all(bits_equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        if step == 3:
            assert all(
                bits_equal(p.detach(), b.detach()) for p, b in zip(params, before, strict=True)
            )
            assert all(
                bits_equal(opt.state[p]["exp_avg"], m) for p, m in zip(params, state, strict=True)
            )
            assert scaler.get_scale() == scale / 2
            continue
        plain.step()
        for p, twin in zip(params, twins, strict=True):
            assert bits_equal(p.detach(), twin.detach())
            assert bits_equal(opt.state[p]["exp_avg"], plain.state[twin]["exp_avg"])


def test_skipped_elements_are_left_and_counted():
    """To propagate, one NaN freezes momentum and weight for ever; skipped, it is one lost element
    of one step."""
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(50, dtype=dtype))
        twin = torch.nn.Parameter(p.detach().clone())
        skipping, plain = Lion([p], **OPTIONS, nonfinite="skip"), Lion([twin], **OPTIONS)
        for step in range(3):
            p.grad, twin.grad = torch.ones_like(p), torch.ones_like(p)
            if step == 1:
                p.grad[[3, 40]] = twin.grad[[3, 40]] = torch.tensor(
                    [torch.nan, torch.inf], dtype=dtype
                )
                before = p.detach().clone(), skipping.state[p]["exp_avg"].clone()
            skipping.step()
            plain.step()
            if step == 1:
                assert bits_equal(p[[3, 40]].detach(), before[0][[3, 40]])
                assert bits_equal(skipping.state[p]["exp_avg"][[3, 40]], before[1][[3, 40]])
        assert skipping.nonfinite_count() == 2 and plain.nonfinite_count() == 0
        assert p.isfinite().all() and twin[3].isnan()
        others = [i for i in range(50) if i not in (3, 40)]
        assert bits_equal(p[others].detach(), twin[others].detach())


def test_independent_weight_decay():
    """MosaicML's rule, 1 - weight_decay * lr / initial lr, as a schedule moves lr."""
    p, q = parameters((30,)), parameters((30,))
    opt = Lion(p, lr=0.02, weight_decay=0.1, independent_weight_decay=True)
    ordinary = Lion(q, lr=0.02, weight_decay=0.1 / 0.02)
    expected = p[0].detach().double()
    for lr in (0.02, 0.01, 0.002):
        for o, params in ((opt, p), (ordinary, q)):
            o.param_groups[0]["lr"] = lr
            params[0].grad = torch.zeros(30)
            o.step()
        expected *= 1 - 0.1 * lr / 0.02
    torch.testing.assert_close(p[0].detach().double(), expected, rtol=1e-6, atol=0)
    assert bits_equal(p[0].detach(), q[0].detach())
    with pytest.raises(ValueError, match="independent_weight_decay needs an initial lr above 0"):
        Lion(parameters((3,)), lr=0.0, independent_weight_decay=True)
    again = Lion(parameters((30,)), lr=0.5, independent_weight_decay=True)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["reference_lr"] == 0.02
    # torch's schedulers keep their own initial lr.
    assert "initial_lr" not in opt.param_groups[0]


def test_bad_new_options():
    with pytest.raises(ValueError, match="nonfinite must be 'propagate' or 'skip', got 'drop'"):
        Lion(parameters((3,)), nonfinite="drop")
    for seed in (-1, 2**63, 0.5, "1", None):
        with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*63\), got"):
            Lion(parameters((3,)), seed=seed)
    with pytest.raises(ValueError, match="fused_backward must be False or True, got 'yes'"):
        Lion(parameters((3,)), fused_backward="yes")


def test_cautious_lion():
    """Options reach the kernel: against the formulas of their papers, in PyTorch."""
    (p,) = parameters((50,))
    expected, m = p.detach().clone(), torch.zeros(50)
    opt = Lion(
        [p], lr=0.01, betas=(0.5, 0.75), weight_decay=0.5, cautious=True, cautious_weight_decay=True
    )
    for step in range(6):
        g = exact(50, generator(step))
        c = 0.5 * m + 0.5 * g
        u = torch.where(c * g > 0, c.sign(), 0.0)
        decay = torch.where(u * expected >= 0, 0.5, 0.0)
        expected = expected - 0.01 * (u + decay * expected)
        m = 0.75 * m + 0.25 * g
        p.grad = g
        opt.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"fused_backward": True}, {"momentum_dtype": "int8"}])
def test_rescaled_cautious_lion(options):
    """As the paper's authors write it, a tensor at a time."""
    params, twins = parameters((300,), (40, 5), (3,)), parameters((300,), (40, 5), (3,))
    opt = Lion(params, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, cautious="rescaled", **options)
    exp_avgs = [torch.zeros_like(p) for p in twins]
    for step in range(4):
        set_grads(twins, step)
        sum((p * q.grad).sum() for p, q in zip(params, twins, strict=True)).backward()
        opt.step()
        opt.zero_grad()
        for p, m in zip(twins, exp_avgs, strict=True):
            u = (0.8 * m + 0.2 * p.grad).sign()
            mask = (u * p.grad > 0).float()
            u = u * mask * (mask.numel() / (mask.sum() + 1))
            p.data.mul_(1 - 1e-2 * 0.3).sub_(1e-2 * u)
            m.mul_(0.95).add_(p.grad, alpha=0.05)
    apart = [(p - q).detach().abs() > 5e-3 for p, q in zip(params, twins, strict=True)]
    share = torch.cat([a.flatten() for a in apart]).float().mean()
    assert share <= (0.1 if "momentum_dtype" in options else 0)


def test_bad_cautious():
    with pytest.raises(ValueError, match="cautious must be False, True or 'rescaled', got 'no'"):
        Lion(parameters((3,)), cautious="no")


@pytest.mark.parametrize("tensor_lr", [True, False])
def test_in_a_compiled_training_step(tensor_lr):
    """The same path as eagerly; the step is one break between graphs, and a new lr no recompile."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    def run(compiler):
        weight = torch.nn.Parameter(torch.randn(20, 20, generator=generator(0)))
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        opt = Lion([weight], lr=lr, weight_decay=0.1)

        def train(x):
            opt.zero_grad()
            (weight * x).square().sum().backward()
            opt.step()
            return weight.detach() + 1.0

        step, frames = compiler(train), []
        for i in range(5):
            if tensor_lr:
                lr.fill_(0.1 / (i + 1))
            else:
                opt.param_groups[0]["lr"] = 0.1 / (i + 1)
            step(torch.randn(20, 20, generator=generator(1 + i)))
            frames.append(counter.frame_count)
        return weight.detach(), frames

    counter = CompileCounter()
    eager, _ = run(lambda train: train)
    torch._dynamo.reset()
    counters.clear()
    compiled, frames = run(lambda train: torch.compile(train, backend=counter))
    assert bits_equal(eager, compiled)
    assert frames[0] > 0
    # The first step makes the gradient, the second finds one; then nothing is compiled again.
    assert frames[2:] == [frames[1]] * 3
    assert not [reason for reason in counters["graph_break"] if "lion.py" in reason]


@pytest.mark.parametrize(
    "options",
    [{}, {"rounding": "compensated"}, {"rounding": "stochastic"}, {"momentum_dtype": "int8"}],
)
def test_distributed_checkpoint_of_a_plain_model(tmp_path, options):
    """torch.distributed.checkpoint, one process: the resumed run takes the same path."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fresh():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)]
        model = torch.nn.Sequential(*layers).to(torch.bfloat16)
        return model, Lion(model.named_parameters(), **OPTIONS, **options)

    def train(model, opt, seeds):
        for seed in seeds:
            opt.zero_grad()
            x = torch.randn(8, 6, generator=generator(seed)).to(torch.bfloat16)
            model(x).float().square().sum().backward()
            opt.step()

    model, opt = fresh()
    train(model, opt, range(3))
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=tmp_path, no_dist=True)
    train(model, opt, range(3, 6))

    resumed, again = fresh()
    model_state, opt_state = get_state_dict(resumed, again)
    state = {"model": model_state, "opt": opt_state}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, again, model_state_dict=state["model"], optim_state_dict=state["opt"])
    train(resumed, again, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits_equal(p.detach(), q.detach())
        for key, tensor in opt.state[p].items():
            assert bits_equal(tensor, again.state[q][key])


def test_a_default_device_is_no_concern():
    (p,), (q,) = parameters((20,)), parameters((20,))
    opts = [Lion([t], lr=0.1, weight_decay=0.1, independent_weight_decay=True) for t in (p, q)]
    for opt, t in zip(opts, (p, q), strict=True):
        t.grad = torch.ones(20)
        if t is q:
            with torch.device("meta"):
                opt.step()
        else:
            opt.step()
    assert bits_equal(p.detach(), q.detach())


def test_the_first_lr_is_read_once():
    """With independent_weight_decay: a step's checks do not wait for a tensor lr on a device."""
    from lion_kernels.options import check_options

    (p,) = parameters((3,))
    opt = Lion([p], lr=torch.tensor(0.1), independent_weight_decay=True)
    opt.param_groups[0]["lr"] = torch.zeros((), device="meta")  # which has no value to read
    check_options(opt.param_groups[0], "Lion")
    assert opt.param_groups[0]["reference_lr"] == torch.tensor(0.1).item()
