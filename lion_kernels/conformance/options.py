"""Checks of options that some classes have, under whatever name: 16-bit weights that really train,
momenta of 8 bits, cautious updates. Each is judged by its published formula.
"""

import torch
from torch import Tensor

from .common import (
    BETAS,
    EIGHT_BIT_SLACK,
    LR,
    OPTIONS,
    Make,
    Outcome,
    Twin,
    percent,
    randn,
    takes,
)


def stochastic(make: Make, device: str) -> Outcome:
    """bfloat16 weights of 0.5, 100 updates of 1e-4, rounded at random: the mean is exact, and the
    rounding of an element says nothing of that in another step or of its like in another tensor."""
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.full((4096,), 0.5, device=device, dtype=torch.bfloat16))
        for _ in range(2)
    ]
    opt = make(params, lr=1e-4, betas=BETAS, weight_decay=0.0)
    for _ in range(100):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    moved = torch.stack([0.5 - p.detach().double().cpu() for p in params])
    chance = 1e-4 * 2**9  # of a move by 2**-9, the last place of numbers below 0.5
    spread = (100 * chance * (1 - chance)) ** 0.5 * 2**-9
    spreads = (moved.std() / spread).item()
    alike = torch.corrcoef(moved)[0, 1].nan_to_num(nan=1.0).item()
    ok = abs(moved.mean() - 0.01) < 5e-4 and 0.8 < spreads < 1.2 and abs(alike) < 0.1
    return bool(ok), f"moved {moved.mean():.4f}, spread {spreads:.2f}, alike {alike:.2f}"


def compensated(make: Make, device: str) -> Outcome:
    """bfloat16 weights, 200 updates and decays of 1e-4, which rounding loses: with what was
    dropped kept, they stay within a last place of the formula."""
    p = torch.nn.Parameter(0.5 + randn(4096, seed=0, device=device).abs().to(torch.bfloat16))
    opt, twin = make([p], lr=1e-4, betas=BETAS, weight_decay=1.0), Twin(p, lr=1e-4, wd=1.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        twin.step(p.grad)
        opt.step()
    last_place = torch.exp2(twin.p.log2().floor() - 7)
    off = ((p.detach().double().cpu() - twin.p).abs() / last_place).max().item()
    return off < 1, f"off by {off:.2f} last places"


def uneven(shape: tuple[int, ...], number: int, device: str, falls: float = 10.0) -> Tensor:
    """A gradient whose size falls every 256 elements, six times in a row, again and again."""
    count = torch.Size(shape).numel()
    sizes = falls ** -(torch.arange(count) // 256 % 7)
    return (sizes * (randn(count, seed=number, device="cpu") + 0.3)).view(shape).to(device)


def eight_bits(make: Make, device: str) -> Outcome:
    """Momenta of 8 bits stay close, whatever the sizes of other blocks."""
    p = torch.nn.Parameter(torch.zeros(7777, device=device))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    twin, n_wrong = Twin(p, wd=0.0), 0.0
    for i in range(20):
        p.grad = uneven((7777,), i, device)
        before, exact = p.detach().double().cpu(), twin.p
        twin.step(p.grad)
        opt.step()
        moved, wanted = p.detach().double().cpu() - before, twin.p - exact
        n_wrong += (~((moved - wanted).abs() < LR / 2)).double().mean().item() / 20
    return n_wrong < EIGHT_BIT_SLACK, percent(n_wrong)


def _cautious_move(make: Make, device: str, n: int) -> tuple[Tensor, Tensor]:
    """After a step that gave them a momentum, how far weights move in units of lr, and which way
    they should, by arXiv:2411.16085: not at all against their gradient."""
    p = torch.nn.Parameter(torch.zeros(n, device=device))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    first, second = 20 * randn(n, seed=n, device=device), randn(n, seed=n + 1, device=device)
    p.grad = first
    opt.step()
    before = p.detach().clone()
    p.grad = second
    opt.step()
    c = BETAS[0] * (1 - BETAS[1]) * first.double() + (1 - BETAS[0]) * second.double()
    way = torch.where(c * second > 0, c.sign(), 0.0).cpu()
    return (before - p.detach()).double().cpu() / LR, way


def cautious(make: Make, device: str) -> Outcome:
    """Weights stay where the update's sign is not the gradient's. The others move by lr, or by lr
    times n / (1 + those that move), the paper's, or n over those that move, its code's."""
    moved, way = _cautious_move(make, device, 40)
    moving = way.abs().sum().item()
    for scale, name in ((1.0, "by lr"), (40 / (moving + 1), "paper"), (40 / moving, "code")):
        if torch.allclose(moved, way * scale, atol=1e-3):
            return True, name
    return False, percent((moved.sign() != way).double().mean().item())


def cautious_rescaled(make: Make, device: str) -> Outcome:
    """Where the class knows the word "rescaled", and not any word: the paper's n / (1 + those that
    move), of each tensor's n."""
    if takes(make, cautious="no such word") or not takes(make, cautious="rescaled"):
        return None, "no such option"

    def rescaled(params: object, **options: object) -> torch.optim.Optimizer:
        return make(params, **options, cautious="rescaled")

    off = 0.0
    for n in (10, 40, 1111):
        moved, way = _cautious_move(rescaled, device, n)
        off = max(off, (moved - way * n / (way.abs().sum() + 1)).abs().max().item())
    return off < 1e-3, f"off by {off:.1g} lr"


def cautious_decay(make: Make, device: str) -> Outcome:
    """Decay acts where it does not work against the update (arXiv:2510.12402)."""
    p = torch.nn.Parameter(randn(1000, seed=0, device=device))
    before = p.detach().double().cpu()
    opt = make([p], **{**OPTIONS, "weight_decay": 10.0})
    p.grad = randn(1000, seed=1, device=device)
    opt.step()
    sign = p.grad.double().cpu().sign()
    wanted = before * torch.where(sign * before >= 0, 1 - 10 * LR, 1.0) - LR * sign
    off = (p.detach().double().cpu() - wanted).abs().max().item()
    return off < 1e-5, f"error {off:.0e}"
