"""What the optimizers' param groups and saved states mean: rules of the options, what of them the
ops take, and the tensors of a saved state, this library's or another's. Knows no steps.
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops

CHOICES = {"rounding": _ops.ROUNDINGS, "nonfinite": ("propagate", "skip")}
MOMENTUM_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _ops.STORAGE_DTYPES}


def _momentum_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = MOMENTUM_DTYPES.get(value) if isinstance(value, str) else value
    if value is not None and dtype not in _ops.STORAGE_DTYPES:
        raise ValueError(
            f"momentum_dtype must be None or one of {', '.join(MOMENTUM_DTYPES)}, got {value!r}"
        )
    return dtype


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError where a group's lr, betas or weight_decay is out of its range."""
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
    group["momentum_dtype"] = _momentum_dtype(group["momentum_dtype"])
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {group[name]!r}")
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


# Elements of a block of bitsandbytes' 8-bit states, newest first.
_BLOCKS = (256, 2048)


def _momentum_of_bitsandbytes(state: dict[str, Any], where: str) -> Tensor:
    """``state1`` as floats: 8-bit values index ``qmap1``, scaled by their block's maximum."""
    m = state["state1"]
    if m.dtype != torch.uint8:
        return m
    if "absmax1" not in state:
        raise ValueError(f"the 8-bit state1 of {where} must have qmap1 and absmax1")
    scales = state["absmax1"]
    block = next((b for b in _BLOCKS if -(-m.numel() // b) == scales.numel()), None)
    if block is None:
        raise ValueError(
            f"absmax1 of {where} must have an element for every {' or '.join(map(str, _BLOCKS))} "
            f"of {m.numel()}, got {scales.numel()}"
        )
    values = state["qmap1"][m.flatten().long()]
    return (values * scales.repeat_interleave(block)[: m.numel()]).view(m.shape)


def translated(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group with betas, which optimi keeps as two options."""
    if "betas" not in group and "beta1" in group and "beta2" in group:
        return {**group, "betas": (group["beta1"], group["beta2"])}
    return group


def saved_tensors(state: dict[str, Any], p: Tensor, where: str) -> dict[str, Tensor]:
    """The tensors of a parameter's saved state by this library's keys; raises ValueError where a
    shape is not the parameter's."""
    state = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
    found = {key: state[key] for key in ("exp_avg", "compensation") if state.get(key) is not None}
    if state.get("state1") is not None:
        found["exp_avg"] = _momentum_of_bitsandbytes(state, where)
    for key, tensor in found.items():
        if tensor.shape != p.shape:
            raise ValueError(
                f"the {key} of {where} must have shape {tuple(p.shape)}, got {tuple(tensor.shape)}"
            )
    return found
