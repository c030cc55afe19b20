"""Launchers of the Triton kernels: the ops of ops.py on CUDA tensors, one launch for all tensors
of a list with equal types.

Checks, tables and scalars; no arithmetic, and nothing waits for the device: an lr, a grad scale or
a found_inf that lies there is read there. A launcher first copies its arguments into ``given``, for
the op's check, which only a list that is new needs. The interpreter runs them on CPU tensors.
"""

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor

from .. import ops
from ..coins import ROUNDING_STREAM, ZERO_STREAM, stream_key
from .apply import JOINED_WORDS, RANKS, _advance_kernel, _apply_kernel, _join_kernel
from .config import AGREEING, apply_config, encode_config, options, step_config
from .encode import _encode_kernel
from .step import _agreeing_kernel, _step_kernel
from .table import Launches, check_dense, identity, rows_by_dtypes, tables

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bits(x: float) -> int:
    """A float64 as an int64 of the same bits: launches round floats to float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _signed(x: int) -> int:
    """A uint64 as the int64 of the same bits."""
    return x - (x >> 63 << 64)


def _is_on_host(scalar: Tensor) -> bool:
    return scalar.device.type == "cpu"


def _rate(lr: Tensor, device: torch.device) -> dict[str, int]:
    """lr as the launch takes it: float64 bits, or an address on the device and its bytes."""
    ops.check_one(lr, "lr")
    if _is_on_host(lr):
        return {"lr": _bits(lr.item()), "lr_address": 0, "lr_bytes": 0}
    if lr.device != device or lr.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a tensor lr must be float32 or float64 on the CPU or on {device}, "
            f"got {lr.dtype} on {lr.device}"
        )
    return {"lr": 0, "lr_address": lr.data_ptr(), "lr_bytes": lr.element_size()}


def _address(scalar: Tensor | None, name: str, device: torch.device) -> int:
    if scalar is None:
        return 0
    if scalar.device != device or scalar.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 on {device}, got {scalar.dtype} on {scalar.device}"
        )
    return scalar.data_ptr()


def _check_place(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> None:
    if tensor.device != device or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
        )


def _check_words(words: Tensor | None, name: str, device: torch.device, n_words: int = 0) -> None:
    if words is None:
        return
    if words.device != device:
        raise ValueError(f"{name} must be on {device}, got {words.device}")
    if words.shape[-1] > 1 and words.stride(-1) != 1:
        raise ValueError(
            f"{name} must have unit stride in its last dimension, got strides {words.stride()}"
        )
    if n_words >= 2**31:
        raise ValueError(f"a group must have fewer than 2**31 ballot words, got {n_words}")


def _shapes(*scalars: Tensor | None) -> tuple[object, ...]:
    """What the checks of scalars depend on, but for their devices."""
    return tuple(None if t is None else (t.shape, t.dtype) for t in scalars)


def _layouts(*words: Tensor | None) -> tuple[object, ...]:
    """What the checks of ballots, verdicts, blank bits and trailers depend on."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in words)


def _stride(words: Tensor | None) -> int:
    """From row to row of blank bits or trailers."""
    return 0 if words is None else words.stride(0)


def _complements(beta1: float, beta2: float, maximize: bool) -> tuple[int, int]:
    sign = -1.0 if maximize else 1.0
    return _bits(sign * (1.0 - beta1)), _bits(sign * (1.0 - beta2))


def _rounding_of(rounding: str, dtype: torch.dtype) -> int:
    """The kernel's ROUNDING: float32 drops nothing."""
    return 0 if dtype == torch.float32 else ops.ROUNDINGS.index(rounding)


def _rounding_key(seed: int) -> int:
    return _signed(stream_key(seed, ROUNDING_STREAM))


def _kept(params: Sequence[Tensor], lows: Sequence[Tensor] | None) -> list[Tensor | None]:
    """The low tensors that the kernels read."""
    if not lows:
        return [None] * len(params)
    pairs = zip(params, lows, strict=True)
    return [None if ops.low_dtype(p.dtype) is None else low for p, low in pairs]


