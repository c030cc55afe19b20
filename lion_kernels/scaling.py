"""What a torch.amp.GradScaler says of a step, and how gradients are left. Knows no optimizer."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dense import overlaps


@dataclass(frozen=True)
class Scaling:
    """What gradients are divided by, and whether an infinity was found in them, each float32 of one
    element; None without a GradScaler."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Any) -> "Scaling":
        """What a GradScaler left at an optimizer for the step that it calls, and takes away when
        that has returned."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):
            # The sum of nothing, of a rank where no parameter has a gradient, is a number.
            params = [p for group in optimizer.param_groups for p in group["params"]]
            device = next((p.device for p in params if p.is_cuda), torch.device("cpu"))
            found_inf = torch.full((1,), float(found_inf), dtype=torch.float32, device=device)
        return cls(getattr(optimizer, "grad_scale", None), found_inf)

    def to(self, device: torch.device) -> "Scaling":
        if self.grad_scale is None and self.found_inf is None:
            return self
        scalars = (self.grad_scale, self.found_inf)
        return Scaling(*(None if t is None else t.to(device, non_blocking=True) for t in scalars))

    def unscale(self, params: Sequence[Tensor]) -> None:
        """Divide the gradients in their memory, as torch's fused optimizers leave them; those of a
        step that found an infinity stay. The step itself read them scaled, with all their bits."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in params if self.grad_scale is not None else ():
            if p.grad is None:
                continue
            if overlaps(p.grad):  # an expanded gradient cannot be written
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
            g = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
            by_device.setdefault(g.device, []).append(g)
        for device, grads in by_device.items():
            there = self.to(device)
            assert there.grad_scale is not None
            factor = there.grad_scale.double().reciprocal().float().reshape(1)
            if there.found_inf is not None:
                factor = torch.where(there.found_inf.reshape(1) == 0, factor, 1.0)
            infinities = torch.zeros(1, dtype=torch.float32, device=device)
            # GradScaler's own unscaling: in float32, whatever the gradients are stored in.
            torch._amp_foreach_non_finite_check_and_unscale_(grads, infinities, factor)


def is_asked_by_a_scaler() -> bool:
    """Whether the caller's caller is a method of a GradScaler. To others an optimizer that handles
    scaled gradients looks as if it needed a scaler: Lightning refuses to clip beside it."""
    asker = sys._getframe(2).f_locals.get("self")
    return isinstance(asker, torch.amp.GradScaler)
