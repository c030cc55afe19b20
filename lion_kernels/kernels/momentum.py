"""How momenta are read as float32 and stored again: as they are, or int8 with a scale for every 128
elements. The bits are those of csrc/momentum_rows.h; every program has whole blocks.
"""

import triton
import triton.language as tl

from lion_kernels.kernels import bits

BLOCK = tl.constexpr(128)
STEPS = tl.constexpr(127.0)
NOT_FINITE = tl.constexpr(-128.0)
# Added to it, a float32 keeps no fraction, rounded to nearest even.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _scale_ptr(row, start, TILE: tl.constexpr):
    block = tl.arange(0, TILE // BLOCK)
    return bits.pointer(row, bits.SCALE, start // BLOCK, tl.float32, True) + block, BLOCK * block


@triton.jit
def load_momentum(row, ptr, start, left, M: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    m = bits.load(ptr, left, TILE, MASKED)
    if M == tl.int8:
        scale_ptr, first = _scale_ptr(row, start, TILE)
        scale = tl.load(scale_ptr, mask=first < left, other=0.0)
        bad = m == NOT_FINITE
        square = tl.reshape(m * tl.abs(m) * 6.200012400024801e-05, (TILE // BLOCK, BLOCK))
        m = tl.reshape(square * scale[:, None], (TILE // 32, 32))
        m = tl.where(bad, float("nan"), m)
    return m


@triton.jit
def store_momentum(
    row, ptr, start, left, m, M: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    if M == tl.int8:
        scale_ptr, first = _scale_ptr(row, start, TILE)
        finite = tl.abs(m) < float("inf")
        size = tl.reshape(tl.where(finite, tl.abs(m), 0.0), (TILE // BLOCK, BLOCK))
        scale = tl.max(size, 1)
        tl.store(scale_ptr, scale, mask=first < left)
        # The roots of all float32, subnormals too, are normal numbers: nothing here can overflow.
        root = tl.sqrt_rn(tl.where(scale > 0, scale, 1.0))
        steps = tl.div_rn(STEPS + tl.zeros_like(root), root)
        q = (tl.sqrt_rn(size) * steps[:, None] + WHOLE) - WHOLE
        q = tl.reshape(q, (TILE // 32, 32))
        m = tl.where(finite, tl.where(m < 0, -q, q), NOT_FINITE)
    bits.store(ptr, m, left, M, TILE, MASKED)
