"""Room 1 on the GPU: momentum interpolation, sign, packing and momentum update in one pass.

Reads g and m once, writes m, the ballot and its presence flags. Knows no process groups. The
arithmetic in words is reference.encode's.
"""

import triton
import triton.language as tl

from . import bits
from .momentum import load_momentum, store_momentum


@triton.jit
def _codes_tile(
    row, start, left, beta1, complement1, beta2, complement2,
    G: tl.constexpr, M: tl.constexpr, CAUTIOUS: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The codes of a tile's votes; moves the momentum on."""
    g_ptr = bits.pointer(row, bits.GRAD, start, G, MASKED)
    m_ptr = bits.pointer(row, bits.EXP_AVG, start, M, MASKED)
    g = bits.load(g_ptr, left, TILE, MASKED)
    m = load_momentum(row, m_ptr, start, left, M, TILE, MASKED)
    c = bits.interpolate(g, m, beta1, complement1)
    finite = tl.abs(c) < float("inf")
    next_m = tl.where(finite, bits.interpolate(g, m, beta2, complement2), m)
    store_momentum(row, m_ptr, start, left, next_m, M, TILE, MASKED)
    if CAUTIOUS:
        c = tl.where(finite & ~bits.agrees(c, g, complement1), 0.0, c)
    return bits.codes(c, finite)


@triton.jit
def _encode_tile(
    row, start, left, ballot_ptr, nonfinite_ptr, beta1, complement1, beta2, complement2, key, step,
    words_per_shard, shard_stride, plane_stride,
    G: tl.constexpr, M: tl.constexpr, TERNARY: tl.constexpr, CAUTIOUS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    c = tl.zeros([TILE // 8, 8], tl.float32)
    each = bits.codes(c, c == 0)
    if row[bits.GRAD] != 0:
        each = _codes_tile(
            row, start, left, beta1, complement1, beta2, complement2,
            G, M, CAUTIOUS, TILE, MASKED,
        )  # fmt: skip
    if MASKED:
        each = tl.where((bits.elements(TILE) < left) & (row[bits.INDEX] >= 0), each, 0)
    code = tl.sum(each, 1)
    bits.count(code >> 16, nonfinite_ptr)
    byte = tl.arange(0, TILE // 8)
    used = 32 * (byte // 4) < left
    word = bits.first_word(row, start)
    ptr = bits.byte_ptr(ballot_ptr, word, words_per_shard, shard_stride, TILE, MASKED)
    if TERNARY:
        tl.store(bits.in_plane(ptr, 0, plane_stride), (code >> 8).to(tl.uint8), mask=used)
        tl.store(bits.in_plane(ptr, 1, plane_stride), code.to(tl.uint8), mask=used)
    else:
        vote = tl.map_elementwise(bits.binary_vote, code, key, step, word + byte // 4, byte % 4)
        tl.store(bits.in_plane(ptr, 0, plane_stride), vote.to(tl.uint8), mask=used)


@triton.jit
def _write_flags(flags_ptr, flags_stride, flag_source_ptr, n_flag_words, shard):
    """The presence flags, which the host packed behind the table, into one shard's chunk."""
    for first in range(0, n_flag_words, 128):
        word = first + tl.arange(0, 128)
        value = tl.load(flag_source_ptr + word, mask=word < n_flag_words, other=0)
        target = flags_ptr + shard.to(tl.int64) * flags_stride + word
        tl.store(target, value.to(tl.int32), mask=word < n_flag_words)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _encode_kernel(
    table_ptr, tile_rows_ptr, ballot_ptr, flags_ptr, flag_source_ptr, nonfinite_ptr, step_ptr,
    beta1, complement1: tl.int64, beta2, complement2: tl.int64, key: tl.int64,
    words_per_shard: tl.int32, shard_stride: tl.int64, plane_stride: tl.int64,
    flags_stride: tl.int64, n_flag_words: tl.int32, n_tiles: tl.int32,
    grad_scale_address: tl.int64, found_inf_address: tl.int64,
    G: tl.constexpr, M: tl.constexpr, TERNARY: tl.constexpr, CAUTIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    shard = tl.program_id(0) - n_tiles
    if shard >= 0:
        if not bits.is_set(found_inf_address):
            _write_flags(flags_ptr, flags_stride, flag_source_ptr, n_flag_words, shard)
    else:
        row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
        if not bits.is_set(found_inf_address):
            c1 = bits.complement(complement1, grad_scale_address)
            c2 = bits.complement(complement2, grad_scale_address)
            step = tl.load(step_ptr).to(tl.uint64, bitcast=True)
            seed = key.to(tl.int64).to(tl.uint64, bitcast=True)
            is_full = bits.is_full_in_one_shard(row, start, left, words_per_shard, BLOCK)
            if is_full & (row[bits.GRAD] != 0):
                _encode_tile(
                    row, start, left, ballot_ptr, nonfinite_ptr, beta1, c1, beta2, c2, seed, step,
                    words_per_shard, shard_stride, plane_stride,
                    G, M, TERNARY, CAUTIOUS, BLOCK, False,
                )  # fmt: skip
            else:
                for i in range(0, left, bits.EDGE):
                    _encode_tile(
                        row, start + i, left - i, ballot_ptr, nonfinite_ptr, beta1, c1, beta2, c2,
                        seed, step, words_per_shard, shard_stride, plane_stride,
                        G, M, TERNARY, CAUTIOUS, bits.EDGE, True,
                    )  # fmt: skip
