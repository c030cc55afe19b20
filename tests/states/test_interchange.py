"""States of other libraries' Lions, there and back."""

import copy

import pytest
import torch

from common import bits_equal, generator
from eager import OPTIONS, close, parameters, set_grads
from lion_kernels import Lion


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
