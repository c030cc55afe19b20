"""float64 and complex128: the update in float64 arithmetic, alone and in votes."""

import copy

import pytest
import torch

from common import exact, generator
from lion_kernels import DistributedLion, Lion

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def formula(p, m, g, *, lr, betas, weight_decay, cautious=False, cautious_decay=False, delta=None):
    """Lion in float64; ``delta``: of a vote."""
    c = betas[0] * m + (1 - betas[0]) * g
    sign = torch.where(c.sign() == g.sign(), c.sign(), 0.0) if cautious else c.sign()
    delta = sign if delta is None else delta
    decay = torch.full_like(p, 1 - lr * weight_decay)
    if cautious_decay:
        decay[delta * p < 0] = 1.0
    return p * decay - lr * delta, betas[1] * m + (1 - betas[1]) * g, sign


def gradient(shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_lion_in_float64(rounding, maximize, cautious):
    """To float64's last bits, beside float32 parameters of the same group and in any layout."""
    p = torch.nn.Parameter(gradient((30, 7), 0).t())
    room = torch.nn.Parameter(gradient((9, 10), 1)[:, ::2])
    other = torch.nn.Parameter(torch.randn(20, generator=generator(2)))
    alone = copy.deepcopy(other)
    options = {**OPTIONS, "cautious": cautious, "cautious_weight_decay": cautious}
    opt = Lion([p, other, room], **options, maximize=maximize, rounding=rounding)
    twin = Lion([alone], **options, maximize=maximize, rounding=rounding)
    want = [(t.detach().clone(), torch.zeros_like(t)) for t in (p, room)]
    for step in range(5):
        for k, t in enumerate((p, room)):
            t.grad = gradient(t.shape, 10 * step + k)
            g = -t.grad if maximize else t.grad
            kinds = {"cautious": cautious, "cautious_decay": cautious}
            want[k] = formula(*want[k], g, **OPTIONS, **kinds)[:2]
        other.grad = alone.grad = torch.randn(20, generator=generator(100 + step))
        opt.step()
        twin.step()
    for t, (q, m) in zip((p, room), want, strict=True):
        torch.testing.assert_close(t.detach(), q, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(opt.state[t]["exp_avg"], m, rtol=1e-15, atol=1e-15)
        assert opt.state[t]["exp_avg"].dtype == torch.float64
    assert torch.equal(other, alone)


def test_complex128_is_pairs():
    real = torch.nn.Parameter(gradient((20, 2), 0))
    p = torch.nn.Parameter(torch.view_as_complex(real.detach().clone()))
    opts = Lion([real], **OPTIONS), Lion([p], **OPTIONS)
    for step in range(3):
        real.grad = gradient((20, 2), 1 + step)
        p.grad = torch.view_as_complex(real.grad.clone()).conj().conj()
        for opt in opts:
            opt.step()
    assert torch.equal(torch.view_as_real(p.detach()), real)


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
def test_a_momentum_of_another_type(momentum_dtype):
    p = torch.nn.Parameter(torch.zeros(300, dtype=torch.float64))
    opt = Lion([p], **OPTIONS, momentum_dtype=momentum_dtype)
    p.grad = gradient((300,), 0)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == getattr(torch, momentum_dtype)
    m = opt.export_state_dict("lion-pytorch")["state"][0]["exp_avg"]
    assert (m - 0.05 * p.grad).norm() < 0.03 * (0.05 * p.grad).norm()
    again = Lion([p], **OPTIONS, momentum_dtype=momentum_dtype)
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[p]["exp_avg"], opt.state[p]["exp_avg"])


def test_rescaled_and_skipping():
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
    opt = Lion([p], lr=0.1, betas=(0.5, 0.5), cautious="rescaled", nonfinite="skip")
    opt.state[p]["exp_avg"] = torch.tensor([-3.0] * 4 + [3.0] * 6, dtype=torch.float64)
    p.grad = torch.ones(10, dtype=torch.float64)
    p.grad[9] = torch.nan
    opt.step()  # five agree, one is not finite, four do not agree
    assert opt.nonfinite_count() == 1
    want = torch.ones(10, dtype=torch.float64)
    want[4:9] -= 0.1 * 10 / 6
    torch.testing.assert_close(p.detach(), want, rtol=1e-15, atol=0)
    assert opt.state[p]["exp_avg"][9] == 3.0


def test_fused_backward_and_a_scaler():
    p, q = (torch.nn.Parameter(torch.ones(10, dtype=torch.float64)) for _ in range(2))
    opt, fused = Lion([p], **OPTIONS), Lion([q], **OPTIONS, fused_backward=True)
    (p * 3).sum().backward()
    (q * 3).sum().backward()
    assert q.grad is None
    opt.step()
    fused.step()
    assert torch.equal(p, q)
    for found in (1.0, 0.0):
        before = p.detach().clone()
        p.grad = torch.full_like(p, 3.0 * 8)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor([found])
        opt.step()
        assert torch.equal(p, before) == (found == 1.0)
    del opt.grad_scale, opt.found_inf
    (q * 3).sum().backward()
    fused.step()
    assert torch.equal(p, q) and torch.equal(p.grad, torch.full_like(p, 3.0))


def votes(rank, n, options):
    """float64, complex128 and float32 in one group; a tensor with gradients on rank 0 only, one
    with none at all. Against the formula with the sum of all ranks' signs."""
    p, q = (torch.nn.Parameter(gradient((40,), k)) for k in range(2))
    c = torch.nn.Parameter(torch.ones(6, dtype=torch.complex128))
    single = torch.nn.Parameter(torch.ones(50))
    idle = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    dyadic = {"lr": 0.25, "betas": (0.5, 0.75), "weight_decay": 0.5}
    opt = DistributedLion([p, single, q, idle, c], **dyadic, ballots="ternary", **options)
    want = p.detach().clone()
    ms = [torch.zeros(40, dtype=torch.float64) for _ in range(n)]
    cautious = options.get("cautious_weight_decay", False)
    for step in range(4):
        # Integers: signs that are exact, zeros among them.
        gs = [exact(40, generator(10 * step + r)).double() for r in range(n)]
        signs = []
        for r in range(n):
            _, ms[r], sign = formula(want, ms[r], gs[r], **dyadic)
            signs.append(sign)
        total = torch.stack(signs).sum(0)
        delta = total / n if options.get("aggregation") == "average" else total.sign()
        want = formula(want, ms[0], gs[0], **dyadic, delta=delta, cautious_decay=cautious)[0]
        p.grad = gs[rank]
        q.grad = gs[0] if rank == 0 else None
        single.grad = exact(50, generator(50 * step + rank))
        c.grad = torch.full_like(c, 1 - 1j)
        opt.step()
    opt.verify_replicas()
    assert torch.equal(opt.state[p]["exp_avg"], ms[rank])
    assert torch.equal(idle, torch.ones_like(idle))
    assert torch.equal(c.real, -(c.imag - c.imag[0]) + c.real[0])
    steps = [int(group["step"]) for group in opt.param_groups]
    return (p.detach() - want).abs().max().item(), bool((q != gradient((40,), 1)).any()), steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregation": "average"},
        {"cautious_weight_decay": True},
        {"exchange": "sharded", "rounding": "stochastic"},
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_votes_in_float64(worlds, n, options):
    for error, moved, steps in worlds(n).run(votes, n, options):
        assert error < 1e-14 and moved and steps == [4]


def poisoned(rank):
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
    opt = DistributedLion([p], lr=0.5, ballots="ternary")
    p.grad = torch.ones_like(p)
    p.grad[3] = torch.nan if rank == 0 else 1.0
    opt.step()
    return p.detach().clone(), opt.state[p]["exp_avg"][3].item(), opt.nonfinite_count()


def test_a_nan_abstains_in_float64(worlds):
    for rank, (p, m, count) in enumerate(worlds(3).run(poisoned)):
        assert torch.equal(p, torch.full_like(p, 0.5))
        assert (m, count) == ((0.0, 1) if rank == 0 else (pytest.approx(0.01), 0))
