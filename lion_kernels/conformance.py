"""What users expect of a Lion, as a suite that runs against any implementation of it:

    python -m lion_kernels.conformance lion_kernels:Lion lion_pytorch:Lion --device cpu

Each check builds the optimizer on small tensors, steps it, and compares with Lion's formula
(arXiv:2302.06675, Algorithm 2) in float64, written out here: it uses no part of lion_kernels, so
that it can judge it too. Exit status 1 where a check fails.
"""

import argparse
import ast
import copy
import importlib
import io
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Builds the optimizer of parameters; options are lr, betas and weight_decay.
Make = Callable[..., torch.optim.Optimizer]
# Whether it passed (None: not asked on this device), and a figure.
Outcome = tuple[bool | None, str]

LR, BETAS, WD = 1e-2, (0.9, 0.99), 0.3


def _randn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen).to(device, dtype)


class _Twin:
    """Lion in float64, on flat copies."""

    def __init__(self, p: Tensor, lr: float = LR, wd: float = WD) -> None:
        self.p, self.lr, self.wd = p.detach().double().cpu().clone(), lr, wd
        self.m = torch.zeros_like(self.p)

    def step(self, g: Tensor) -> None:
        g = g.detach().double().cpu()
        c = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * c.sign()
        self.m = BETAS[1] * self.m + (1 - BETAS[1]) * g

    def signs_wrong(self, p: Tensor) -> float:
        """The share of elements that are off by more than half an update."""
        return (((p.detach().double().cpu() - self.p).abs() > self.lr / 2).double().mean()).item()


def formula(make: Make, device: str) -> Outcome:
    """Ten steps in float32, weight decay included."""
    p = torch.nn.Parameter(_randn(5000, seed=0, device=device))
    opt, twin = make([p], lr=LR, betas=BETAS, weight_decay=WD), _Twin(p)
    for i in range(10):
        p.grad = _randn(5000, seed=1 + i, device=device)
        twin.step(p.grad)
        opt.step()
    error = (p.detach().double().cpu() - twin.p).abs().max().item()
    return error < 1e-5, f"error {error:.0e}"


def zero_gradient(make: Make, device: str) -> Outcome:
    """sign(0) is 0: nothing moves without a gradient, a momentum and a decay."""
    p = torch.nn.Parameter(_randn(1000, seed=0, device=device))
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


def memory_layouts(make: Make, device: str) -> Outcome:
    """A channels_last parameter with a contiguous gradient, a transposed one, one with gaps."""
    base = _randn(4, 6, 5, 3, seed=0, device=device)
    room = _randn(40, 20, seed=1, device=device)
    tensors = [base.to(memory_format=torch.channels_last), room.clone().t(), room[:, ::2]]
    params = [torch.nn.Parameter(t) for t in tensors]
    opt = make(params, lr=LR, betas=BETAS, weight_decay=WD)
    twins = [_Twin(p) for p in params]
    for i in range(3):
        for k, p in enumerate(params):
            p.grad = _randn(*p.shape, seed=10 * i + k, device=device)
            twins[k].step(p.grad)
        opt.step()
    wrong = max(twin.signs_wrong(p) for twin, p in zip(twins, params, strict=True))
    return wrong == 0, f"{100 * wrong:.2g} % wrong"


def surroundings(make: Make, device: str) -> Outcome:
    """The gradient, and the bytes beside a parameter in its storage, stay as they are."""
    room = _randn(3000, seed=0, device=device)
    before = room.clone()
    p = torch.nn.Parameter(room[501:2502])
    opt = make([p], lr=LR, betas=BETAS, weight_decay=WD)
    p.grad = _randn(2001, seed=1, device=device)
    grad = p.grad.clone()
    opt.step()
    beside = torch.equal(room[:501], before[:501]) and torch.equal(room[2502:], before[2502:])
    kept = torch.equal(p.grad, grad)
    return beside and kept, f"storage {'kept' if beside else 'WRITTEN'}, gradient " + (
        "kept" if kept else "WRITTEN"
    )


def odd_tensors(make: Make, device: str) -> Outcome:
    """No gradient, no elements, no dimensions, and sizes around powers of two."""
    sizes = [(0,), (), (1,), (31,), (1025,)]
    params = [torch.nn.Parameter(_randn(*s, seed=i, device=device)) for i, s in enumerate(sizes)]
    idle = torch.nn.Parameter(_randn(7, seed=9, device=device))
    before, twins = idle.detach().clone(), [_Twin(p) for p in params]
    opt = make([*params, idle], lr=LR, betas=BETAS, weight_decay=WD)
    for p, twin in zip(params, twins, strict=True):
        p.grad = _randn(*p.shape, seed=3, device=device)
        twin.step(p.grad)
    opt.step()
    wrong = sum(t.signs_wrong(p) > 0 for t, p in zip(twins, params, strict=True) if p.numel())
    left = torch.equal(idle.detach(), before)
    return wrong == 0 and left, f"{wrong} wrong" + ("" if left else ", moved without gradient")


