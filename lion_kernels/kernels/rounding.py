"""Parameters in a 16-bit type that really train: how they are read as float32 and stored again.

NEAREST; STOCHASTIC, noise below the last kept bit, the rest cut off; COMPENSATED, a second tensor
keeps what was dropped. The bits are those of csrc/simd/rounding.h.
"""

import triton
import triton.language as tl

from . import bits

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
COMPENSATED = tl.constexpr(2)


@triton.jit
def key_of(key, step_ptr, ROUNDING: tl.constexpr):
    """This step's key of the random bits."""
    this_key = key.to(tl.int64).to(tl.uint64, bitcast=True)
    if ROUNDING == STOCHASTIC:
        this_key = bits.coin_key(key, step_ptr)
    return this_key


@triton.jit
def random_bits(key, first_word, TILE: tl.constexpr):
    """16 random bits, uint32 (bytes, 8), for each element of the words from ``first_word`` on."""
    byte = tl.arange(0, TILE // 8)
    hashes = bits.mix64(key + (first_word + byte // 4).to(tl.uint64) * 0x9E3779B97F4A7C15)
    low, high = hashes.to(tl.uint32)[:, None], (hashes >> 32).to(tl.uint32)[:, None]
    element = 8 * (byte % 4)[:, None] + tl.arange(0, 8)[None, :]
    x = (element % 16).to(tl.uint32) * 0x9E3779B9 + low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16) ^ high
    return tl.where(element < 16, x & 0xFFFF, x >> 16)


@triton.jit
def round_at_random(x, random, DTYPE: tl.constexpr):
    """x to a neighbour that DTYPE has, still float32; infinities and NaN stay."""
    pattern = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((pattern + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        noise, magnitude = random & 0x1FFF, tl.abs(x)
        normal = ((pattern + noise) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 fp16 has a fixed point: multiples of 2^-24.
        is_tiny = magnitude < 6.103515625e-05
        units = tl.where(is_tiny, magnitude, 0.0) * 16777216.0
        cut = tl.floor(units + noise.to(tl.float32) * 0.0001220703125) * 5.9604644775390625e-08
        tiny = cut.to(tl.uint32, bitcast=True) | (pattern & 0x80000000)
        tiny = tiny.to(tl.float32, bitcast=True)
        rounded = tl.where(is_tiny, tiny, normal)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def load_parameter(
    row, ptr, start, left,
    P: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p = bits.load(ptr, left, TILE, MASKED)
    if ROUNDING == COMPENSATED:
        if P == tl.bfloat16:
            low_ptr = bits.pointer(row, bits.LOW, start, tl.int16, MASKED)
            low = bits.load_raw(low_ptr, left, TILE, MASKED).to(tl.int32)
            p = (p.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
        else:
            low_ptr = bits.pointer(row, bits.LOW, start, tl.float16, MASKED)
            p = p + bits.load(low_ptr, left, TILE, MASKED)
    return p


@triton.jit
def store_parameter(
    row, ptr, start, left, x, key,
    P: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    GUARDED: tl.constexpr = False,
):  # fmt: skip
    if ROUNDING == STOCHASTIC:
        first_word = row[bits.FIRST_WORD] + start // 32
        x = round_at_random(x, random_bits(key, first_word, TILE), P)
    if ROUNDING == COMPENSATED:
        if P == tl.bfloat16:
            # Ties go away from zero, so that what is dropped fits 16 bits with a sign.
            pattern = x.to(tl.uint32, bitcast=True)
            kept = (pattern + 0x8000) & 0xFFFF0000
            finite = tl.abs(x) < float("inf")
            dropped = tl.where(finite, (pattern - kept).to(tl.int32, bitcast=True), 0)
            x = tl.where(finite, kept.to(tl.float32, bitcast=True), x)
            low_ptr = bits.pointer(row, bits.LOW, start, tl.int16, MASKED)
            bits.store(low_ptr, dropped, left, tl.int16, TILE, MASKED, GUARDED)
        else:
            dropped = x - x.to(tl.float16).to(tl.float32)
            dropped = tl.where(tl.abs(dropped) < float("inf"), dropped, 0.0)
            low_ptr = bits.pointer(row, bits.LOW, start, tl.float16, MASKED)
            bits.store(low_ptr, dropped, left, tl.float16, TILE, MASKED, GUARDED)
    bits.store(ptr, x, left, P, TILE, MASKED, GUARDED)
