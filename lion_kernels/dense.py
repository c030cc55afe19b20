"""How a tensor lies in its storage: gaps, overlaps, and the order of its elements there. A leaf:
knows shapes and strides, no optimizer, no op and no tensor that stands for others.
"""

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


def storage_order(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its storage."""
    return t.as_strided((t.numel(),), (1,))


def like_storage(flat: Tensor, like: Tensor) -> Tensor:
    """Elements in storage order, shaped and strided as the dense tensor ``like``."""
    return flat.as_strided(like.size(), like.stride())
