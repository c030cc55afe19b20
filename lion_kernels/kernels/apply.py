"""Room 3 on the GPU: unpacks the verdict, decays and updates p in one pass and one rounding.

The arithmetic in words is reference.apply's.
"""

import triton
import triton.language as tl

from .. import layout
from . import bits
from .rounding import key_of, load_parameter, store_parameter

# From the end of a trailer.
STATUS = tl.constexpr(layout.STATUS)
LOW, HIGH = tl.constexpr(layout.DIGEST), tl.constexpr(layout.DIGEST + 1)
READY = tl.constexpr(layout.READY)

# Ranks whose trailers each program reads by itself; more are joined first, by _join_kernel.
RANKS = tl.constexpr(32)
JOINED_WORDS = tl.constexpr(128)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _join_kernel(
    trailers_ptr, joined_ptr, n_ranks: tl.int32, trailers_stride: tl.int64,
    n_trailer_words: tl.int32,
):  # fmt: skip
    """Trailers (ranks, words) as those of two: the bits that any rank has, and those that all have.
    Two such ranks have a flag, are ready and have equal digests where all ranks together do."""
    word = tl.program_id(0) * JOINED_WORDS + tl.arange(0, JOINED_WORDS)
    is_word = word < n_trailer_words
    any_has = tl.zeros([JOINED_WORDS], tl.int32)
    all_have = any_has - 1
    for rank in range(0, n_ranks):
        ptr = trailers_ptr + tl.cast(rank, tl.int64) * trailers_stride + word
        one = tl.load(ptr, mask=is_word, other=0)
        any_has |= one
        all_have &= one
    tl.store(joined_ptr + word, any_has, mask=is_word)
    tl.store(joined_ptr + n_trailer_words + word, all_have, mask=is_word)


