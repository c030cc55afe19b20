"""Room 1 on the GPU: momentum interpolation, sign, packing and momentum update in one pass.

Reads g and m once, writes m, the ballot and its presence flags. Knows no process groups. The
arithmetic in words is reference.encode's.
"""

import triton
import triton.language as tl

from lion_kernels.kernels import bits
from lion_kernels.kernels.momentum import load_momentum, store_momentum


@triton.jit
def _votes_tile(
    row, start, left, nonfinite_ptr, beta1, complement1, beta2, complement2,
    G: tl.constexpr, M: tl.constexpr, CAUTIOUS: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """c of a tile, 0 where it has no vote; moves the momentum on."""
    g_ptr = bits.pointer(row, bits.GRAD, start, G, MASKED)
    m_ptr = bits.pointer(row, bits.EXP_AVG, start, M, MASKED)
    g = bits.load(g_ptr, left, TILE, MASKED)
    m = load_momentum(row, m_ptr, start, left, M, TILE, MASKED)
    c = bits.interpolate(g, m, beta1, complement1)
    finite = tl.abs(c) < float("inf")
    next_m = tl.where(finite, bits.interpolate(g, m, beta2, complement2), m)
    store_momentum(row, m_ptr, start, left, next_m, M, TILE, MASKED)
    bits.count_nonfinite(c, nonfinite_ptr)
    if CAUTIOUS:
        finite = finite & bits.agrees(c, g, complement1)
    return tl.where(finite, c, 0.0)


@triton.jit
def _encode_tile(
    row, start, left, ballot_ptr, nonfinite_ptr, beta1, complement1, beta2, complement2, key,
    words_per_shard, shard_stride, plane_stride,
    G: tl.constexpr, M: tl.constexpr, TERNARY: tl.constexpr, CAUTIOUS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    c = tl.zeros([TILE // 32, 32], tl.float32)
    if tl.load(row + bits.GRAD) != 0:
        c = _votes_tile(
            row, start, left, nonfinite_ptr, beta1, complement1, beta2, complement2,
            G, M, CAUTIOUS, TILE, MASKED,
        )  # fmt: skip
    is_zero = c == 0
    if MASKED:
        is_zero = is_zero & (bits.elements(TILE) < left) & (tl.load(row + bits.INDEX) >= 0)
    plus, zero = bits.pack(c > 0), bits.pack(is_zero)
    in_tile = tl.arange(0, TILE // 32)
    used = 32 * in_tile < left
    words = (tl.load(row + bits.FIRST_WORD) + start // 32).to(tl.int32) + in_tile
    word_ptr = ballot_ptr + bits.word_address(words, words_per_shard, shard_stride)
    if TERNARY:
        tl.store(word_ptr, zero, mask=used)
        tl.store(word_ptr + plane_stride, plus, mask=used)
    else:
        tl.store(word_ptr, plus | (zero & bits.coins(key, words)), mask=used)


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
    is_skipped = bits.is_set(found_inf_address)
    if (shard >= 0) & (not is_skipped):
        _write_flags(flags_ptr, flags_stride, flag_source_ptr, n_flag_words, shard)
    if (shard < 0) & (not is_skipped):
        row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
        c1 = bits.complement(complement1, grad_scale_address)
        c2 = bits.complement(complement2, grad_scale_address)
        coin_key = bits.coin_key(key, step_ptr)
        if bits.is_full(row, left, BLOCK):
            _encode_tile(
                row, start, left, ballot_ptr, nonfinite_ptr, beta1, c1, beta2, c2, coin_key,
                words_per_shard, shard_stride, plane_stride, G, M, TERNARY, CAUTIOUS, BLOCK, False,
            )  # fmt: skip
        else:
            for i in range(0, left, bits.EDGE):
                _encode_tile(
                    row, start + i, left - i, ballot_ptr, nonfinite_ptr, beta1, c1, beta2, c2,
                    coin_key, words_per_shard, shard_stride, plane_stride,
                    G, M, TERNARY, CAUTIOUS, bits.EDGE, True,
                )  # fmt: skip
