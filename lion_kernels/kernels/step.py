"""Lion on one device: encode and apply fused, one pass over p, g and m, no ballots; and the pass
over g and m before it that a rescaled cautious update needs.

The arithmetic in words is reference.lion_step's and reference.count_agreeing's.
"""

import triton
import triton.language as tl

from . import bits
from .momentum import load_momentum, store_momentum
from .rounding import key_of, load_parameter, store_parameter


@triton.jit
def _step_tile(
    row, start, left, nonfinite_ptr, lr, decay, beta1, complement1, beta2, complement2, key,
    skip, cautious, cautious_decay,
    P: tl.constexpr, M: tl.constexpr, ROUNDING: tl.constexpr, PLAIN: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p_ptr = bits.pointer(row, bits.DATA, start, P, MASKED)
    g_ptr = bits.pointer(row, bits.GRAD, start, P, MASKED)
    m_ptr = bits.pointer(row, bits.EXP_AVG, start, M, MASKED)
    p = load_parameter(row, p_ptr, start, left, P, ROUNDING, TILE, MASKED)
    g = bits.load(g_ptr, left, TILE, MASKED)
    m = load_momentum(row, m_ptr, start, left, M, TILE, MASKED)
    c = bits.interpolate(g, m, beta1, complement1)
    next_m = bits.interpolate(g, m, beta2, complement2)
    # Neither above nor below 0: a zero, or a NaN that must stay visible.
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
    kept = decay + tl.zeros_like(p)
    if not PLAIN:
        is_update = bits.agrees(c, g, complement1) | (c != c) | (cautious == 0)
        sign = tl.where(is_update, sign, 0.0)
        # Cautious weight decay (arXiv:2510.12402).
        kept = tl.where((sign * p < 0) & (cautious_decay != 0), 1.0, kept)
    next_p = tl.fma(p, kept, bits.negative(lr * sign))
    if not PLAIN:
        is_kept = (tl.abs(c) < float("inf")) | (skip == 0)
        next_p, next_m = tl.where(is_kept, next_p, p), tl.where(is_kept, next_m, m)
        if skip != 0:
            bits.count(bits.nonfinite(c), nonfinite_ptr)
    store_parameter(row, p_ptr, start, left, next_p, key, P, ROUNDING, TILE, MASKED)
    store_momentum(row, m_ptr, start, left, next_m, M, TILE, MASKED)


@triton.jit
def _rescale(row, agreeing_address):
    """What a cautious update is multiplied by: elements over those that agree (and one)."""
    factor = 1.0
    if agreeing_address != 0:
        counts_ptr = agreeing_address.to(tl.int64).to(tl.pointer_type(tl.int64))
        count = tl.load(counts_ptr + tl.maximum(row[bits.INDEX], 0))
        numel = row[bits.NUMEL].to(tl.float32)
        factor = tl.div_rn(numel, (count + 1).to(tl.float32))
    return factor


@triton.jit
def _agreeing_tile(
    row, start, left, beta1, complement1,
    G: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """How many elements of a tile have the sign of their gradient."""
    g_ptr = bits.pointer(row, bits.GRAD, start, G, MASKED)
    m_ptr = bits.pointer(row, bits.EXP_AVG, start, M, MASKED)
    g = bits.load(g_ptr, left, TILE, MASKED)
    m = load_momentum(row, m_ptr, start, left, M, TILE, MASKED)
    agreeing = bits.agrees(bits.interpolate(g, m, beta1, complement1), g, complement1)
    return tl.sum(tl.sum(agreeing.to(tl.int32), 1), 0)


@triton.jit(do_not_specialize=bits.RUNTIME)
def _agreeing_kernel(
    table_ptr, tile_rows_ptr, agreeing_ptr, beta1, complement1: tl.int64,
    grad_scale_address: tl.int64,
    G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
    c1 = bits.complement(complement1, grad_scale_address)
    count = 0
    if bits.is_full(row, left, BLOCK):
        count = _agreeing_tile(row, start, left, beta1, c1, G, M, BLOCK, False)
    else:
        for i in range(0, left, bits.EDGE):
            count += _agreeing_tile(row, start + i, left - i, beta1, c1, G, M, bits.EDGE, True)
    if count > 0:
        tl.atomic_add(agreeing_ptr + row[bits.INDEX], count.to(tl.int64))


@triton.jit(do_not_specialize=bits.RUNTIME)
def _step_kernel(
    table_ptr, tile_rows_ptr, nonfinite_ptr, step_ptr,
    lr: tl.int64, lr_address: tl.int64, lr_bytes: tl.int32,
    weight_decay: tl.int64, beta1, complement1: tl.int64, beta2, complement2: tl.int64,
    grad_scale_address: tl.int64, found_inf_address: tl.int64,
    rounding_key: tl.int64, advance: tl.int32,
    skip: tl.int32, cautious: tl.int32, cautious_decay: tl.int32, agreeing_address: tl.int64,
    P: tl.constexpr, M: tl.constexpr, ROUNDING: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if not bits.is_set(found_inf_address):
        key = key_of(rounding_key, step_ptr, ROUNDING)
        # One program ends the step, of a launch in which none reads it.
        if (tl.program_id(0) == 0) & (advance != 0):
            tl.store(step_ptr, tl.load(step_ptr) + 1)
        row, start, left = bits.row_of(table_ptr, tile_rows_ptr, BLOCK)
        rate = bits.learning_rate(lr, lr_address, lr_bytes)
        decay = (1.0 - rate * bits.float64(weight_decay)).to(tl.float32)
        step_size = rate.to(tl.float32)
        if not PLAIN:
            step_size = step_size * _rescale(row, agreeing_address)
        c1 = bits.complement(complement1, grad_scale_address)
        c2 = bits.complement(complement2, grad_scale_address)
        if bits.is_full(row, left, BLOCK):
            _step_tile(
                row, start, left, nonfinite_ptr, step_size, decay, beta1, c1, beta2, c2,
                key, skip, cautious, cautious_decay, P, M, ROUNDING, PLAIN, BLOCK, False,
            )  # fmt: skip
        else:
            for i in range(0, left, bits.EDGE):
                _step_tile(
                    row, start + i, left - i, nonfinite_ptr, step_size, decay, beta1, c1, beta2, c2,
                    key, skip, cautious, cautious_decay, P, M, ROUNDING, PLAIN, bits.EDGE, True,
                )  # fmt: skip
