"""Checks of torch.optim's contract, beside the arithmetic: which tensors are taken, what is written
and what is not, what a step returns, what a constructor refuses, and how a GradScaler is served.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    walk,
)


def memory_layouts(make: Make, device: str) -> Outcome:
    """A channels_last parameter with a contiguous gradient, a transposed one, one with gaps."""
    base = randn(4, 6, 5, 3, seed=0, device=device)
    room = randn(40, 20, seed=1, device=device)
    tensors = [base.to(memory_format=torch.channels_last), room.clone().t(), room[:, ::2]]
    params = [torch.nn.Parameter(t) for t in tensors]
    opt, twins = make(params, **OPTIONS), [Twin(p) for p in params]
    wrong = walk(opt, params, twins, random_gradient(device), range(3))
    return wrong == 0, percent(wrong)


def surroundings(make: Make, device: str) -> Outcome:
    """The gradient, and the bytes beside a parameter in its storage, stay as they are."""
    room = randn(3000, seed=0, device=device)
    before = room.clone()
    p = torch.nn.Parameter(room[501:2502])
    opt = make([p], **OPTIONS)
    p.grad = randn(2001, seed=1, device=device)
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
    params = [torch.nn.Parameter(randn(*s, seed=i, device=device)) for i, s in enumerate(sizes)]
    idle = torch.nn.Parameter(randn(7, seed=9, device=device))
    before, twins = idle.detach().clone(), [Twin(p) for p in params]
    opt = make([*params, idle], **OPTIONS)
    for p, twin in zip(params, twins, strict=True):
        p.grad = randn(*p.shape, seed=3, device=device)
        twin.step(p.grad)
    opt.step()
    wrong = sum(t.signs_wrong(p) > 0 for t, p in zip(twins, params, strict=True) if p.numel())
    left = torch.equal(idle.detach(), before)
    return wrong == 0 and left, f"{wrong} wrong" + ("" if left else ", moved without gradient")


def foreign(make: Make, device: str) -> Outcome:
    """Frozen parameters of quantised and foreign types, without gradients beside an adapter that
    has one, are nobody's business: a model is handed over whole."""
    frozen = {
        "float32": torch.ones(8, device=device),
        "uint8": torch.ones(8, dtype=torch.uint8, device=device),
        "int8": torch.ones(8, dtype=torch.int8, device=device),
        "bool": torch.ones(8, dtype=torch.bool, device=device),
        "float8": torch.ones(8, device=device).to(torch.float8_e4m3fn),
        "float64": torch.ones(8, dtype=torch.float64, device=device),
        "sparse": torch.eye(4, device=device).to_sparse(),
        "overlapping": torch.ones(1, device=device).expand(8),
        "meta": torch.ones(8, device="meta"),
    }
    refused = []
    for name, tensor in frozen.items():
        adapter = torch.nn.Parameter(randn(300, seed=0, device=device))
        other, twin = torch.nn.Parameter(tensor, requires_grad=False), Twin(adapter)
        try:
            opt = make([other, adapter], **OPTIONS)
            walk(opt, [adapter], [twin], random_gradient(device), range(2))
            opt.load_state_dict(opt.state_dict())
            wrong = walk(opt, [adapter], [twin], random_gradient(device), range(2, 4))
            kept = name == "meta" or bool((other.to_dense() == tensor.to_dense()).all())
        except Exception:  # whatever a class says no with
            if name == "float32":
                raise
            wrong, kept = 1.0, True
        if name == "float32" and wrong:
            return False, percent(wrong)
        if wrong or not kept:
            refused.append(name)
    return not refused, "taken" if not refused else f"not {', '.join(refused)}"


def overlapping(make: Make, device: str) -> Outcome:
    """A parameter whose elements share memory, as sliding windows do, is refused before anything is
    written: every order of its elements would step to other weights."""
    room = randn(20, seed=0, device=device)
    before, p = room.clone(), torch.nn.Parameter(room.as_strided((9, 4), (2, 1)))
    try:
        opt = make([p], **OPTIONS)
        p.grad = torch.ones_like(p)
        opt.step()
    except Exception as error:  # whatever a class says no with
        kept = torch.equal(room, before)
        return kept, f"{type(error).__name__}, {'nothing' if kept else 'something'} written"
    return False, "stepped"


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


def sparse_gradient(make: Make, device: str) -> Outcome:
    """A sparse gradient is refused before anything is written, or steps as a dense one does."""
    params = [torch.nn.Parameter(randn(20, 3, seed=k, device=device)) for k in range(2)]
    before, twins = [p.detach().clone() for p in params], [Twin(p) for p in params]
    opt = make(params, **OPTIONS)
    dense = [randn(20, 3, seed=2 + k, device=device) for k in range(2)]
    dense[1][5:] = 0.0
    params[0].grad, params[1].grad = dense[0], dense[1].to_sparse()
    try:
        opt.step()
    except Exception as error:  # whatever a class says no with
        kept = all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
        return kept, f"{type(error).__name__}, {'nothing' if kept else 'half the list'} written"
    for twin, g in zip(twins, dense, strict=True):
        twin.step(g)
    wrong = max(t.signs_wrong(p) for t, p in zip(twins, params, strict=True))
    return wrong == 0, percent(wrong)


