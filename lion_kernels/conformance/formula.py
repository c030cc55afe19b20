"""Checks of the arithmetic: the path of the weights against Lion's formula in float64, for every
kind of number, for every group's own options, and to the last bit where that can be asked.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .common import (
    BETAS,
    LR,
    OPTIONS,
    WD,
    Make,
    Outcome,
    Twin,
    percent,
    randn,
    random_gradient,
    slack,
    takes,
    walk,
)


def formula(make: Make, device: str) -> Outcome:
    """Ten steps in float32, weight decay included."""
    p = torch.nn.Parameter(randn(5000, seed=0, device=device))
    opt, twin = make([p], **OPTIONS), Twin(p)
    walk(opt, [p], [twin], random_gradient(device), range(10))
    error = twin.error(p)
    return error < 1e-5, f"error {error:.0e}"


def zero_gradient(make: Make, device: str) -> Outcome:
    """sign(0) is 0: nothing moves without a gradient, a momentum and a decay."""
    p = torch.nn.Parameter(randn(1000, seed=0, device=device))
    before = p.detach().clone()
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    opt.step()
    moved = (p.detach() != before).double().mean().item()
    return moved == 0, f"{100 * moved:.0f} % move"


def decay(dtype: torch.dtype, make: Make, device: str) -> Outcome:
    """Decoupled decay of 3 % a step, twenty steps, no gradient."""
    p = torch.nn.Parameter(torch.ones(1000, device=device, dtype=dtype))
    opt = make([p], lr=0.1, betas=BETAS, weight_decay=WD)
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        opt.step()
    got, exact = p.detach().double().mean().item(), (1 - 0.1 * WD) ** 20
    return abs(got - exact) < 0.02 * exact, f"{got:.3f} of {exact:.3f}"


def small_decay(make: Make, device: str) -> Outcome:
    """bfloat16, 1000 steps of 1e-4, which rounding to nearest loses."""
    p = torch.nn.Parameter(torch.ones(4096, device=device, dtype=torch.bfloat16))
    opt = make([p], lr=1e-4, betas=BETAS, weight_decay=1.0)
    for _ in range(1000):
        p.grad = torch.zeros_like(p)
        opt.step()
    got, exact = p.detach().double().mean().item(), (1 - 1e-4) ** 1000
    return abs(got - exact) < 0.01 * exact, f"{got:.3f} of {exact:.3f}"


def small_update(make: Make, device: str) -> Outcome:
    """bfloat16 weights of 0.5, 100 updates of 1e-4."""
    p = torch.nn.Parameter(torch.full((4096,), 0.5, device=device, dtype=torch.bfloat16))
    opt = make([p], lr=1e-4, betas=BETAS, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        opt.step()
    moved = 0.5 - p.detach().double().mean().item()
    return abs(moved - 0.01) < 0.001, f"moved {moved:.4f} of 0.01"


def rounding_bias(make: Make, device: str) -> Outcome:
    """A step of 16-bit weights is neither cut off nor rounded away from zero: to nearest and at
    random the mean error is 0, cut off it is half a last place."""
    biases = {}
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        p = torch.nn.Parameter(randn(20000, seed=0, device=device, dtype=dtype))
        twin, opt = Twin(p, lr=0.05), make([p], **{**OPTIONS, "lr": 0.05})
        p.grad = randn(20000, seed=1, device=device, dtype=dtype)
        twin.step(p.grad)
        opt.step()
        exact = twin.p.abs()
        last_place = torch.exp2(exact.log2().floor() - (bits - 1))
        off = (p.detach().double().cpu() * twin.p.sign() - exact) / last_place
        biases[str(dtype).removeprefix("torch.")] = off[exact > 0.01].mean().item()
    figure = ", ".join(f"{name} {bias:+.2f}" for name, bias in biases.items())
    return all(abs(bias) < 0.05 for bias in biases.values()), figure


def float64(make: Make, device: str) -> Outcome:
    """float64 parameters move in float64 arithmetic, by signs that float32 cannot tell."""
    p = torch.nn.Parameter(randn(1000, seed=0, device=device, dtype=torch.float64))
    opt, twin = make([p], **OPTIONS), Twin(p)
    close = 1 + 1e-10 * randn(1000, seed=1, device=device, dtype=torch.float64)
    # After one step of `close`, a gradient that leaves of c only what 1 + 1e-10 has beside 1.
    beta1, beta2 = BETAS
    balance = torch.full_like(close, -beta1 * (1 - beta2) / (1 - beta1))
    for g in (close, balance, close, balance):
        p.grad = g
        twin.step(g)
        opt.step()
    walk(opt, [p], [twin], random_gradient(device), range(5))
    error = twin.error(p)
    return error < 1e-12, f"error {error:.0e}"


def complex_numbers(make: Make, device: str) -> Outcome:
    """complex64 and complex128 parameters move as pairs of real ones."""
    params = [
        torch.nn.Parameter(randn(500, seed=0, device=device, dtype=dtype))
        for dtype in (torch.complex64, torch.complex128)
    ]
    opt, twins = make(params, **OPTIONS), [Twin(p) for p in params]
    wrong = walk(opt, params, twins, random_gradient(device), range(5))
    return wrong == 0, percent(wrong)


def momentum_precision(make: Make, device: str) -> Outcome:
    """The momentum of float32 weights is as exact, and reaches as far, as float32: sixty steps
    with gradients of 1e-6, 1 and 1e6."""
    sizes = torch.tensor([1e-6, 1.0, 1e6], device=device).repeat_interleave(1000)
    p = torch.nn.Parameter(torch.zeros(3000, device=device))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    twin, gradient = Twin(p, wd=0.0), random_gradient(device)
    walk(opt, [p], [twin], lambda i, p: sizes * (gradient(i, p) + 0.3), range(60))
    wrong = twin.signs_wrong(p)
    return wrong < 2e-3, percent(wrong)


def maximize(make: Make, device: str) -> Outcome:
    """Where the class has ``maximize``, it goes up, and leaves the gradient as it is."""
    if not takes(make, maximize=True):
        return None, "no such option"
    p = torch.nn.Parameter(randn(1000, seed=0, device=device))
    opt, twin = make([p], **OPTIONS, maximize=True), Twin(p)
    kept = True
    for i in range(4):
        g = randn(1000, seed=1 + i, device=device)
        p.grad = g.clone()
        twin.step(-g)
        opt.step()
        kept = kept and torch.equal(p.grad, g)
    wrong = twin.signs_wrong(p)
    return wrong <= slack(opt) and kept, percent(wrong) + ("" if kept else ", gradient WRITTEN")


def live_lr(make: Make, device: str) -> Outcome:
    """The lr of the param group is read in every step."""
    p = torch.nn.Parameter(torch.zeros(10, device=device))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    for lr in (LR, LR / 2, LR / 4):
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        opt.step()
    moved = -p.detach().double().mean().item() / LR
    return abs(moved - 1.75) < 1e-3, f"{moved:.2f} of 1.75"


def tensor_lr(make: Make, device: str) -> Outcome:
    """An lr that is a tensor, where the constructor takes one, and is filled as schedulers do."""
    if not takes(make, lr=torch.tensor(LR)):
        return None, "refused"
    p = torch.nn.Parameter(torch.zeros(10, device=device))
    opt = make([p], lr=torch.tensor(LR), betas=BETAS, weight_decay=0.0)
    for lr in (LR, LR / 2, LR / 4):
        group_lr = opt.param_groups[0]["lr"]
        if isinstance(group_lr, Tensor):
            group_lr.fill_(lr)
        else:
            opt.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        opt.step()
    moved = -p.detach().double().mean().item() / LR
    return abs(moved - 1.75) < 1e-3, f"{moved:.2f} of 1.75"


def written_in_place(make: Make, device: str) -> Outcome:
    """Where an option may be a tensor, and the group holds that tensor, what is written into it
    between steps counts from the next step on."""
    asked, unseen = [], []
    for name, now, later in (("lr", (LR,), (LR / 4,)), ("weight_decay", (WD,), (10.0,)),
                             ("betas", BETAS, (0.5, 0.7))):  # fmt: skip
        tensors = tuple(torch.tensor(x, dtype=torch.float64) for x in now)
        value = tensors if name == "betas" else tensors[0]
        p = torch.nn.Parameter(randn(500, seed=0, device=device))
        twin, gradient = Twin(p), random_gradient(device)
        try:
            opt = make([p], **{**OPTIONS, name: value})
            works = walk(opt, [p], [twin], gradient, range(3)) == 0
        except Exception:  # whatever a class says no with
            continue
        if not works or opt.param_groups[0].get(name) is not value:
            continue
        for t, x in zip(tensors, later, strict=True):
            t.fill_(x)
        setattr(
            twin, {"weight_decay": "wd"}.get(name, name), later if name == "betas" else later[0]
        )
        asked.append(name)
        unseen += [name] if walk(opt, [p], [twin], gradient, range(3, 9)) else []
    if not asked:
        return None, "no tensors taken"
    return not unseen, f"unseen: {', '.join(unseen)}" if unseen else f"seen: {', '.join(asked)}"


def groups(make: Make, device: str) -> Outcome:
    """Each group has its own lr, betas and decay; one is added later, and one parameter has a
    gradient in every other step only."""
    own: list[dict[str, Any]] = [
        {"lr": LR, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        {"lr": 3 * LR, "weight_decay": 0.5, "betas": (0.5, 0.9)},
        {"lr": LR / 2, "weight_decay": 2.0, "betas": (0.95, 0.98)},
    ]
    params = [torch.nn.Parameter(randn(600, seed=k, device=device)) for k in range(3)]
    twins = [
        Twin(p, lr=o["lr"], wd=o["weight_decay"], betas=o["betas"])
        for p, o in zip(params, own, strict=True)
    ]
    pairs = list(zip(params, own, strict=True))
    opt = make([{"params": [p], **o} for p, o in pairs[:2]], **OPTIONS)
    for i in range(12):
        if i == 4:
            opt.add_param_group({"params": [params[2]], **own[2]})
        for k, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = None
            if (k == 1 and i % 2 == 0) or (k == 2 and i < 4):
                continue
            p.grad = randn(600, seed=10 * i + k, device=device)
            twin.step(p.grad)
        opt.step()
    wrong = [twin.signs_wrong(p) for twin, p in zip(twins, params, strict=True)]
    n_wrong = sum(w > slack(opt) for w in wrong)
    return n_wrong == 0, f"{n_wrong} of 3 wrong"


def threads(make: Make, device: str) -> Outcome:
    """On a CPU, three threads give the bits that one gives, however the tensors are cut."""
    if device != "cpu":
        return None, "of CPUs"

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(randn(n, seed=n, device=device)) for n in (131_105, 7, 40_000)]
        opt = make(params, **OPTIONS)
        for i in range(3):
            for k, p in enumerate(params):
                # Gradients of very different sizes, so that a block's neighbours show in it.
                sizes = 10.0 ** -(torch.arange(p.numel()) // 32 % 7)
                p.grad = sizes * randn(p.numel(), seed=10 * i + k, device=device)
            opt.step()
        return [p.detach() for p in params]

    before = torch.get_num_threads()
    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    apart = sum(int((a != b).sum()) for a, b in zip(one, three, strict=True))
    return apart == 0, "bit for bit" if apart == 0 else f"{apart} elements differ"


def _float32(x: Fraction) -> float:
    """The float32 that is nearest to ``x``, of two the one with an even last place."""
    near = torch.tensor(float(x), dtype=torch.float32)
    down, up = (torch.nextafter(near, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    bits = {t.item(): int(t.view(torch.int32)) & 1 for t in (down, near, up)}
    return min(bits, key=lambda value: (abs(Fraction(value) - x), bits[value]))


def fused(make: Make, device: str) -> Outcome:
    """Where p * (1 - lr * weight_decay) - lr * sign(c) is rounded once, it is so everywhere: also
    where what is rounded lies within 1e-30 of the middle between two float32."""

    def step(p0: Tensor, lr: float, wd: float) -> tuple[list[float], list[float], list[float]]:
        """What an optimizer makes of weights; rounded once; each operation rounded."""
        p, signs = torch.nn.Parameter(p0.clone().to(device)), torch.ones_like(p0)
        signs[::3] = -1.0
        p.grad = signs.to(device)
        make([p], lr=lr, betas=BETAS, weight_decay=wd).step()
        kept = Fraction(torch.tensor(1 - lr * wd, dtype=torch.float32).item())
        rate = Fraction(torch.tensor(lr, dtype=torch.float32).item())
        once = [
            _float32(Fraction(x) * kept - rate * int(s))
            for x, s in zip(p0.tolist(), signs.tolist(), strict=True)
        ]
        each = [
            _float32(Fraction(_float32(Fraction(x) * kept)) - rate * int(s))
            for x, s in zip(p0.tolist(), signs.tolist(), strict=True)
        ]
        return p.tolist(), once, each

    got, once, each = step(randn(150, seed=0, device="cpu"), 1e-3, WD)
    if got != once:
        return None, "each operation rounded" if got == each else "not asked of this arithmetic"
    # Three quarters of these lie in the middle between two float32.
    middles = 1 + torch.arange(1, 300, 2, dtype=torch.float32) * 2.0**-23
    got, once, _ = step(middles, 2.0**-100, 2.0**98)
    wrong = sum(a != b for a, b in zip(got, once, strict=True))
    return wrong == 0, f"{wrong} of 150 rounded twice"
