"""How a tensor lies in its storage, and what stands between it and its storage: gaps, overlaps,
shards, wrappers. A leaf: knows no optimizer and no op.
"""

from typing import Any

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Whether ``t`` occupies one run of storage without gaps or overlaps, in any order."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def overlaps(t: Tensor) -> bool:
    """Whether two elements of ``t`` share a place in its storage, as in an expanded tensor or in
    overlapping windows. Exact: strides that do not tell are tried out element by element."""
    if t.numel() < 2 or is_dense(t):
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride == 0:
                return True
            if stride <= reach:
                places = torch.arange(_span(t)).as_strided(t.shape, t.stride())
                return places.unique().numel() < t.numel()
            reach += stride * (size - 1)
    return False


def _span(t: Tensor) -> int:
    """Elements of storage from the first of ``t`` to its last."""
    return 1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))


def is_distributed(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; imports nothing of torch.distributed."""
    return hasattr(t, "to_local")


def is_wrapper(t: Tensor) -> bool:
    """Whether ``t`` has no storage of its own, as torchao's quantised weights: a tensor subclass
    around other tensors, and no DTensor."""
    return hasattr(t, "__tensor_flatten__") and not is_distributed(t)


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


def has_storage(t: Tensor) -> bool:
    """Whether ``t`` is an ordinary tensor, whose elements lie in a storage of its own."""
    is_ordinary = not (is_distributed(t) or is_wrapper(t) or t.is_quantized)
    return is_ordinary and t.layout == torch.strided and t.device.type != "meta"


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor whose dimensions lie in the order of those of ``t``."""
    return torch.empty_like(t, device="meta").stride() if has_storage(t) else ()


def storage_order(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its storage."""
    return t.as_strided((t.numel(),), (1,))


def like_storage(flat: Tensor, like: Tensor) -> Tensor:
    """Elements in storage order, shaped and strided as the dense tensor ``like``."""
    return flat.as_strided(like.size(), like.stride())
