"""What an optimizer keeps beside its parameters: momenta and compensations, in the memory layout of
their parameters and on their devices. Knows no steps and no other library.

Keys: "exp_avg"; "exp_avg_scale", an int8 one's block scales; "compensation", in its parameter's
dtype: of a float16 parameter the value that is dropped, of a bfloat16 one the 16 bits, which no
collective would carry as integers. Parameters that are DTensors have DTensors as state, so that
each rank saves its shard.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..capture import check_not_capturing
from ..dense import is_dense, storage_order
from ..int8 import blocks_of, in_blocks, read_momentum, write_momentum
from ..shards import cut_of, is_distributed, local, scales_like, zero_scales

KEYS = ("exp_avg", "exp_avg_scale", "compensation")


def block_scales_of(state: dict[str, Tensor]) -> Tensor:
    """The block scales of an int8 momentum as the ops take them."""
    block_scales, blocks = state["exp_avg_scale"], blocks_of(local(state["exp_avg"]).numel())
    return local(block_scales).flatten()[:blocks] if is_distributed(block_scales) else block_scales


def _parts(state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """This rank's momentum, and its block scales where it is int8."""
    m = local(state["exp_avg"])
    return m, block_scales_of(state) if m.dtype == torch.int8 else None


def exact_momentum(state: dict[str, Tensor]) -> Tensor:
    """A copy of this rank's momentum in float32, or in its own dtype where that holds more."""
    m = read_momentum(*_parts(state))
    more = m.is_complex() or m.dtype == torch.float64
    return m.clone() if more else m.to(torch.float32, copy=True)


