"""Tensors that stand for others: DTensors, of which one shard lies here, and wrappers, which have
no storage of their own.

A leaf. Says what lies here, makes a DTensor of it again, and how the block scales of an int8
momentum are cut. Imports torch.distributed only where a DTensor is made; knows no process group and
no optimizer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .int8 import blocks_of


def is_distributed(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; imports nothing of torch.distributed."""
    return hasattr(t, "to_local")


def is_wrapper(t: Tensor) -> bool:
    """Whether ``t`` has no storage of its own, as torchao's quantised weights: a tensor subclass
    around other tensors, and no DTensor."""
    return hasattr(t, "__tensor_flatten__") and not is_distributed(t)


def has_storage(t: Tensor) -> bool:
    """Whether ``t`` is an ordinary tensor, whose elements lie in a storage of its own."""
    is_ordinary = not (is_distributed(t) or is_wrapper(t) or t.is_quantized)
    return is_ordinary and t.layout == torch.strided and t.device.type != "meta"


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor whose dimensions lie in the order of those of ``t``."""
    return torch.empty_like(t, device="meta").stride() if has_storage(t) else ()


def local(t: Any) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return t.to_local() if is_distributed(t) else t


def local_like(t: Any, p: Any) -> Tensor:
    """This rank's part of ``t``, cut as ``p`` is: a gradient of a replicated parameter may be a sum
    that is still to be made."""
    if is_distributed(t) and t.placements != p.placements:
        t = t.redistribute(placements=p.placements)
    return local(t)


def cut_of(t: Any) -> Any:
    """How a DTensor is cut; None for any other tensor."""
    return (t.device_mesh, t.placements) if is_distributed(t) else None


def cut_as(p: Any, shard: Tensor) -> Tensor:
    """``shard`` as this rank's part of a DTensor that is cut as ``p`` is; itself where ``p`` is
    none."""
    if not is_distributed(p):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def scales_like(p: Any) -> tuple[list[int], Sequence[Any]]:
    """The shape of an int8 momentum's block scales, one for every block; for a DTensor the global
    shape and its placements. They are cut where ``p`` is: (cuts of each dimension, blocks of the
    largest shard), so that those of another cut have another shape."""
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


def zero_scales(p: Any) -> Tensor:
    """The block scales of a zero int8 momentum of ``p``, cut as ``scales_like`` says."""
    shape, placements = scales_like(p)
    block_scales = torch.zeros(shape[-1], dtype=torch.float32, device=p.device)
    if not is_distributed(p):
        return block_scales
    from torch.distributed.tensor import DTensor

    here = block_scales.view(*[1] * p.dim(), -1)
    return DTensor.from_local(here, p.device_mesh, placements, run_check=False)
