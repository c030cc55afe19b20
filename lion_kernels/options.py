"""What the optimizers' param groups mean: the rules of their options, and what of them the ops
take. Knows no state and no steps.
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops

CHOICES = {"rounding": _ops.ROUNDINGS, "nonfinite": ("propagate", "skip")}
MOMENTUM_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _ops.MOMENTUM_DTYPES}


def _momentum_name(value: torch.dtype | str | None) -> str | None:
    """The name, which every kind of checkpoint can hold."""
    name = value if isinstance(value, str) else str(value).removeprefix("torch.")
    if value is not None and name not in MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype must be None or one of {', '.join(MOMENTUM_DTYPES)}, got {value!r}"
        )
    return None if value is None else name


def momentum_dtype(group: dict[str, Any]) -> torch.dtype | None:
    """The storage of the group's momenta; None: its parameters' own."""
    name = _momentum_name(group["momentum_dtype"])
    return None if name is None else MOMENTUM_DTYPES[name]


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is out of its range; write momentum_dtype as its
    name, and the first lr that independent_weight_decay needs."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}")
    elif not lr >= 0.0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be a pair, got {group['betas']}")
    for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")
    group["momentum_dtype"] = _momentum_name(group["momentum_dtype"])
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {group[name]!r}")
    if group["cautious"] not in (False, True, "rescaled"):
        raise ValueError(f'cautious must be False, True or "rescaled", got {group["cautious"]!r}')
    if group["independent_weight_decay"]:
        # Not "initial_lr": that key belongs to torch's schedulers.
        if "reference_lr" not in group:  # read once: a tensor may lie on a device
            group["reference_lr"] = lr.item() if isinstance(lr, Tensor) else lr
        first = group["reference_lr"]
        if not first > 0.0:
            raise ValueError(f"independent_weight_decay needs an initial lr above 0, got {first}")


def weight_decay(group: dict[str, Any]) -> float:
    """What the ops multiply with lr."""
    if group["independent_weight_decay"]:
        return group["weight_decay"] / group["reference_lr"]
    return group["weight_decay"]


def lr_tensor(group: dict[str, Any]) -> Tensor:
    """The group's lr as the 0-d tensor that the ops take."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
