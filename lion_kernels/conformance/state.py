"""Checks of what an optimizer keeps: saved and loaded bit for bit, with what others keep beside it,
into another memory format, into another library, and as shards of a DTensor.
"""

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .common import (
    BETAS,
    LR,
    OPTIONS,
    Make,
    Outcome,
    Twin,
    percent,
    randn,
    random_gradient,
    saved_and_loaded,
    slack,
    spelled,
    takes,
    walk,
)
from .options import uneven


def resume(dtype: torch.dtype, make: Make, device: str) -> Outcome:
    """Through torch.save and load, the same bits as without; the options loaded are the saved
    ones, as in torch.optim."""

    def run(saved: bool) -> Tensor:
        torch.manual_seed(0)
        p = torch.nn.Parameter(randn(500, seed=0, device=device, dtype=dtype))
        opt = make([p], lr=1e-3, betas=BETAS, weight_decay=0.1)
        for i in range(12):
            if saved and i == 6:
                state = saved_and_loaded(opt.state_dict())
                opt = make([p], lr=1.0, betas=BETAS, weight_decay=0.0)
                opt.load_state_dict(state)
            p.grad = randn(500, seed=i, device=device, dtype=dtype)
            opt.step()
        return p.detach()

    same = torch.equal(run(True), run(False))
    return same, "bit for bit" if same else "differs"


def unknown_keys(make: Make, device: str) -> Outcome:
    """Whatever a wrapper keeps beside a parameter's state, at the top of the state or in a group
    is loaded again: ScheduleFree and Lookahead keep weights there."""
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt, twin = make([p], **OPTIONS), Twin(p)
    walk(opt, [p], [twin], random_gradient(device), range(2))
    slow = randn(50, seed=5, device=device)
    opt.state[p].update(slow_weights=slow, since=3)
    opt.state["wrapper"] = {"weight_sum": 1.5}  # type: ignore[index]
    opt.param_groups[0]["initial_lr"] = 0.5
    state = saved_and_loaded(opt.state_dict())
    opt = make([p], **OPTIONS)
    opt.load_state_dict(state)
    kept = {
        "a parameter's tensor": torch.equal(opt.state[p].get("slow_weights", slow[:0]), slow),
        "a parameter's number": opt.state[p].get("since") == 3,
        "the top level's": opt.state.get("wrapper") == {"weight_sum": 1.5},  # type: ignore[call-overload]
        "the group's": opt.param_groups[0].get("initial_lr") == 0.5,
    }
    wrong = walk(opt, [p], [twin], random_gradient(device), range(2, 5))
    lost = [name for name, is_kept in kept.items() if not is_kept]
    if wrong:
        return False, percent(wrong)
    return not lost, "kept" if not lost else f"lost: {', '.join(lost)}"


def rolled_back(make: Make, device: str) -> Outcome:
    """An earlier state, loaded into the optimizer that went on from it, is where it goes on again;
    a state that was cleared starts anew."""
    p = torch.nn.Parameter(randn(300, seed=0, device=device))
    opt, twin, gradient = make([p], **OPTIONS), Twin(p), random_gradient(device)
    walk(opt, [p], [twin], gradient, range(3))
    state, at, twin_then = saved_and_loaded(opt.state_dict()), p.detach().clone(), twin
    twin = copy.deepcopy(twin)
    walk(opt, [p], [twin], gradient, range(3, 6))
    opt.load_state_dict(state)
    with torch.no_grad():
        p.copy_(at)
    back = walk(opt, [p], [twin_then], gradient, range(6, 9))
    opt.state.clear()
    twin_then.m.zero_()
    anew = walk(opt, [p], [twin_then], gradient, range(9, 12))
    return back == anew == 0, f"back {percent(back)}, anew {percent(anew)}"


def by_hand(make: Make, device: str) -> Outcome:
    """A momentum that somebody wrote, or replaced by another tensor, is the one that is used."""
    p = torch.nn.Parameter(randn(300, seed=0, device=device))
    opt, twin, gradient = make([p], **OPTIONS), Twin(p), random_gradient(device)
    wrong = 0.0
    for i in range(0, 9, 3):
        wrong = max(wrong, walk(opt, [p], [twin], gradient, range(i, i + 3)))
        twin.m.zero_()
        state = opt.state[p]
        for key, t in state.items():
            if isinstance(t, Tensor) and t.shape == p.shape:
                state[key] = t.zero_() if i == 0 else torch.zeros_like(t)
    return wrong == 0, percent(wrong)


