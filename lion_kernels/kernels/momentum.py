"""How momenta are read as float32 and stored again: as they are, or int8 with a scale for every 128
elements. The bits are those of csrc/simd/int8.h; every program has whole blocks.
"""

import triton
import triton.language as tl

from . import bits

BLOCK = tl.constexpr(128)
STEPS = tl.constexpr(127.0)
# Added to it, a float32 keeps no fraction, rounded to nearest even; the low bits are the integer.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _scale_ptr(row, start, TILE: tl.constexpr):
    block = tl.arange(0, TILE // BLOCK)
    return bits.pointer(row, bits.SCALE, start // BLOCK, tl.float32, True) + block, BLOCK * block


@triton.jit
def _near_reciprocal_root(x):
    """1 / sqrt(x) within a few units in the last place, for x from 2^-87 on; 2^56 where x = 0."""
    return tl.rsqrt(x + 1.925929944387236e-34)  # 2^-112


@triton.jit
def _roots(x, reciprocal):
    """sqrt(x) rounded to nearest, and about 1 / (2 sqrt(x)); 0 and about 2^55 where x = 0.

    Goldschmidt's iteration. sqrt.rn has a branch for rare numbers, which every zero takes; this has
    none, and is exact: for all significands and reciprocals up to 6 units off, tried one by one."""
    root, half = x * reciprocal, 0.5 * reciprocal
    error = tl.fma(bits.negative(root), half, tl.full(x.shape, 0.5, tl.float32))
    root, half = tl.fma(root, error, root), tl.fma(half, error, half)
    return tl.fma(tl.fma(bits.negative(root), root, x), half, root), half


@triton.jit
def _steps_over(root, half):
    """127 / root, rounded to nearest, likewise; ``half`` is about 1 / (2 root)."""
    reciprocal = 2.0 * half
    one, steps = tl.full(root.shape, 1.0, tl.float32), tl.full(root.shape, STEPS, tl.float32)
    reciprocal = tl.fma(reciprocal, tl.fma(bits.negative(reciprocal), root, one), reciprocal)
    quotient = steps * reciprocal
    return tl.fma(tl.fma(bits.negative(quotient), root, steps), reciprocal, quotient)


@triton.jit
def load_momentum(row, ptr, start, left, M: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    if M == tl.bfloat16:
        # Widened by hand: where a new momentum or the old one is stored, the compiler would
        # otherwise round the new one before it chooses, one element at a time.
        raw = bits.load_raw(ptr.to(tl.pointer_type(tl.uint16)), left, TILE, MASKED)
        m = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif M == tl.int8:
        scale_ptr, first = _scale_ptr(row, start, TILE)
        scale = tl.load(scale_ptr, mask=first < left, other=0.0)
        # As the low bits of 2^23, for conversions have a slow pipe; -128 borrows and is a NaN.
        raw = bits.load_raw(ptr, left, TILE, MASKED).to(tl.int32) + 127
        q = (raw | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0
        square = tl.reshape(q * tl.abs(q) * 6.200012400024801e-05, (TILE // BLOCK, BLOCK))
        m = tl.reshape(square * scale[:, None], (TILE // 8, 8))
    else:
        m = bits.load(ptr, left, TILE, MASKED)
    return m


@triton.jit
def store_momentum(
    row, ptr, start, left, m, M: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    if M == tl.int8:
        scale_ptr, first = _scale_ptr(row, start, TILE)
        size = tl.reshape(tl.abs(m), (TILE // BLOCK, BLOCK))
        # 0 * size makes a NaN of an infinity: neither is a maximum.
        scale = tl.max(tl.fma(size, tl.zeros_like(size), size), 1)
        scale = tl.where(scale == scale, scale, 0.0)
        tl.store(scale_ptr, scale, mask=first < left)
        # Tiny blocks are lifted by 2^64, which no rounding sees. What stays below 2^-87 beside a
        # scale of 2^-60 or more is 0 of 127 steps, whether its root is exact or not.
        lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)
        top, size = scale * lift, size * lift[:, None]
        root, half = _roots(top, _near_reciprocal_root(top))
        steps = _steps_over(root, half)
        root, half = _roots(size, _near_reciprocal_root(size))
        q = tl.reshape(root * steps[:, None], (TILE // 8, 8)).to(tl.uint32, bitcast=True)
        q = (q | (m.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True)
        # The maximum of a NaN and a number is the number: -128 is what was not finite.
        m = (tl.maximum(q, -128.0) + WHOLE).to(tl.int32, bitcast=True)
    bits.store(ptr, m, left, M, TILE, MASKED)
