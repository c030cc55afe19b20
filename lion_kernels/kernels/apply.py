"""Room 3 on the GPU: unpacks the verdict, decays and updates p in one pass and one rounding.

The arithmetic in words is reference.apply's.
"""

import triton
import triton.language as tl

from . import bits
from .rounding import begin, load_parameter, store_parameter

# Ranks whose flags each program reads by itself; more are joined first, by _any_kernel.
RANKS = tl.constexpr(32)
FLAG_WORDS = tl.constexpr(128)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _any_kernel(
    presence_ptr, any_ptr, n_ranks: tl.int32, presence_stride: tl.int64, n_flag_words: tl.int32,
):  # fmt: skip
    """The flags (flag words,) that any of (ranks, flag words) has."""
    word = tl.program_id(0) * FLAG_WORDS + tl.arange(0, FLAG_WORDS)
    is_word = word < n_flag_words
    seen = tl.zeros([FLAG_WORDS], tl.int32)
    for rank in range(0, n_ranks):
        ptr = presence_ptr + tl.cast(rank, tl.int64) * presence_stride + word
        seen |= tl.load(ptr, mask=is_word, other=0)
    tl.store(any_ptr + word, seen, mask=is_word)


@triton.jit
def _flags(presence_ptr, presence_stride, n_ranks, index):
    """The words that hold each rank's flag of tensor ``index`` of the list; -1 is no tensor."""
    rank = tl.arange(0, RANKS)
    n_flags = n_ranks * (index >= 0).to(tl.int32)
    flags_ptr = presence_ptr + rank.to(tl.int64) * presence_stride + index // 32
    return tl.load(flags_ptr, mask=rank < n_flags, other=0)


@triton.jit
def _integers(ptr, plane_stride, used, PLANES: tl.constexpr):
    """The integers (bytes, 8) of a tile, from the bytes of its planes."""
    bit = tl.arange(0, 8)[None, :]
    v = tl.zeros([1, 1], tl.uint32)
    for first in tl.static_range(0, PLANES, 4):
        # A byte of each of four planes in one word; a product gathers a bit of each in its top.
        four = tl.zeros([1], tl.uint32)
        for b in tl.static_range(0, min(4, PLANES - first)):
            byte = tl.load(bits.in_plane(ptr, first + b, plane_stride), mask=used, other=0)
            four |= byte.to(tl.uint32) << (8 * b)
        one = (four[:, None] >> bit) & 0x01010101
        if PLANES - first > 1:
            one = (one * 0x10204080) >> 28
        v += one << first
    return v.to(tl.int32)


@triton.jit
def _apply_tile(
    row, start, left, verdict_ptr, flags, step_size, decay, scale,
    words_per_shard, shard_stride, plane_stride, key,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, CAUTIOUS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p_ptr = bits.pointer(row, bits.DATA, start, P, MASKED)
    p = load_parameter(row, p_ptr, start, left, P, ROUNDING, TILE, MASKED)
    word = bits.first_word(row, start)
    ptr = bits.byte_ptr(verdict_ptr, word, words_per_shard, shard_stride, TILE, MASKED)
    v = _integers(ptr, plane_stride, 32 * (tl.arange(0, TILE // 8) // 4) < left, PLANES)
    delta = (2 * v - scale).to(tl.float32)
    kept = decay + tl.zeros_like(p)
    if CAUTIOUS:  # weight decay (arXiv:2510.12402)
        kept = tl.where(delta * p < 0, 1.0, kept)
    next_p = tl.fma(p, kept, bits.negative(step_size * delta))
    # Presence is asked for last, and is no branch: the loads would wait for the flags.
    left *= tl.max((flags >> (row[bits.INDEX] % 32).to(tl.int32)) & 1, 0)
    store_parameter(row, p_ptr, start, left, next_p, key, P, ROUNDING, TILE, MASKED, True)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _apply_kernel(
    table_ptr, tile_rows_ptr, verdict_ptr, presence_ptr, step_ptr,
    lr: tl.int64, lr_address: tl.int64, lr_bytes: tl.int32, weight_decay: tl.int64, scale: tl.int32,
    inverse_scale: tl.int64,
    words_per_shard: tl.int32, shard_stride: tl.int64, plane_stride: tl.int64,
    n_ranks: tl.int32, presence_stride: tl.int64, advance: tl.int32, found_inf_address: tl.int64,
    rounding_key: tl.int64,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, CAUTIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
    if not bits.is_set(found_inf_address):
        key = begin(rounding_key, step_ptr, advance, ROUNDING)
        flags = _flags(presence_ptr, presence_stride, n_ranks, row[bits.INDEX])
        rate = bits.learning_rate(lr, lr_address, lr_bytes)
        decay = (1.0 - rate * bits.float64(weight_decay)).to(tl.float32)
        step_size = (rate * bits.float64(inverse_scale)).to(tl.float32)
        if bits.is_full_in_one_shard(row, start, left, words_per_shard, BLOCK):
            _apply_tile(
                row, start, left, verdict_ptr, flags, step_size, decay, scale,
                words_per_shard, shard_stride, plane_stride, key,
                P, ROUNDING, PLANES, CAUTIOUS, BLOCK, False,
            )  # fmt: skip
        else:
            for i in range(0, left, bits.EDGE):
                _apply_tile(
                    row, start + i, left - i, verdict_ptr, flags, step_size, decay, scale,
                    words_per_shard, shard_stride, plane_stride, key,
                    P, ROUNDING, PLANES, CAUTIOUS, bits.EDGE, True,
                )  # fmt: skip
