"""Lion's options that change the formula, and steps under a GradScaler."""

import copy

import pytest
import torch

from common import bits_equal, exact, generator
from eager import OPTIONS, parameters, set_grads
from lion_kernels import Lion


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