@triton.jit
def _trailers(trailers_ptr, trailers_stride, n_trailer_words, n_ranks, flag):
    """Of each rank, (RANKS,): the word of ``flag``, its status, the two words of its digest, and
    those of rank 0's."""
    rank = tl.arange(0, RANKS)
    ptr = trailers_ptr + rank.to(tl.int64) * trailers_stride
    first_ptr = trailers_ptr + n_trailer_words + tl.zeros([RANKS], tl.int64)
    is_rank = rank < n_ranks
    end_ptr = ptr + n_trailer_words
    return (
        tl.load(ptr + flag // 32, mask=is_rank, other=0),
        tl.load(end_ptr + STATUS, mask=is_rank, other=READY),
        tl.load(end_ptr + LOW, mask=is_rank, other=0),
        tl.load(end_ptr + HIGH, mask=is_rank, other=0),
        tl.load(first_ptr + LOW, mask=is_rank, other=0),
        tl.load(first_ptr + HIGH, mask=is_rank, other=0),
    )


@triton.jit
def _decision(trailers, flag):
    """2: the ranks are not all ready, or their digests differ; 1: they agree, and one of them has
    the flag; 0: they agree, and none has."""
    flags, status, low, high, first_low, first_high = trailers
    is_odd = (status != READY) | (low != first_low) | (high != first_high)
    has = (flags >> (flag % 32)) & 1
    return tl.max(tl.where(is_odd, 2, has), 0)


@triton.jit
def _end_step(step_ptr, trailers, flag):
    """Advances the step, where the ranks agree. No program may read it meanwhile."""
    if _decision(trailers, flag) < 2:
        tl.store(step_ptr, tl.load(step_ptr) + 1)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _advance_kernel(
    step_ptr, trailers_ptr, trailers_stride: tl.int64, n_trailer_words: tl.int32, n_ranks: tl.int32,
    found_inf_address: tl.int64,
):  # fmt: skip
    """Ends the step, after programs that read it."""
    if not bits.is_set(found_inf_address):
        trailers = _trailers(trailers_ptr, trailers_stride, n_trailer_words, n_ranks, 0)
        _end_step(step_ptr, trailers, 0)


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
    row, start, left, verdict_ptr, blanks_ptr, trailers, flag, step_size, decay, scale,
    first_word, words_per_shard, shard_stride, plane_stride, blank_stride, key,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, BLANKS: tl.constexpr,
    CAUTIOUS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p_ptr = bits.pointer(row, bits.DATA, start, P, MASKED)
    p = load_parameter(row, p_ptr, start, left, P, ROUNDING, TILE, MASKED)
    word = bits.word_of(row, start, first_word)
    byte = tl.arange(0, TILE // 8)
    used = 32 * (byte // 4) < left
    ptr = bits.byte_ptr(verdict_ptr, word, words_per_shard, shard_stride, TILE, MASKED)
    v = _integers(ptr, plane_stride, used, PLANES)
    if BLANKS:
        ptr = bits.blank_ptr(blanks_ptr, word, words_per_shard, blank_stride, TILE, MASKED)
        blank = tl.load(ptr, mask=used, other=0).to(tl.int32)
        # 1, or 0 in a blank word: two factors a byte instead of a choice an element.
        here = 1 - ((blank >> (byte // 4 % 8)) & 1)[:, None]
        delta = (v * (2 * here) - scale * here).to(tl.float32)
    else:
        delta = (2 * v - scale).to(tl.float32)
    kept = decay + tl.zeros_like(p)
    if CAUTIOUS:  # weight decay (arXiv:2510.12402)
        kept = tl.where(delta * p < 0, 1.0, kept)
    next_p = tl.fma(p, kept, bits.negative(step_size * delta))
    # What the ranks say is asked for last, and is no branch: the loads would wait for it.
    left *= (_decision(trailers, flag) == 1).to(tl.int32)
    store_parameter(row, p_ptr, start, left, next_p, key, P, ROUNDING, TILE, MASKED, True)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _apply_kernel(
    table_ptr, tile_rows_ptr, verdict_ptr, blanks_ptr, trailers_ptr, step_ptr,
    lr: tl.int64, lr_address: tl.int64, lr_bytes: tl.int32, weight_decay: tl.int64, scale: tl.int32,
    inverse_scale: tl.int64,
    first_word: tl.int32, words_per_shard: tl.int32, shard_stride: tl.int64, plane_stride: tl.int64,
    blank_stride: tl.int64, n_ranks: tl.int32, trailers_stride: tl.int64, n_trailer_words: tl.int32,
    first_flag: tl.int32, advance: tl.int32, found_inf_address: tl.int64, rounding_key: tl.int64,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, BLANKS: tl.constexpr,
    CAUTIOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
    if not bits.is_set(found_inf_address):
        key = key_of(rounding_key, step_ptr, ROUNDING)
        flag = first_flag + tl.maximum(row[bits.INDEX], 0).to(tl.int32)
        trailers = _trailers(trailers_ptr, trailers_stride, n_trailer_words, n_ranks, flag)
        rate = bits.learning_rate(lr, lr_address, lr_bytes)
        decay = (1.0 - rate * bits.float64(weight_decay)).to(tl.float32)
        step_size = (rate * bits.float64(inverse_scale)).to(tl.float32)
        if bits.is_full_in_one_shard(row, start, left, first_word, words_per_shard, BLOCK):
            _apply_tile(
                row, start, left, verdict_ptr, blanks_ptr, trailers, flag, step_size, decay, scale,
                first_word, words_per_shard, shard_stride, plane_stride, blank_stride, key,
                P, ROUNDING, PLANES, BLANKS, CAUTIOUS, BLOCK, False,
            )  # fmt: skip
        else:
            for i in range(0, left, bits.EDGE):
                _apply_tile(
                    row, start + i, left - i, verdict_ptr, blanks_ptr, trailers, flag, step_size,
                    decay, scale, first_word, words_per_shard, shard_stride, plane_stride,
                    blank_stride, key,
                    P, ROUNDING, PLANES, BLANKS, CAUTIOUS, bits.EDGE, True,
                )  # fmt: skip
        if (tl.program_id(0) == 0) & (advance != 0):
            _end_step(step_ptr, trailers, flag)
