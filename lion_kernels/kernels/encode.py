"""Room 1 on the GPU: momentum interpolation, sign, packing and momentum update in one pass.

Reads g and m once, writes m, the ballot with its blank bits and the trailers. Knows no process
groups. The arithmetic in words is reference.encode's.
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
    row, start, left, ballot_ptr, blanks_ptr, nonfinite_ptr, beta1, complement1, beta2, complement2,
    key, step, flip, first_word, words_per_shard, shard_stride, plane_stride, blank_stride,
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
        each = tl.where(bits.elements(TILE) < left, each, 0)
    code = tl.sum(each, 1)
    bits.count(code >> 16, nonfinite_ptr)
    byte = tl.arange(0, TILE // 8)
    used = 256 * (byte // 32) < left  # to the end of the tensor's last octet
    word = bits.word_of(row, start, first_word)
    ptr = bits.byte_ptr(ballot_ptr, word, words_per_shard, shard_stride, TILE, MASKED)
    if TERNARY:
        tl.store(bits.in_plane(ptr, 0, plane_stride), (code >> 8).to(tl.uint8), mask=used)
        tl.store(bits.in_plane(ptr, 1, plane_stride), code.to(tl.uint8), mask=used)
    else:
        blank = bits.blank_bytes(code, left, TILE, MASKED)
        vote = tl.map_elementwise(
            bits.binary_vote, code, blank, key, step, flip, word + byte // 4, byte % 4
        )
        tl.store(bits.in_plane(ptr, 0, plane_stride), vote.to(tl.uint8), mask=used)
        # One thread of each octet's writes its byte.
        ptr = bits.blank_ptr(blanks_ptr, word, words_per_shard, blank_stride, TILE, MASKED)
        tl.store(ptr, blank.to(tl.uint8), mask=used & (byte % 32 == 0))


@triton.jit
def _write_trailer(
    trailers_ptr, trailers_stride, trailer_ptr, n_trailer_words, shared_ptr, n_shared, shard
):
    """The trailer, whose digest takes up what is shared, into one shard's chunk."""
    digest_ptr = trailer_ptr.to(tl.pointer_type(tl.uint32)) + (n_trailer_words - 2)
    low, high = tl.load(digest_ptr).to(tl.uint64), tl.load(digest_ptr + 1).to(tl.uint64)
    digest = low | (high << 32)
    for i in range(0, n_shared):
        digest = bits.mix64(digest ^ tl.load(shared_ptr + i).to(tl.uint64, bitcast=True))
    low, high = digest.to(tl.uint32), (digest >> 32).to(tl.uint32)
    for first in range(0, n_trailer_words, 128):
        word = first + tl.arange(0, 128)
        value = tl.load(trailer_ptr + word, mask=word < n_trailer_words, other=0)
        value = tl.where(word == n_trailer_words - 2, low.to(tl.int32, bitcast=True), value)
        value = tl.where(word == n_trailer_words - 1, high.to(tl.int32, bitcast=True), value)
        target = trailers_ptr + shard.to(tl.int64) * trailers_stride + word
        tl.store(target, value, mask=word < n_trailer_words)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _encode_kernel(
    table_ptr, tile_rows_ptr, ballot_ptr, blanks_ptr, trailers_ptr, trailer_ptr, shared_ptr,
    nonfinite_ptr, step_ptr,
    beta1, complement1: tl.int64, beta2, complement2: tl.int64, key: tl.int64, flip: tl.int32,
    first_word: tl.int32, words_per_shard: tl.int32, shard_stride: tl.int64, plane_stride: tl.int64,
    blank_stride: tl.int64, trailers_stride: tl.int64, n_trailer_words: tl.int32,
    n_shared: tl.int32, n_tiles: tl.int32,
    grad_scale_address: tl.int64, found_inf_address: tl.int64,
    G: tl.constexpr, M: tl.constexpr, TERNARY: tl.constexpr, CAUTIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    shard = tl.program_id(0) - n_tiles
    if shard >= 0:
        _write_trailer(
            trailers_ptr, trailers_stride, trailer_ptr, n_trailer_words, shared_ptr, n_shared,
            shard,
        )  # fmt: skip
    else:
        row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
        if not bits.is_set(found_inf_address):
            c1 = bits.complement(complement1, grad_scale_address)
            c2 = bits.complement(complement2, grad_scale_address)
            # Two steps share their coins, and take them either way round.
            count = tl.load(step_ptr)
            step = (count >> 1).to(tl.uint64, bitcast=True)
            flip ^= -(count & 1).to(tl.int32)
            seed = key.to(tl.int64).to(tl.uint64, bitcast=True)
            is_full = bits.is_full_in_one_shard(
                row, start, left, first_word, words_per_shard, BLOCK
            )
            if is_full & (row[bits.GRAD] != 0):
                _encode_tile(
                    row, start, left, ballot_ptr, blanks_ptr, nonfinite_ptr, beta1, c1, beta2, c2,
                    seed, step, flip, first_word, words_per_shard, shard_stride, plane_stride,
                    blank_stride,
                    G, M, TERNARY, CAUTIOUS, BLOCK, False,
                )  # fmt: skip
            else:
                for i in range(0, left, bits.EDGE):
                    _encode_tile(
                        row, start + i, left - i, ballot_ptr, blanks_ptr, nonfinite_ptr, beta1, c1,
                        beta2, c2, seed, step, flip, first_word, words_per_shard, shard_stride,
                        plane_stride, blank_stride,
                        G, M, TERNARY, CAUTIOUS, bits.EDGE, True,
                    )  # fmt: skip
