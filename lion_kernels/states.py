"""What an optimizer keeps beside its parameters: momenta and compensations, in the memory layout of
their parameters. Knows no steps and no other library.

Keys: "exp_avg"; "exp_avg_scale", the scales of an int8 one; "compensation". Parameters that are
DTensors have DTensors as state, so that each rank saves its shard.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops, kernels
from lion_kernels.layout import MOMENTUM_BLOCK, blocks_of
from lion_kernels.reference import read_momentum, write_momentum


def is_dense(t: Tensor) -> bool:
    """Whether ``t`` occupies one run of storage without gaps or overlaps, in any order."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def is_distributed(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; imports nothing of torch.distributed."""
    return hasattr(t, "to_local")


def local(t: Any) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return t.to_local() if is_distributed(t) else t


def cut_as(p: Any, shard: Tensor) -> Tensor:
    """``shard`` as this rank's part of a DTensor that is cut as ``p`` is; itself where ``p`` is
    none."""
    if not is_distributed(p):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def local_like(t: Any, p: Any) -> Tensor:
    """This rank's part of ``t``, cut as ``p`` is: a gradient of a replicated parameter may be a sum
    that is still to be made."""
    if is_distributed(t) and t.placements != p.placements:
        t = t.redistribute(placements=p.placements)
    return local(t)


def check_not_capturing(device: torch.device) -> None:
    """A zero that is made while a graph is captured is made again by every replay."""
    if kernels.is_capturing(device):
        raise RuntimeError(kernels.WARM_UP)


def _scales_like(p: Any) -> tuple[list[int], Sequence[Any]]:
    """The shape of the scales of an int8 momentum, one for every block; for a DTensor the global
    shape and its placements. They are cut where ``p`` is: (cuts of each dimension, blocks of the
    largest shard), so that scales of another cut have another shape."""
    if not is_distributed(p):
        return [blocks_of(p.numel())], ()
    from torch.distributed.tensor import Replicate, Shard

    shape, cuts = list(p.shape), [1] * p.dim()
    placements: list[Any] = []
    for n_ranks, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_replicate():
            placements.append(Replicate())
        else:
            cuts[placement.dim] *= n_ranks
            shape[placement.dim] = -(-shape[placement.dim] // n_ranks)
            placements.append(Shard(placement.dim))
    return [*cuts, blocks_of(torch.Size(shape).numel())], placements


def _zero_scales(p: Any) -> Tensor:
    shape, placements = _scales_like(p)
    check_not_capturing(p.device)
    scales = torch.zeros(shape[-1], dtype=torch.float32, device=p.device)
    if not is_distributed(p):
        return scales
    from torch.distributed.tensor import DTensor

    here = scales.view(*[1] * p.dim(), -1)
    return DTensor.from_local(here, p.device_mesh, placements, run_check=False)


def scales_of(state: dict[str, Tensor]) -> Tensor:
    """The scales of an int8 momentum as the ops take them."""
    scales, blocks = state["exp_avg_scale"], blocks_of(local(state["exp_avg"]).numel())
    return local(scales).flatten()[:blocks] if is_distributed(scales) else scales


def _parts(state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """This rank's momentum, and its scales where it is int8."""
    m = local(state["exp_avg"])
    return m, scales_of(state) if m.dtype == torch.int8 else None


def float32_momentum(state: dict[str, Tensor]) -> Tensor:
    """A copy of this rank's momentum in float32, or complex64."""
    m = read_momentum(*_parts(state))
    return m.clone() if m.is_complex() else m.to(torch.float32, copy=True)


def _zeros(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    check_not_capturing(p.device)
    return torch.zeros_like(p, dtype=dtype)


def _fits(t: Tensor, p: Tensor, dtype: torch.dtype) -> bool:
    """Whether a state tensor has its dtype and the memory layout of its parameter, whose memory
    format may have changed."""
    here = local(p)
    return t.dtype == dtype and (local(t).stride() == here.stride() or not is_dense(here))


def momentum(state: dict[str, Tensor], p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """This rank's momentum in a storage dtype (None: the parameter's), made where it is missing,
    made anew where it does not fit."""
    dtype = p.dtype if dtype is None else dtype
    if "exp_avg" not in state or not _fits(state["exp_avg"], p, dtype):
        before = dict(state)
        state["exp_avg"] = _zeros(p, dtype)
        state.pop("exp_avg_scale", None)
        if dtype == torch.int8:
            state["exp_avg_scale"] = _zero_scales(p)
        if "exp_avg" in before:
            write_momentum(*_parts(state), read_momentum(*_parts(before)))
    return local(state["exp_avg"])


def compensation(state: dict[str, Tensor], p: Tensor) -> Tensor:
    """What compensated rounding keeps beside this rank's parameter, made where it is missing; empty
    for a storage type that drops nothing."""
    dtype = _ops.low_dtype(p.dtype)
    if dtype is None:
        return torch.empty(0, device=p.device)
    before = state.get("compensation")
    if before is None or not _fits(before, p, dtype):
        state["compensation"] = _zeros(p, dtype)
        if before is not None:
            local(state["compensation"]).copy_(local(before))
    return local(state["compensation"])


# Blocks go by storage: another memory format, or other shards, have others.
_RECUT = (
    "an int8 momentum loads into the memory format and the shards that it was saved from, an "
    "export_state_dict() anywhere"
)


def check_scales(q: Tensor, scales: Tensor | None, p: Tensor, where: str) -> None:
    """Raise ValueError unless ``scales`` can be those of the saved int8 momentum ``q``: they have
    its cut, and where a block has a scale, its largest element is +-127."""
    shape, placements = _scales_like(p)
    if (
        scales is None
        or not is_dense(local(q))
        or scales.dtype != torch.float32
        or list(scales.shape) != shape
        or tuple(getattr(scales, "placements", ())) != tuple(placements)
    ):
        raise ValueError(
            f"the int8 exp_avg of {where} must be dense and have a float32 exp_avg_scale of shape "
            f"{tuple(shape)}, got {None if scales is None else tuple(scales.shape)}: {_RECUT}"
        )
    flat = scales_of({"exp_avg": q, "exp_avg_scale": scales})
    sizes = local(q).as_strided((local(q).numel(),), (1,)).abs()  # of -128 in int8: -128
    blocks = torch.nn.functional.pad(sizes, (0, -sizes.numel() % MOMENTUM_BLOCK))
    top = blocks.view(-1, MOMENTUM_BLOCK).amax(1) if sizes.numel() > 0 else flat
    if not (flat.isfinite().all() and torch.equal(top == 127, flat > 0)):
        raise ValueError(f"the exp_avg_scale of {where} is not that of its int8 exp_avg: {_RECUT}")


def load_momentum(
    state: dict[str, Tensor], p: Tensor, dtype: torch.dtype | None, saved: dict[str, Tensor]
) -> None:
    """Add the momentum of a saved state, bit for bit where its dtype is the same."""
    m, source = momentum(state, p, dtype), local(saved["exp_avg"])
    if m.dtype == source.dtype == torch.int8 and m.stride() == source.stride():
        m.copy_(source)
        scales_of(state).copy_(scales_of(saved))
    else:
        write_momentum(*_parts(state), read_momentum(*_parts(saved)))


def load_compensation(state: dict[str, Tensor], p: Tensor, saved: dict[str, Tensor]) -> None:
    """Copy a saved compensation that is of this parameter's kind; any other is left."""
    low, dtype = saved.get("compensation"), _ops.low_dtype(p.dtype)
    if low is not None and low.dtype == dtype:
        compensation(state, p).copy_(local(low))