def _used(exp_avgs: Sequence[Tensor], block_scales: Sequence[Tensor] | None) -> list[Tensor | None]:
    """The block scales that the kernels read."""
    if not block_scales:
        return [None] * len(exp_avgs)
    pairs = zip(exp_avgs, block_scales, strict=True)
    return [scale if m.dtype == torch.int8 else None for m, scale in pairs]


def _advance(step: Tensor, found_inf: Tensor | None) -> None:
    step += 1 if found_inf is None else (found_inf == 0).reshape(step.shape)


def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    nonfinite: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: str = "nearest",
    lows: Sequence[Tensor] | None = None,
    seed: int = 0,
    step: Tensor | None = None,
    cautious: bool = False,
    cautious_decay: bool = False,
    block_scales: Sequence[Tensor] | None = None,
    agreeing: Tensor | None = None,
    uniform: bool = False,
) -> None:
    """See reference.lion_step."""
    given = {**locals()}
    device = params[0].device if params and params[0] is not None else lr.device

    def launches() -> Launches:
        ops.CHECKS["lion_step"](**given)
        check_dense(params, "params", params, device)
        check_dense(grads, "grads", params)
        check_dense(exp_avgs, "exp_avgs", params)
        kept = _kept(params, lows)
        check_dense(kept, "lows", params)
        used = _used(exp_avgs, block_scales)
        return rows_by_dtypes(
            params, grads, exp_avgs, lows=kept, block_scales=used, decided_by=(params, exp_avgs)
        )

    tensors, addresses = identity(grads, params, exp_avgs, lows or (), block_scales or ())
    scalars = _shapes(lr, grad_scale, found_inf, step)
    counts = () if agreeing is None else _layouts(agreeing)
    key = ("lion_step", *tensors, rounding, cautious, uniform, *scalars, *counts)
    if nonfinite is not None:
        _check_place(nonfinite, "nonfinite", device, torch.int64)
    if step is not None:
        _check_place(step, "step", device, torch.int64)
    if agreeing is not None:
        _check_place(agreeing, "agreeing", device, torch.int64)
    complement1, complement2 = _complements(beta1, beta2, maximize)
    rate = _rate(lr, device)
    scale_address = _address(grad_scale, "grad_scale", device)
    found_inf_address = _address(found_inf, "found_inf", device)
    # Where every program reads `step`, none of them may write it.
    in_kernel = rounding != "stochastic"
    is_plain = nonfinite is None and not cautious and not cautious_decay
    config = step_config(is_plain)
    with _on(device):
        found = tables(key, addresses, config.block, device=device, launches=launches)
        for i, ((p_dtype, m_dtype), table) in enumerate(found):
            _step_kernel[(table.n_tiles,)](
                table.rows, table.tile_rows,
                nonfinite_ptr=table.rows if nonfinite is None else nonfinite,
                step_ptr=table.rows if step is None else step,
                **rate, weight_decay=_bits(weight_decay), beta1=beta1, complement1=complement1,
                beta2=beta2, complement2=complement2, grad_scale_address=scale_address,
                found_inf_address=found_inf_address, rounding_key=_rounding_key(seed),
                advance=int(i == 0 and in_kernel and step is not None),
                skip=int(nonfinite is not None), cautious=int(cautious),
                cautious_decay=int(cautious_decay),
                agreeing_address=0 if agreeing is None else agreeing.data_ptr(),
                P=TRITON_DTYPES[p_dtype], M=TRITON_DTYPES[m_dtype],
                ROUNDING=_rounding_of(rounding, p_dtype),
                PLAIN=is_plain,
                BLOCK=config.block, **options(config),
            )  # fmt: skip
        if step is not None and not in_kernel:
            _advance(step, found_inf)