def version_counters(make: Make, device: str) -> Outcome:
    """What a step writes raises its version counter, so that a second backward over a graph of
    before the step is torch's error instead of a wrong gradient."""
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt = make([p], **OPTIONS)
    silent = set()
    for _ in range(2):
        loss = (p * p).sum()
        loss.backward(retain_graph=True)
        state = [t for t in opt.state[p].values() if isinstance(t, Tensor) and t.shape == p.shape]
        before = [(t, t._version, t.clone()) for t in state]
        opt.step()
        # A class may keep a new tensor instead of writing the old one.
        if any(t._version == v and not torch.equal(t, old) for t, v, old in before):
            silent.add("state")
        try:
            loss.backward()
            silent.add("parameter")
        except RuntimeError:
            pass
        opt.zero_grad()
    return not silent, "raised" if not silent else f"silent: {', '.join(sorted(silent))}"


def closures(make: Make, device: str) -> Outcome:
    """A closure is called once, with gradients enabled, and its loss is returned."""
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt, calls = make([p], **OPTIONS), []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss)
        return loss

    before, twin = p.detach().clone(), Twin(p)
    returned = opt.step(closure)  # type: ignore[arg-type]
    twin.step(2 * before)
    if len(calls) != 1:
        return False, f"called {len(calls)} times"
    if twin.signs_wrong(p) > 0:
        return False, "not stepped with its gradient"
    return returned is calls[0], "returned" if returned is calls[0] else "loss not returned"


def hooks(make: Make, device: str) -> Outcome:
    """Hooks before and after a step run once a step; a step without any gradient is harmless."""
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt, seen = make([p], **OPTIONS), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    before = p.detach().clone()
    opt.step()
    idle = torch.equal(p.detach(), before)
    p.grad = torch.ones_like(p)
    opt.step()
    once = seen == ["before", "after"] * 2
    figure = "once" if once else f"{len(seen)} calls of 4"
    return once and idle, figure + ("" if idle else ", moved without gradient")


WRONG: dict[str, dict[str, object]] = {
    "lr -1": {"lr": -1.0},
    "lr NaN": {"lr": float("nan")},
    "lr 'fast'": {"lr": "fast"},
    "beta1 1.2": {"betas": (1.2, 0.99)},
    "beta1 -0.1": {"betas": (-0.1, 0.99)},
    "beta2 1.2": {"betas": (0.9, 1.2)},
    "one beta": {"betas": (0.9,)},
    "decay -1": {"weight_decay": -1.0},
    "decay NaN": {"weight_decay": float("nan")},
}


def arguments(make: Make, device: str) -> Outcome:
    """What cannot be meant is a ValueError or TypeError of the constructor."""
    found: dict[str, list[str]] = {}
    for name, wrong in WRONG.items():
        try:
            make([torch.nn.Parameter(torch.zeros(2, device=device))], **{**OPTIONS, **wrong})
            found.setdefault("taken", []).append(name)
        except (ValueError, TypeError):
            pass
        except Exception as error:  # an assertion, which python -O takes out, or an accident
            found.setdefault(type(error).__name__, []).append(name)
    figures = [f"{how}: {', '.join(names)}" for how, names in found.items()]
    return not found, "refused" if not found else "; ".join(figures)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _scaled_steps(make: Make, device: str, after: Callable[[int, Tensor, Tensor], None]) -> Outcome:
    """Seven steps through a GradScaler, of which steps 0, 3 and 4 overflow; ``after(number, p,
    gradient)``. The path is that of the four others."""
    p = torch.nn.Parameter(randn(500, seed=0, device=device))
    opt, twin = make([p], **OPTIONS), Twin(p)
    scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=2.0**12)
    for i in range(7):
        g = randn(500, seed=1 + i, device=device)
        loss = (p * g).sum()
        if i in (0, 3, 4):
            loss = loss + (p[:3] * torch.inf).sum()
        else:
            twin.step(g)
        opt.zero_grad()
        scaler.scale(loss).backward()
        with _without_warnings():
            scaler.step(opt)
        scaler.update()
        if i not in (0, 3, 4):
            after(i, p, g)
    wrong = twin.signs_wrong(p)
    return wrong <= slack(opt), percent(wrong)


def scaled_path(make: Make, device: str) -> Outcome:
    """Through a GradScaler weights go the same way; a step that overflows moves nothing."""
    return _scaled_steps(make, device, lambda *_: None)


def scaled_gradient(make: Make, device: str) -> Outcome:
    """After a step through a GradScaler, the gradient that is left is the unscaled one."""
    factors = []

    def look(_: int, p: Tensor, g: Tensor) -> None:
        if p.grad is not None:
            factors.append((p.grad / g).abs().median().item())

    _scaled_steps(make, device, look)
    ok = all(abs(factor - 1) < 1e-3 for factor in factors)
    return ok, "unscaled" if ok else f"{max(factors):.0f} times"


def graph(make: Make, device: str) -> Outcome:
    """A captured step, replayed with new gradients."""
    if not device.startswith("cuda"):
        return None, "needs a GPU"
    p = torch.nn.Parameter(randn(5000, seed=0, device=device))
    opt, twin = make([p], lr=LR, betas=BETAS, weight_decay=WD), Twin(p)
    p.grad = randn(5000, seed=1, device=device)
    twin.step(p.grad)
    opt.step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        opt.step()
    for i in range(3):
        p.grad.copy_(randn(5000, seed=2 + i, device=device))
        twin.step(p.grad)
        captured.replay()
    wrong = twin.signs_wrong(p)
    return wrong == 0, percent(wrong)