def copies(make: Make, device: str) -> Outcome:
    """A deep copy of parameters and optimizer goes the same way, and apart from the original."""
    p = torch.nn.Parameter(randn(200, seed=0, device=device))
    opt, twin = make([p], **OPTIONS), Twin(p)
    walk(opt, [p], [twin], random_gradient(device), range(2))
    q, other = copy.deepcopy((p, opt))
    twin_of_q, at = copy.deepcopy(twin), p.detach().clone()
    wrong = walk(other, [q], [twin_of_q], random_gradient(device), range(2, 4))
    apart = torch.equal(p.detach(), at)
    wrong = max(wrong, walk(opt, [p], [twin], random_gradient(device), range(4, 6)))
    return wrong == 0 and apart, percent(wrong) if apart else "the original moves too"


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous()
    return {k: _contiguous(v) for k, v in value.items()} if isinstance(value, dict) else value


def memory_format(make: Make, device: str) -> Outcome:
    """A state that was saved beside a transposed parameter, loaded beside a contiguous one, also
    where something between made its tensors contiguous: right, or refused."""

    def gradient(number: int) -> Tensor:
        return uneven((77, 101), number, device, falls=2.0).t()

    outcomes = []
    for made_contiguous in (False, True):
        p = torch.nn.Parameter(torch.zeros(77, 101, device=device).t())
        opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
        twin = Twin(p, wd=0.0)
        walk(opt, [p], [twin], lambda number, _: gradient(number), range(8))
        state, allowed = saved_and_loaded(opt.state_dict()), slack(opt)
        if made_contiguous:
            state = {**state, "state": _contiguous(state["state"])}
        p = torch.nn.Parameter(torch.zeros(101, 77, device=device))
        opt, twin.p = make([p], lr=LR, betas=BETAS, weight_decay=0.0), torch.zeros(101, 77).double()
        try:
            opt.load_state_dict(state)
        except ValueError:
            outcomes.append(0.0)
            continue
        # One step, against the momentum as often as not.
        p.grad = -gradient(3) / 5
        twin.step(p.grad)
        opt.step()
        outcomes.append(twin.signs_wrong(p))
    return max(outcomes) <= allowed, percent(max(outcomes))


