"""Checks of ``fused_backward``, where a class has it: parameters step during backward, and their
gradients are freed.
"""

import gc

import torch
from torch import Tensor

from .common import (
    OPTIONS,
    Make,
    Outcome,
    Twin,
    percent,
    randn,
    slack,
    takes,
)

ABSENT: Outcome = (None, "no such option")


def _loss(p: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient."""
    g = randn(*p.shape, seed=seed, device=str(p.device))
    return (p * g).sum(), g


def path(make: Make, device: str) -> Outcome:
    """Backward and step() together are a step, and leave no gradient; an optimizer that is built
    again on the same parameters is the only one that steps them."""
    if not takes(make, fused_backward=True):
        return ABSENT
    p = torch.nn.Parameter(randn(500, seed=0, device=device))
    former = make([p], **OPTIONS, fused_backward=True)
    opt, twin, is_freed = make([p], **OPTIONS, fused_backward=True), Twin(p), True
    for i in range(4):
        loss, g = _loss(p, 1 + i)
        loss.backward()
        opt.step()
        twin.step(g)
        is_freed = is_freed and p.grad is None
    del former  # alive until here, as one in a notebook is
    wrong = twin.signs_wrong(p)
    return wrong <= slack(opt) and is_freed, percent(wrong) + ("" if is_freed else ", not freed")


def end(make: Make, device: str) -> Outcome:
    """When the optimizer is gone, so are its hooks: backward leaves weights and gradients."""
    if not takes(make, fused_backward=True):
        return ABSENT
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt = make([p], **OPTIONS, fused_backward=True)
    del opt
    gc.collect()
    before, (loss, _) = p.detach().clone(), _loss(p, 1)
    loss.backward()
    kept = torch.equal(p.detach(), before) and p.grad is not None
    n_hooks = len(p._post_accumulate_grad_hooks or {})
    return kept and n_hooks == 0, f"{n_hooks} hooks left" if kept else "still steps"


def scaler(make: Make, device: str) -> Outcome:
    """With a GradScaler, which looks at gradients after backward, it is refused before anything
    moved."""
    if not takes(make, fused_backward=True):
        return ABSENT
    p = torch.nn.Parameter(randn(50, seed=0, device=device))
    opt, before = make([p], **OPTIONS, fused_backward=True), p.detach().clone()
    amp = torch.amp.GradScaler(device.split(":")[0], init_scale=2.0**12)
    try:
        amp.scale(_loss(p, 1)[0]).backward()
        amp.step(opt)
    except Exception as error:  # whatever a class says no with
        kept = torch.equal(p.detach(), before)
        return kept, f"{type(error).__name__}, {'nothing' if kept else 'something'} moved"
    return False, "taken"
