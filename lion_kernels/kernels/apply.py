"""Room 3 on the GPU: unpacks the verdict, decays and updates p in one pass and one rounding.

The arithmetic in words is reference.apply's.
"""

import triton
import triton.language as tl

from lion_kernels.kernels import bits
from lion_kernels.kernels.rounding import begin, load_parameter, store_parameter


@triton.jit
def _is_present(presence_ptr, presence_stride, n_ranks, index):
    """Whether any rank flagged tensor ``index`` of the list; -1 is no tensor."""
    seen = tl.zeros([32], tl.int32)
    n_flags = n_ranks * (index >= 0).to(tl.int32)
    for first in range(0, n_ranks, 32):
        rank = first + tl.arange(0, 32)
        flags_ptr = presence_ptr + rank.to(tl.int64) * presence_stride + index // 32
        seen |= tl.load(flags_ptr, mask=rank < n_flags, other=0)
    return tl.max((seen >> (index % 32).to(tl.int32)) & 1, 0) != 0


@triton.jit
def _integers(word_ptr, plane_stride, n_planes, used, PLANES: tl.constexpr):
    """The integers (words, 32) of a tile. PLANES = 0: as many planes as ``n_planes`` says."""
    bit = tl.arange(0, 32)[None, :]
    v = (tl.load(word_ptr, mask=used, other=0)[:, None] >> bit) & 1
    if PLANES == 2:
        v += ((tl.load(word_ptr + plane_stride, mask=used, other=0)[:, None] >> bit) & 1) << 1
    elif PLANES == 0:
        for b in range(1, n_planes):
            word = tl.load(word_ptr + b * plane_stride, mask=used, other=0)
            v += ((word[:, None] >> bit) & 1) << b
    return v


@triton.jit
def _apply_tile(
    row, start, left, verdict_ptr, step_size, decay, scale,
    words_per_shard, shard_stride, plane_stride, n_planes, key,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, CAUTIOUS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p_ptr = bits.pointer(row, bits.DATA, start, P, MASKED)
    p = load_parameter(row, p_ptr, start, left, P, ROUNDING, TILE, MASKED)
    in_tile = tl.arange(0, TILE // 32)
    words = (tl.load(row + bits.FIRST_WORD) + start // 32).to(tl.int32) + in_tile
    word_ptr = verdict_ptr + bits.word_address(words, words_per_shard, shard_stride)
    v = _integers(word_ptr, plane_stride, n_planes, 32 * in_tile < left, PLANES)
    delta = (2 * v - scale).to(tl.float32)
    kept = decay + tl.zeros_like(p)
    if CAUTIOUS:  # weight decay (arXiv:2510.12402)
        kept = tl.where(delta * p < 0, 1.0, kept)
    next_p = tl.fma(p, kept, -(step_size * delta))
    store_parameter(row, p_ptr, start, left, next_p, key, P, ROUNDING, TILE, MASKED)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _apply_kernel(
    table_ptr, tile_rows_ptr, verdict_ptr, presence_ptr, step_ptr,
    lr: tl.int64, lr_address: tl.int64, lr_bytes: tl.int32, weight_decay: tl.int64, scale: tl.int32,
    inverse_scale: tl.int64,
    words_per_shard: tl.int32, shard_stride: tl.int64, plane_stride: tl.int64, n_planes: tl.int32,
    n_ranks: tl.int32, presence_stride: tl.int64, advance: tl.int32, found_inf_address: tl.int64,
    rounding_key: tl.int64,
    P: tl.constexpr, ROUNDING: tl.constexpr, PLANES: tl.constexpr, CAUTIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if not bits.is_set(found_inf_address):
        key = begin(rounding_key, step_ptr, advance, ROUNDING)
        row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
        if _is_present(presence_ptr, presence_stride, n_ranks, tl.load(row + bits.INDEX)):
            rate = bits.learning_rate(lr, lr_address, lr_bytes)
            decay = (1.0 - rate * bits.float64(weight_decay)).to(tl.float32)
            step_size = (rate * bits.float64(inverse_scale)).to(tl.float32)
            if bits.is_full(row, left, BLOCK):
                _apply_tile(
                    row, start, left, verdict_ptr, step_size, decay, scale,
                    words_per_shard, shard_stride, plane_stride, n_planes, key,
                    P, ROUNDING, PLANES, CAUTIOUS, BLOCK, False,
                )  # fmt: skip
            else:
                for i in range(0, left, bits.EDGE):
                    _apply_tile(
                        row, start + i, left - i, verdict_ptr, step_size, decay, scale,
                        words_per_shard, shard_stride, plane_stride, n_planes, key,
                        P, ROUNDING, PLANES, CAUTIOUS, bits.EDGE, True,
                    )  # fmt: skip