def own_storage(make: Make, device: str) -> Outcome:
    """A momentum_dtype given to the constructor is that of the optimizer after a load too: a
    checkpoint written without it must not double the memory."""
    if not takes(make, momentum_dtype="bfloat16"):
        return None, "no such option"

    def stepped(opt: torch.optim.Optimizer, p: Tensor) -> int:
        p.grad = randn(512, seed=1, device=device)
        opt.step()
        tensors = [t for t in opt.state[p].values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    p = torch.nn.Parameter(randn(512, seed=0, device=device))
    whole = make([p], **OPTIONS)
    stepped(whole, p)
    state = saved_and_loaded(whole.state_dict())
    small = make([p], **OPTIONS, momentum_dtype="bfloat16")
    fresh = stepped(make([p], **OPTIONS, momentum_dtype="bfloat16"), p)
    small.load_state_dict(state)
    loaded = stepped(small, p)
    return loaded == fresh, f"{loaded} bytes of {fresh}"


def own_rounding(make: Make, device: str) -> Outcome:
    """Stochastic rounding that the constructor was asked for is not switched off by a state that
    was saved without it: the weights of the resumed run would stand still, unseen."""
    rounded = spelled(make, "stochastic")
    if rounded is None:
        return None, "no such option"
    p = torch.nn.Parameter(torch.full((4096,), 0.5, device=device, dtype=torch.bfloat16))
    opt = make([p], lr=1e-4, betas=BETAS, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    opt.step()
    state, before = saved_and_loaded(opt.state_dict()), p.detach().double().mean().item()
    opt = rounded([p], lr=1e-4, betas=BETAS, weight_decay=0.0)
    opt.load_state_dict(state)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        opt.step()
    moved = before - p.detach().double().mean().item()
    return abs(moved - 0.01) < 1e-3, f"moved {moved:.4f} of 0.01"


# Of a class that exports its state: (name of the layout, module, class, options).
PEERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("lion-pytorch", "lion_pytorch", "Lion", {}),
    ("optimi", "optimi", "Lion", {}),
    ("bitsandbytes", "bitsandbytes.optim", "Lion", {}),
)


def _nearest_codes(state: dict[str, Tensor], m: Tensor) -> bool:
    """Whether each 8-bit code of bitsandbytes stands for the value of its map nearest to m."""
    scale = state["absmax1"].cpu().repeat_interleave(256)[: m.numel()].double()
    values = state["qmap1"].cpu().double()
    of_all = (values[None, :] * scale[:, None] - m.flatten().double()[:, None]).abs()
    chosen = of_all.gather(1, state["state1"].cpu().flatten().long()[:, None])
    return bool((chosen.flatten() <= of_all.amin(1) + 1e-6 * scale).all())


def exports(make: Make, device: str) -> Outcome:
    """Where the class has ``export_state_dict``: the libraries installed here load the state, and
    go on from bfloat16 weights with its momentum; 8-bit codes are the nearest."""
    p = torch.nn.Parameter(randn(5000, seed=0, device=device).to(torch.bfloat16))
    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
    if not hasattr(opt, "export_state_dict"):
        return None, "no such method"
    for i in range(3):
        p.grad = 20 * randn(5000, seed=i, device=device).to(torch.bfloat16)
        opt.step()
    m = opt.export_state_dict("google")["state"][0]["exp_avg"].cpu()
    g = randn(5000, seed=9, device=device).to(torch.bfloat16)
    c = BETAS[0] * m.double() + (1 - BETAS[0]) * g.double().cpu()
    asked, wrong = [], []
    for library, module, name, options in PEERS:
        try:
            peer = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        q = torch.nn.Parameter(torch.zeros_like(p))
        other = peer([q], lr=LR, betas=BETAS, weight_decay=0.0, **options)
        other.load_state_dict(opt.export_state_dict(library))
        q.grad = g.clone()
        other.step()
        # What a bfloat16 momentum of the peer's own rounds away may turn a sign.
        off = (q.detach().double().cpu().sign() != -c.sign()).double().mean().item()
        asked.append(library)
        wrong += [library] if off > 0.01 else []
        if library == "bitsandbytes":
            asked.append("bitsandbytes-8bit")
            state = opt.export_state_dict("bitsandbytes-8bit")["state"][0]
            wrong += [] if _nearest_codes(state, m) else asked[-1:]
    if not asked:
        return None, "none of them is installed"
    return not wrong, f"{len(asked)} load" if not wrong else f"wrong: {', '.join(wrong)}"


@contextmanager
def _pretended_group(size: int) -> Iterator[None]:
    """A process group of which only this rank exists: nothing travels."""
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def shards(make: Make, device: str) -> Outcome:
    """Parameters that are DTensors, cut by rows or by columns as fully_shard cuts them: a rank's
    shard goes its way without the others, and its state is saved and loaded."""
    from torch import distributed as dist

    if not dist.is_available() or dist.is_initialized():
        return None, "needs a process of its own"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    wrong = 0.0
    with _pretended_group(4):
        mesh = init_device_mesh(device.split(":")[0], (4,))
        for dim in (0, 1):

            def cut(t: Tensor, dim: int = dim) -> Tensor:
                return DTensor.from_local(t, mesh, [Shard(dim)], run_check=False)

            here = torch.zeros(40, 60, device=device)
            p = torch.nn.Parameter(cut(here))
            twin = Twin(torch.zeros(40, 60), wd=0.0)
            opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
            for i in range(8):
                if i == 4:
                    state = copy.deepcopy(opt.state_dict())
                    opt = make([p], lr=LR, betas=BETAS, weight_decay=0.0)
                    opt.load_state_dict(state)
                g, before = uneven((40, 60), i, device), here.double().cpu()
                p.grad, exact = cut(g), twin.p
                twin.step(g)
                opt.step()
                moved = here.double().cpu() - before
                n_off = (~((moved - (twin.p - exact)).abs() < LR / 2)).double().mean().item()
                wrong = max(wrong, n_off)
    return wrong <= slack(opt), percent(wrong)
