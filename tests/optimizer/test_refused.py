"""What Lion refuses: options, parameters and gradients, named, before anything is written."""

import copy

import numpy as np
import pytest
import torch

from eager import OPTIONS, parameters, set_grads
from lion_kernels import Lion


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


def test_bad_new_options():
    with pytest.raises(ValueError, match="nonfinite must be 'propagate' or 'skip', got 'drop'"):
        Lion(parameters((3,)), nonfinite="drop")
    for seed in (-1, 2**63, 0.5, "1", None):
        with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*63\), got"):
            Lion(parameters((3,)), seed=seed)
    with pytest.raises(ValueError, match="fused_backward must be False or True, got 'yes'"):
        Lion(parameters((3,)), fused_backward="yes")


def test_bad_cautious():
    with pytest.raises(ValueError, match="cautious must be False, True or 'rescaled', got 'no'"):
        Lion(parameters((3,)), cautious="no")


def test_the_first_lr_is_read_once():
    """With independent_weight_decay: a step's checks do not wait for a tensor lr on a device."""
    from lion_kernels.options import check_options

    (p,) = parameters((3,))
    opt = Lion([p], lr=torch.tensor(0.1), independent_weight_decay=True)
    opt.param_groups[0]["lr"] = torch.zeros((), device="meta")  # which has no value to read
    check_options(opt.param_groups[0], "Lion")
    assert opt.param_groups[0]["reference_lr"] == torch.tensor(0.1).item()