def count_agreeing(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    agreeing: Tensor,
    beta1: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    block_scales: Sequence[Tensor] | None = None,
) -> None:
    """See reference.count_agreeing."""
    given = {**locals()}
    device = agreeing.device

    def launches() -> Launches:
        ops.CHECKS["count_agreeing"](**given)
        check_dense(grads, "grads", grads, device)
        check_dense(exp_avgs, "exp_avgs", grads)
        absent, used = [None] * len(grads), _used(exp_avgs, block_scales)
        return rows_by_dtypes(
            absent, grads, exp_avgs, lows=absent, block_scales=used, decided_by=(grads, exp_avgs)
        )

    tensors, addresses = identity(grads, exp_avgs, block_scales or ())
    key = ("count_agreeing", *tensors, *_layouts(agreeing), *_shapes(grad_scale))
    complement1, _ = _complements(beta1, 0.0, maximize)
    scale_address = _address(grad_scale, "grad_scale", device)
    with _on(device):
        found = tables(key, addresses, AGREEING.block, device=device, launches=launches)
        for (g_dtype, m_dtype), table in found:
            _agreeing_kernel[(table.n_tiles,)](
                table.rows, table.tile_rows, agreeing, beta1=beta1, complement1=complement1,
                grad_scale_address=scale_address,
                G=TRITON_DTYPES[g_dtype], M=TRITON_DTYPES[m_dtype],
                BLOCK=AGREEING.block, **options(AGREEING),
            )  # fmt: skip


def encode(
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    ballot: Tensor,
    blanks: Tensor | None,
    beta1: float,
    beta2: float,
    maximize: bool,
    seed: int,
    rank: int,
    step: Tensor,
    nonfinite: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    cautious: bool = False,
    block_scales: Sequence[Tensor] | None = None,
    first_word: int = 0,
    trailers: Tensor | None = None,
    trailer: Tensor | None = None,
    shared: Tensor | None = None,
) -> None:
    """See reference.encode."""
    given = {**locals()}
    device = ballot.device

    def launches() -> Launches:
        ops.CHECKS["encode"](**given)
        _check_words(ballot, "ballot", device, ballot.shape[0] * ballot.shape[2])
        _check_words(blanks, "blanks", device)
        _check_words(trailers, "trailers", device)
        _check_words(trailer, "trailer", device)
        _check_words(shared, "shared", device)
        check_dense(exp_avgs, "exp_avgs", exp_avgs, device)
        check_dense(grads, "grads", exp_avgs)
        absent, used = [None] * len(exp_avgs), _used(exp_avgs, block_scales)
        return rows_by_dtypes(
            absent, grads, exp_avgs, lows=absent, block_scales=used, decided_by=(grads, exp_avgs)
        )

    buffers = _layouts(ballot, blanks, trailers, trailer, shared)
    tensors, addresses = identity(grads, exp_avgs, block_scales or ())
    key = ("encode", *tensors, *buffers, first_word, *_shapes(step, grad_scale, found_inf))
    _check_place(step, "step", device, torch.int64)
    _check_place(nonfinite, "nonfinite", device, torch.int64)
    complement1, complement2 = _complements(beta1, beta2, maximize)
    coin_key = _signed(stream_key(seed, ZERO_STREAM))
    scale_address = _address(grad_scale, "grad_scale", device)
    found_inf_address = _address(found_inf, "found_inf", device)
    config = encode_config(cautious)
    with _on(device):
        found = tables(key, addresses, config.block, device=device, launches=launches)
        shards, planes, words_per_shard = ballot.shape
        for i, ((g_dtype, m_dtype), table) in enumerate(found):
            # The first launch has a program more for each shard, which writes its trailer.
            n_programs = table.n_tiles + (shards if i == 0 and trailers is not None else 0)
            _encode_kernel[(n_programs,)](
                table.rows, table.tile_rows, ballot,
                blanks_ptr=ballot if blanks is None else blanks,
                trailers_ptr=ballot if trailers is None else trailers,
                trailer_ptr=ballot if trailer is None else trailer,
                shared_ptr=step if shared is None else shared,
                nonfinite_ptr=nonfinite, step_ptr=step, beta1=beta1, complement1=complement1,
                beta2=beta2, complement2=complement2, key=coin_key, flip=-(rank & 1),
                first_word=first_word, words_per_shard=max(1, words_per_shard),
                shard_stride=ballot.stride(0), plane_stride=ballot.stride(1),
                blank_stride=_stride(blanks), trailers_stride=_stride(trailers),
                n_trailer_words=0 if trailer is None else trailer.numel(),
                n_shared=0 if shared is None else shared.numel(), n_tiles=table.n_tiles,
                grad_scale_address=scale_address, found_inf_address=found_inf_address,
                G=TRITON_DTYPES[g_dtype], M=TRITON_DTYPES[m_dtype], TERNARY=planes == 2,
                CAUTIOUS=cautious,
                BLOCK=config.block, **options(config),
            )  # fmt: skip