def not_a_number(make: Make, device: str) -> Outcome:
    """After one NaN gradient, an element shows it or goes on; a silent freeze or drift fails."""
    p = torch.nn.Parameter(torch.ones(100, device=device))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    for i in range(4):
        p.grad = torch.ones_like(p)
        if i == 1:
            p.grad[7] = torch.nan
        opt.step()
    others = torch.cat([p.detach()[:7], p.detach()[8:]])
    if not torch.allclose(others, torch.full_like(others, 1 - 4 * LR)):
        return False, "spreads"
    moved = (1.0 - p[7].item()) / LR
    if p[7].isnan():
        return True, "shows"
    return 2.5 < moved < 3.5, "goes on" if 2.5 < moved < 3.5 else f"silent, {moved:.0f} of 3 steps"


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


def resume(make: Make, device: str) -> Outcome:
    """Through torch.save and load, the same bits as without."""

    def run(saved: bool) -> Tensor:
        p = torch.nn.Parameter(_randn(500, seed=0, device=device))
        opt = make([p], lr=LR, betas=BETAS, weight_decay=WD)
        for i in range(6):
            if saved and i == 3:
                file = io.BytesIO()
                torch.save(opt.state_dict(), file)
                file.seek(0)
                opt = make([p], lr=LR, betas=BETAS, weight_decay=WD)
                opt.load_state_dict(torch.load(file, weights_only=False))
            p.grad = _randn(500, seed=i, device=device)
            opt.step()
        return p.detach()

    same = torch.equal(run(True), run(False))
    return same, "bit for bit" if same else "differs"


def graph(make: Make, device: str) -> Outcome:
    """A captured step, replayed with new gradients."""
    if not device.startswith("cuda"):
        return None, "needs a GPU"
    p = torch.nn.Parameter(_randn(5000, seed=0, device=device))
    opt, twin = make([p], lr=LR, betas=BETAS, weight_decay=WD), _Twin(p)
    p.grad = _randn(5000, seed=1, device=device)
    twin.step(p.grad)
    opt.step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        opt.step()
    for i in range(3):
        p.grad.copy_(_randn(5000, seed=2 + i, device=device))
        twin.step(p.grad)
        captured.replay()
    wrong = twin.signs_wrong(p)
    return wrong == 0, f"{100 * wrong:.2g} % wrong"


CHECKS: dict[str, Callable[[Make, str], Outcome]] = {
    "the formula, float32": formula,
    "sign(0) is 0": zero_gradient,
    "weight decay, float32": partial(decay, torch.float32),
    "weight decay, bfloat16": partial(decay, torch.bfloat16),
    "weight decay, float16": partial(decay, torch.float16),
    "bfloat16: small decay acts": small_decay,
    "bfloat16: small updates act": small_update,
    "memory layouts": memory_layouts,
    "gradient and storage untouched": surroundings,
    "None, empty, 0-d, odd sizes": odd_tensors,
    "one NaN gradient": not_a_number,
    "lr read in every step": live_lr,
    "resume": resume,
    "CUDA graph": graph,
}


def judge(make: Make, device: str) -> dict[str, Outcome]:
    """Every check's outcome; one that raises failed."""
    outcomes: dict[str, Outcome] = {}
    for name, check in CHECKS.items():
        try:
            outcomes[name] = check(make, device)
        except Exception as error:  # whatever an implementation raises is a result
            lines = str(error).strip().splitlines() or [""]
            outcomes[name] = False, f"{type(error).__name__}: {lines[0][:60]}"
    return outcomes


def maker(target: str, kwargs: dict[str, Any]) -> Make:
    """What builds ``module:Class`` with ``kwargs``."""
    module, _, name = target.partition(":")
    if not name:
        sys.exit(f"a Lion is named as module:Class, got {target!r}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        sys.exit(f"{target} cannot be imported: {error}")
    return lambda params, **options: cls(params, **options, **copy.deepcopy(kwargs))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lion_kernels.conformance")
    parser.add_argument("lion", nargs="+", help="module:Class, one or several")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="for every class named"
    )
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda needs a CUDA device, and torch has none")
    if wrong := [text for text in args.kwargs if "=" not in text]:
        sys.exit(f"--kwargs takes KEY=VALUE, got {wrong[0]!r}")
    kwargs = {key: _literal(value) for key, _, value in (t.partition("=") for t in args.kwargs)}
    found = {target: judge(maker(target, kwargs), args.device) for target in args.lion}
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [
        [name, *(f"{words[o[name][0]]}: {o[name][1]}" for o in found.values())] for name in CHECKS
    ]
    passed = [sum(ok is True for ok, _ in o.values()) for o in found.values()]
    asked = [sum(ok is not None for ok, _ in o.values()) for o in found.values()]
    rows.append(["passed", *(f"{p} of {a}" for p, a in zip(passed, asked, strict=True))])
    try:
        from tabulate import tabulate
    except ImportError:
        for row in [["", *found], *rows]:
            print("\t".join(row))
    else:
        print(tabulate(rows, headers=["", *found], disable_numparse=True, tablefmt="github"))
    return int(passed != asked)


if __name__ == "__main__":
    sys.exit(main())
