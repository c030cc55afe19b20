"""int8 momenta in plain PyTorch: what each byte and each scale means.

A leaf. Runs where states are converted, loaded and saved, and for parameters in float64; the
kernels compute the same. Knows no optimizer, no state and no DTensor.
"""

import torch
from torch import Tensor

from .dense import like_storage, storage_order

# Consecutive elements of a tensor's storage that share the scale of an int8 momentum.
MOMENTUM_BLOCK = 128
# A float32, as the kernels hold it.
_STEP = torch.tensor(1 / 127**2, dtype=torch.float32, device="cpu").item()


def blocks_of(n_elements: int) -> int:
    """Scales of an int8 momentum of ``n_elements``."""
    return -(-n_elements // MOMENTUM_BLOCK)


def in_blocks(flat: Tensor) -> Tensor:
    """Elements in storage order as (blocks, 128), padded with zeros."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % MOMENTUM_BLOCK))
    return padded.view(-1, MOMENTUM_BLOCK)


def quantize(m: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 momentum as int8 of the same strides, and the float32 scale of each block of 128
    elements of its storage, its largest magnitude: q = 127 * sqrt(|m| / scale),
    to nearest, with the sign of m; -128 where m is not finite, which takes no part in the scale."""
    flat = storage_order(m)
    finite = flat.isfinite()
    blocks = in_blocks(torch.where(finite, flat.abs(), 0))
    scale = blocks.amax(1) if m.numel() > 0 else m.new_empty(0)
    # A number over a tensor would be the tensor's reciprocal times the number: two roundings.
    steps = torch.full_like(scale, 127).div(torch.where(scale > 0, scale, 1).sqrt())
    q = (blocks.sqrt() * steps.unsqueeze(1)).round().flatten()[: m.numel()]
    q = torch.where(finite, q.copysign(flat), -128).to(torch.int8)
    return like_storage(q, m), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 momentum of an int8 one: scale * (|q| / 127)**2 * sign(q), NaN where q = -128."""
    flat = storage_order(q).float()
    m = flat * flat.abs() * _STEP * scale.repeat_interleave(MOMENTUM_BLOCK)[: q.numel()]
    return like_storage(torch.where(flat == -128, torch.nan, m), q)


def read_momentum(m: Tensor, scale: Tensor | None) -> Tensor:
    """A momentum of any storage dtype as floats: itself where it is no int8 one."""
    return m if m.dtype != torch.int8 or scale is None else dequantize(m, scale)


def write_momentum(m: Tensor, scale: Tensor | None, value: Tensor) -> None:
    """Store floats of any strides into a momentum and, where it is int8, its block scales."""
    if m.dtype != torch.int8 or scale is None:
        m.copy_(value)
    else:
        q, new_scale = quantize(torch.empty_like(m, dtype=torch.float32).copy_(value))
        m.copy_(q)
        scale.copy_(new_scale)