def _joined(trailers: Tensor) -> Tensor:
    """The trailers that each program of apply reads, those of a few ranks: of more, a launch before
    it makes two that say the same."""
    n_ranks, n_words = trailers.shape
    if n_ranks <= RANKS.value:
        return trailers
    joined = trailers.new_empty(2, n_words)
    _join_kernel[(-(-n_words // JOINED_WORDS.value),)](
        trailers, joined, n_ranks, trailers_stride=trailers.stride(0), n_trailer_words=n_words,
        num_warps=4,
    )  # fmt: skip
    return joined


def apply(
    params: Sequence[Tensor],
    verdict: Tensor,
    blanks: Tensor | None,
    trailers: Tensor,
    scale: int,
    lr: Tensor,
    weight_decay: float,
    step: Tensor,
    found_inf: Tensor | None = None,
    rounding: str = "nearest",
    lows: Sequence[Tensor] | None = None,
    seed: int = 0,
    cautious_decay: bool = False,
    first_word: int = 0,
    first_flag: int = 0,
) -> None:
    """See reference.apply."""
    given = {**locals()}
    device = verdict.device

    def launches() -> Launches:
        ops.CHECKS["apply"](**given)
        _check_words(verdict, "verdict", device, verdict.shape[0] * verdict.shape[2])
        _check_words(blanks, "blanks", device)
        _check_words(trailers, "trailers", device)
        check_dense(params, "params", params, device)
        absent, kept = [None] * len(params), _kept(params, lows)
        check_dense(kept, "lows", params)
        return rows_by_dtypes(
            params, absent, absent, lows=kept, block_scales=absent, decided_by=(params,)
        )

    buffers = _layouts(verdict, blanks, trailers)
    tensors, addresses = identity((), params, lows or ())
    key = (
        "apply", *tensors, rounding, *buffers, scale, first_word, first_flag,
        *_shapes(lr, step, found_inf),
    )  # fmt: skip
    _check_place(step, "step", device, torch.int64)
    rate = _rate(lr, device)
    found_inf_address = _address(found_inf, "found_inf", device)
    in_kernel = rounding != "stochastic"
    with _on(device):
        _, planes, words_per_shard = verdict.shape
        config = apply_config(planes)
        found = tables(key, addresses, config.block, device=device, launches=launches)
        joined = _joined(trailers)
        ranks = {
            "n_ranks": joined.shape[0],
            "trailers_stride": joined.stride(0),
            "n_trailer_words": joined.shape[1],
        }
        for i, ((dtype,), table) in enumerate(found):
            _apply_kernel[(table.n_tiles,)](
                table.rows, table.tile_rows, verdict,
                blanks_ptr=verdict if blanks is None else blanks, trailers_ptr=joined,
                step_ptr=step, **rate, weight_decay=_bits(weight_decay), scale=scale,
                inverse_scale=_bits(1.0 / scale), first_word=first_word,
                words_per_shard=max(1, words_per_shard), shard_stride=verdict.stride(0),
                plane_stride=verdict.stride(1), blank_stride=_stride(blanks), **ranks,
                first_flag=first_flag, advance=int(i == 0 and in_kernel),
                found_inf_address=found_inf_address, rounding_key=_rounding_key(seed),
                P=TRITON_DTYPES[dtype], ROUNDING=_rounding_of(rounding, dtype),
                PLANES=planes, BLANKS=blanks is not None, CAUTIOUS=cautious_decay,
                BLOCK=config.block, **options(config),
            )  # fmt: skip
        if not in_kernel:
            _advance_kernel[(1,)](
                step, joined, **ranks, found_inf_address=found_inf_address, num_warps=1
            )
