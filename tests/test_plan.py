"""What is asked once holds: a Lion that keeps its plans goes the way of one that asks anew in every
step, whatever happens to parameters, gradients, states and options in between."""

import copy
import weakref

import pytest
import torch

from common import bits_equal, generator
from lion_kernels import Lion, bucket

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def tensors():
    gen = generator(0)
    image = torch.randn(4, 6, 5, 3, generator=gen)
    return [
        torch.randn(40, 30, generator=gen),
        image.contiguous(memory_format=torch.channels_last),
        torch.randn(7, generator=gen, dtype=torch.float64),
        torch.randn(20, generator=gen).bfloat16(),
        torch.view_as_complex(torch.randn(9, 2, generator=gen)),
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
        del opt.state[params[3]]["exp_avg"]
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


@pytest.mark.parametrize("stride", range(1, 6))
def test_a_plan_is_no_memory(stride):
    """Every event, one after the other in several orders."""
    order = [EVENTS[i * stride % len(EVENTS)] for i in range(len(EVENTS))]
    if order.index("betas in place") > order.index("betas in place again"):
        order.remove("betas in place again")
    if order.index("tensor lr") > order.index("tensor lr written"):
        order.remove("tensor lr written")
    runs = []
    for keeps in (True, False):
        params = [torch.nn.Parameter(t.clone()) for t in tensors()]
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
