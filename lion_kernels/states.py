"""What an optimizer keeps beside its parameters: momenta and compensations, in the memory layout of
their parameters. Knows no steps and no other library.

Keys: "exp_avg"; "exp_avg_scale", the scales of an int8 one; "compensation". Parameters that are
DTensors have DTensors as state, so that each rank saves its shard.
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops, kernels
from lion_kernels.layout import MOMENTUM_BLOCK, blocks_of
from lion_kernels.reference import dequantize, quantize


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


def check_not_capturing(device: torch.device) -> None:
    """A zero that is made while a graph is captured is made again by every replay."""
    if kernels.is_capturing(device):
        raise RuntimeError(kernels.WARM_UP)


def _zero_scales(p: Any) -> Tensor:
    """A scale for every block of the parameter. Of a DTensor: as many on every rank as the largest
    shard has blocks, so that the scales are a DTensor too."""
    if not is_distributed(p):
        return torch.zeros(blocks_of(p.numel()), dtype=torch.float32, device=p.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape, cuts = list(p.shape), []
    for n_ranks, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // n_ranks)
        cuts.append(Shard(0) if placement.is_shard() else Replicate())
    blocks = blocks_of(torch.Size(shape).numel())
    scales = torch.zeros(blocks, dtype=torch.float32, device=local(p).device)
    return DTensor.from_local(scales, p.device_mesh, cuts, run_check=False)


def scales_of(state: dict[str, Tensor]) -> Tensor:
    """The scales of an int8 momentum as the ops take them."""
    scales, blocks = local(state["exp_avg_scale"]), blocks_of(local(state["exp_avg"]).numel())
    return scales if scales.numel() == blocks else scales[:blocks]


def read_momentum(state: dict[str, Tensor]) -> Tensor:
    """This rank's momentum as floats, shaped and strided as it is."""
    m = local(state["exp_avg"])
    return dequantize(m, scales_of(state)) if m.dtype == torch.int8 else m


def float32_momentum(state: dict[str, Tensor]) -> Tensor:
    """A copy of this rank's momentum in float32, or complex64."""
    m = read_momentum(state)
    return m.clone() if m.is_complex() else m.to(torch.float32, copy=True)


def write_momentum(state: dict[str, Tensor], p: Tensor, value: Tensor) -> None:
    """Store float values of any strides into this rank's momentum."""
    m = local(state["exp_avg"])
    if m.dtype == torch.int8:
        q, scales = quantize(torch.empty_like(local(p), dtype=torch.float32).copy_(value))
        m.copy_(q)
        scales_of(state).copy_(scales)
    else:
        m.copy_(value)


def zeros(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A state tensor of a parameter, in its memory layout."""
    check_not_capturing(p.device)
    return torch.zeros_like(p, dtype=dtype)


def keep_layout(state: dict[str, Tensor], p: Tensor) -> None:
    """Follow a parameter whose memory format changed after its state was made."""
    here = local(p)
    for key in ("exp_avg", "compensation"):
        if key not in state or local(state[key]).stride() == here.stride() or not is_dense(here):
            continue
        before = {**state}
        moved = zeros(p, state[key].dtype)
        if key == "exp_avg" and moved.dtype == torch.int8:
            state.update(exp_avg=moved, exp_avg_scale=_zero_scales(p))
            write_momentum(state, p, read_momentum(before))
        else:
            local(moved).copy_(local(state[key]))
            state[key] = moved


def make_momentum(state: dict[str, Tensor], p: Tensor, dtype: torch.dtype | None) -> None:
    """Add a momentum of zeros where there is none."""
    if "exp_avg" not in state:
        state["exp_avg"] = zeros(p, dtype)
        if dtype == torch.int8:
            state["exp_avg_scale"] = _zero_scales(p)


def compensation(state: dict[str, Tensor], p: Tensor) -> Tensor:
    """What compensated rounding keeps beside a parameter, made where it is missing; empty for a
    storage type that drops nothing."""
    dtype = _ops.low_dtype(p.dtype)
    if dtype is None:
        return torch.empty(0, device=p.device)
    if "compensation" not in state:
        state["compensation"] = zeros(p, dtype)
    return local(state["compensation"])


def check_scales(q: Tensor, scales: Tensor, where: str) -> None:
    """The largest element of a block is +-127: scales that are not those of ``q`` are noticed."""
    sizes = q.as_strided((q.numel(),), (1,)).abs()  # of -128 in int8: -128
    blocks = torch.nn.functional.pad(sizes, (0, -q.numel() % MOMENTUM_BLOCK))
    top = blocks.view(-1, MOMENTUM_BLOCK).amax(1) if q.numel() > 0 else scales
    if scales.dtype != torch.float32 or not torch.equal(top == 127, scales > 0):
        raise ValueError(
            f"the exp_avg_scale of {where} is not that of its int8 exp_avg: they were saved with "
            "another memory format or other shards; an export_state_dict() loads anywhere"
        )


def load_momentum(state: dict[str, Tensor], p: Tensor, saved: dict[str, Tensor]) -> None:
    """Copy a saved momentum into the one of ``state``, bit for bit where the dtype is the same."""
    m, source = local(state["exp_avg"]), local(saved["exp_avg"])
    if m.dtype == source.dtype == torch.int8 and m.stride() == source.stride():
        m.copy_(source)
        scales_of(state).copy_(scales_of(saved))
    else:
        write_momentum(state, p, read_momentum(saved))


def load_compensation(state: dict[str, Tensor], p: Tensor, saved: dict[str, Tensor]) -> None:
    """Copy a saved compensation that is of this parameter's kind; any other is left."""
    low, dtype = saved.get("compensation"), _ops.low_dtype(p.dtype)
    if low is not None and low.dtype == dtype:
        state["compensation"] = zeros(p, dtype)
        local(state["compensation"]).copy_(local(low))