def _zeros(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    check_not_capturing(p.device)
    return torch.zeros_like(p, dtype=dtype)


def _lies_as(t: Tensor, p: Tensor) -> bool:
    """Whether a state tensor has the memory layout of its parameter, whose memory format may have
    changed."""
    here = local(p)
    return local(t).stride() == here.stride() or not is_dense(here)


def _follow(state: dict[str, Tensor], p: Tensor) -> None:
    """Move what is kept to the parameter's device."""
    for key in KEYS:
        if key in state and state[key].device != p.device:
            check_not_capturing(p.device)
            state[key] = state[key].to(p.device)


def momentum(state: dict[str, Tensor], p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """This rank's momentum in a storage dtype (None: the parameter's), made where it is missing,
    moved or converted where the parameter was."""
    dtype = p.dtype if dtype is None else dtype
    _follow(state, p)
    before = dict(state)
    if (
        "exp_avg" not in state
        or state["exp_avg"].dtype != dtype
        or not _lies_as(before["exp_avg"], p)
    ):
        state["exp_avg"] = _zeros(p, dtype)
        state.pop("exp_avg_scale", None)
        if dtype == torch.int8:
            state["exp_avg_scale"] = zero_scales(p)
        if "exp_avg" in before:
            write_momentum(*_parts(state), read_momentum(*_parts(before)))
    return local(state["exp_avg"])


def compensation(state: dict[str, Tensor], p: Tensor) -> Tensor:
    """What compensated rounding keeps beside this rank's parameter, as the ops take it, made where
    it is missing; empty for a storage type that drops nothing."""
    dtype = ops.low_dtype(p.dtype)
    if dtype is None:
        return torch.empty(0, dtype=torch.float32, device=p.device)
    _follow(state, p)
    before = state.get("compensation")
    if before is None or before.dtype != p.dtype:
        state["compensation"] = _zeros(p, p.dtype)
    elif not _lies_as(before, p):
        state["compensation"] = _zeros(p, p.dtype)
        local(state["compensation"]).copy_(local(before))
    return local(state["compensation"]).view(dtype)


def whole_parameter(state: dict[str, Tensor], p: Tensor) -> Tensor:
    """This rank's part of a parameter in float32, with its compensation: a new tensor."""
    low, whole = state.get("compensation"), local(p.detach()).to(torch.float32, copy=True)
    if low is None or low.dtype != p.dtype:
        return whole
    if p.dtype == torch.float16:
        return whole + local(low).float()
    return (whole.view(torch.int32) + local(low).view(torch.int16).int()).view(torch.float32)


def step_counter(group: dict[str, Any], device: torch.device) -> Tensor:
    """The group's counter of steps, which coins are hashed from: int64, 0-d, on ``device``."""
    step = group.get("step", 0)
    if not isinstance(step, Tensor):
        check_not_capturing(device)
        step = torch.tensor(int(step), dtype=torch.int64)
    if step.device != device:
        check_not_capturing(device)
        step = step.to(device)
    group["step"] = step
    return step


def check_fits(state: dict[str, Any], p: Tensor, where: str) -> None:
    """Raise ValueError where what is kept, or was saved, is not of the parameter's shape or is cut
    otherwise: a momentum is never broadcast."""
    for key in ("exp_avg", "compensation"):
        if key not in state:
            continue
        t = state[key]
        if not isinstance(t, Tensor) or t.shape != p.shape:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"the {key} of {where} must have shape {tuple(p.shape)}, got {got}")
        is_number = t.is_floating_point() or t.is_complex() or t.dtype in (torch.int8, torch.int16)
        if not is_number or (t.is_complex() and not p.is_complex()):
            raise ValueError(f"the {key} of {where} must hold floats, got {t.dtype}")
        cut, wanted = cut_of(t), cut_of(p)
        if cut != wanted:
            raise ValueError(
                f"the {key} of {where} must be cut as the parameter, {wanted or 'not at all'}, "
                f"got {cut or 'no DTensor'}"
            )
    if "exp_avg" in state and state["exp_avg"].dtype == torch.int8:
        _check_scales_fit(state["exp_avg"], state.get("exp_avg_scale"), p, where)


# Blocks go by storage: another memory format, or other shards, have others.
_RECUT = (
    "an int8 momentum loads into the memory format and the shards that it was saved from, an "
    "export_state_dict() anywhere"
)


def _check_scales_fit(q: Tensor, block_scales: Any, p: Tensor, where: str) -> None:
    shape, placements = scales_like(p)
    if (
        not isinstance(block_scales, Tensor)
        or not is_dense(local(q))
        or block_scales.dtype != torch.float32
        or list(block_scales.shape) != shape
        or tuple(getattr(block_scales, "placements", ())) != tuple(placements)
    ):
        got = tuple(block_scales.shape) if isinstance(block_scales, Tensor) else None
        raise ValueError(
            f"the int8 exp_avg of {where} must be dense and have a float32 exp_avg_scale of shape "
            f"{tuple(shape)}, got {got}: {_RECUT}"
        )


def check_scales(q: Tensor, block_scales: Tensor, where: str) -> None:
    """Raise ValueError unless ``block_scales``, which fit, can be those of the saved int8 momentum
    ``q``: where a block has a scale, its largest element is +-127."""
    flat = block_scales_of({"exp_avg": q, "exp_avg_scale": block_scales})
    sizes = storage_order(local(q)).abs()  # of -128 in int8: -128
    top = in_blocks(sizes).amax(1) if sizes.numel() > 0 else flat
    if not (flat.isfinite().all() and torch.equal(top == 127, flat > 0)):
        raise ValueError(f"the exp_avg_scale of {where} is not that of its int8 exp_avg: {_RECUT}")


def load_momentum(
    state: dict[str, Tensor], p: Tensor, dtype: torch.dtype | None, saved: dict[str, Tensor]
) -> None:
    """Add the momentum of a saved state, bit for bit where its dtype is the same."""
    m, source = momentum(state, p, dtype), local(saved["exp_avg"])
    if m.dtype == source.dtype == torch.int8 and m.stride() == source.stride():
        m.copy_(source)
        block_scales_of(state).copy_(block_scales_of(saved))
    else:
        write_momentum(*_parts(state), read_momentum(*_parts(saved)))


def load_compensation(state: dict[str, Tensor], p: Tensor, saved: dict[str, Tensor]) -> None:
    """Copy a saved compensation that is of this parameter's kind; any other is left."""
    low, dtype = saved.get("compensation"), ops.low_dtype(p.dtype)
    if low is None or dtype is None:
        return
    if low.dtype == torch.int16:  # until 0.1.0 that of a bfloat16 parameter was saved as integers
        low = local(low).view(torch.bfloat16)
    if low.dtype == p.dtype:
        compensation(state, p).copy_(local(low).view(dtype))
