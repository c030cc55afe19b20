"""The op table: an op is one block, which says what it computes, from what, and what it refuses.

Back ends register into it: the CPU's from csrc/, when native.py loads it; the GPU's from kernels/.
All ops write into buffers that the caller owns and return nothing. Lists may mix sizes and dtypes;
ballots, tallies and verdicts are int32 planes as layout.py lays them out, and blank bits beside
those of an odd scale. reference.py has the formulas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .declare import CHECKS as CHECKS
from .declare import SCHEMAS as SCHEMAS
from .declare import op
from .int8 import blocks_of
from .layout import BITS_PER_WORD, MAX_SCALE, OCTET, SEAL_WORDS, room_of, words_of

ROUNDINGS = ("nearest", "stochastic", "compensated")
STORAGE_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
MOMENTUM_DTYPES: tuple[torch.dtype, ...] = (*STORAGE_DTYPES, torch.int8)


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_storage(tensors: Sequence[Tensor | None], name: str) -> None:
    for i, t in enumerate(tensors):
        if t is not None and t.dtype not in STORAGE_DTYPES:
            raise ValueError(f"{name}[{i}] must be float32, bfloat16 or float16, got {t.dtype}")


def _check_written(params: Sequence[Tensor | None]) -> None:
    """PyTorch lets optional tensors pass that are missing, or the negatives of their storage."""
    for i, p in enumerate(params):
        _rule(p is not None, f"params[{i}] must be a tensor, got None")
        _rule(p is None or not p.is_neg(), f"params[{i}] must not be a negative view")


def _check_momenta(exp_avgs: Sequence[Tensor], block_scales: Sequence[Tensor] | None) -> None:
    for i, m in enumerate(exp_avgs):
        if m.dtype not in MOMENTUM_DTYPES:
            raise ValueError(
                f"exp_avgs[{i}] must be float32, bfloat16, float16 or int8, got {m.dtype}"
            )
        if m.dtype != torch.int8:
            continue
        n = len(block_scales or ())
        _rule(n == len(exp_avgs), f"block_scales must have {len(exp_avgs)} tensors, got {n}")
        scale, blocks = (block_scales or ())[i], blocks_of(m.numel())
        _rule(
            scale.dtype == torch.float32 and scale.shape == (blocks,) and scale.is_contiguous(),
            f"block_scales[{i}] must be contiguous float32 of shape [{blocks}], got {scale.dtype} "
            f"of shape {list(scale.shape)} with strides {list(scale.stride())}",
        )
        _rule(
            scale.device == m.device, f"block_scales[{i}] must be on {m.device}, got {scale.device}"
        )


def _check_pairs(
    left: Sequence[Tensor | None], right: Sequence[Tensor], left_name: str, right_name: str
) -> None:
    _rule(
        len(left) == len(right),
        f"{left_name} and {right_name} must have equal lengths, got {len(left)} and {len(right)}",
    )
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a is not None:
            _rule(
                a.shape == b.shape,
                f"{left_name}[{i}] must have shape {list(b.shape)}, got {list(a.shape)}",
            )


def _check_planes(planes: Tensor, name: str, dims: int) -> None:
    _rule(planes.dtype == torch.int32, f"{name} must be int32, got {planes.dtype}")
    _rule(
        planes.dim() == dims,
        f"{name} must have {dims} dimensions, got shape {list(planes.shape)}",
    )


def _check_room(tensors: Sequence[Tensor], planes: Tensor, name: str, first_word: int) -> None:
    words_per_shard = planes.shape[2]
    _rule(
        words_per_shard % OCTET == 0,
        f"{name} must have a multiple of {OCTET} words a shard, got {words_per_shard}",
    )
    _rule(
        first_word >= 0 and first_word % OCTET == 0,
        f"first_word must be a multiple of {OCTET}, got {first_word}",
    )
    room = planes.shape[0] * words_per_shard
    need = first_word + sum(room_of(t.numel()) for t in tensors)
    _rule(need <= room, f"{name} has room for {room} words a plane, the tensors need {need}")


def _check_blanks(blanks: Tensor | None, name: str, planes: Tensor, wanted: str | None) -> None:
    """Blank bits of planes (n, ..., words), or of planes (n, words) as (1, ...); ``wanted``: why
    they must be there, None where they may not be."""
    if blanks is None or wanted is None:
        _rule(blanks is None and wanted is None, f"{name} must be {wanted or 'None'}")
        return
    n, words = (planes.shape[0] if planes.dim() == 3 else 1), words_of(planes.shape[-1])
    _check_planes(blanks, name, 2)
    _rule(
        blanks.shape[0] == n and blanks.shape[1] >= words,
        f"{name} must have shape [{n}, {words} or more], got {list(blanks.shape)}",
    )
    _rule(blanks.device == planes.device, f"{name} must be on {planes.device}, got {blanks.device}")


def check_one(tensor: Tensor, name: str) -> None:
    _rule(
        tensor.numel() == 1,
        f"{name} must have one element, got shape {list(tensor.shape)}",
    )


def _check_flags(trailers: Tensor, first_flag: int, n_tensors: int) -> None:
    _check_planes(trailers, "trailers", 2)
    room = (trailers.shape[1] - SEAL_WORDS) * BITS_PER_WORD
    _rule(first_flag >= 0, f"first_flag must be at least 0, got {first_flag}")
    _rule(
        first_flag + n_tensors <= room,
        f"trailers have {max(0, room)} flags, got {first_flag + n_tensors} tensors",
    )


def _check_trailer(trailers: Tensor | None, trailer: Tensor | None, shared: Tensor | None) -> None:
    if trailers is None or trailer is None or shared is None:
        missing = all(t is None for t in (trailers, trailer, shared))
        _rule(missing, "trailers, trailer and shared must be given together")
        return
    _check_planes(trailers, "trailers", 2)
    _check_planes(trailer, "trailer", 1)
    n = trailers.shape[1]
    _rule(n >= SEAL_WORDS, f"trailers must have at least {SEAL_WORDS} words, got {n}")
    _rule(trailer.shape[0] == n, f"trailer must have {n} words, got {trailer.shape[0]}")
    is_right = shared.dtype == torch.int64 and shared.dim() == 1 and shared.is_contiguous()
    _rule(
        is_right,
        f"shared must be contiguous int64 of one dimension, got {shared.dtype} of shape "
        f"{list(shared.shape)} with strides {list(shared.stride())}",
    )


def _check_amp(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    for tensor, name in ((grad_scale, "grad_scale"), (found_inf, "found_inf")):
        if tensor is not None:
            check_one(tensor, name)
            _rule(tensor.dtype == torch.float32, f"{name} must be float32, got {tensor.dtype}")


def low_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What keeps the bits that a parameter's storage type drops; None: it drops none."""
    return {torch.bfloat16: torch.int16, torch.float16: torch.float16}.get(dtype)


def _check_rounding(
    rounding: str, lows: Sequence[Tensor] | None, params: Sequence[Tensor], step: Tensor | None
) -> None:
    _rule(
        rounding in ROUNDINGS,
        f"rounding must be {', '.join(ROUNDINGS[:-1])} or {ROUNDINGS[-1]}, got {rounding}",
    )
    wanted = len(params) if rounding == "compensated" else 0
    lows = [] if lows is None else lows
    _rule(len(lows) == wanted, f"lows must have {wanted} tensors, got {len(lows)}")
    for i, (low, p) in enumerate(zip(lows, params, strict=False)):
        dtype = low_dtype(p.dtype)
        if dtype is not None:
            _rule(low.dtype == dtype, f"lows[{i}] must be {dtype}, got {low.dtype}")
            _rule(
                low.shape == p.shape,
                f"lows[{i}] must have shape {list(p.shape)}, got {list(low.shape)}",
            )
    _rule(
        rounding != "stochastic" or step is not None,
        "stochastic rounding needs step, the counter of its random bits",
    )
    _check_counter(step, "step")


def _check_agreeing(agreeing: Tensor, n_tensors: int) -> None:
    is_right = agreeing.dtype == torch.int64 and agreeing.shape == (n_tensors,)
    _rule(
        is_right and agreeing.is_contiguous(),
        f"agreeing must be contiguous int64 of shape [{n_tensors}], got {agreeing.dtype} of shape "
        f"{list(agreeing.shape)} with strides {list(agreeing.stride())}",
    )


def _check_ballots(
    ballots: Tensor,
    out: Tensor,
    name: str,
    scale: int,
    step: Tensor,
    blanks: Tensor | None,
    out_blanks: Tensor | None,
    weights: Tensor | None,
) -> None:
    _check_planes(ballots, "ballots", 3)
    _check_planes(out, name, 2)
    _rule(1 <= scale <= MAX_SCALE, f"scale must be in [1, {MAX_SCALE}], got {scale}")
    _rule(
        ballots.shape[2] == out.shape[1],
        f"{name} must have {ballots.shape[2]} words a plane, got {out.shape[1]}",
    )
    _check_counter(step, "step")
    _check_blanks(blanks, "blanks", ballots, None if blanks is None else "there")
    _rule(
        blanks is None or ballots.shape[1] == 1,
        f"blanks are of ballots of 1 plane, got {ballots.shape[1]}",
    )
    says_zero = out.shape[0] == 2 if name == "verdict" else scale % 2 == 0
    needs = "there: an odd scale cannot say zero"
    wanted = None if blanks is None or says_zero else needs
    _check_blanks(out_blanks, "out_blanks", out, wanted)
    if weights is None:
        return
    _rule(
        weights.dtype == torch.int32
        and weights.shape == (ballots.shape[0],)
        and weights.is_contiguous()
        and weights.device == ballots.device,
        f"weights must be contiguous int32 of shape [{ballots.shape[0]}] on {ballots.device}, got "
        f"{weights.dtype} of shape {list(weights.shape)} on {weights.device}",
    )


def _check_counter(tensor: Tensor | None, name: str) -> None:
    if tensor is not None:
        check_one(tensor, name)
        _rule(tensor.dtype == torch.int64, f"{name} must be int64, got {tensor.dtype}")


# What several ops take. `grad_scale`, float32 (1,), divides the gradients; where `found_inf`,
# float32 (1,), is not zero, the op changes nothing. `step`, int64 (1,), goes into the coins; what
# writes parameters ends the step, and adds 1 to it. `rounding`: "nearest"; "stochastic", random
# bits from (seed, step, element); "compensated", where lows[i] keeps what parameter i drops: int16
# for bfloat16, float16 for float16, not read otherwise. `cautious`: a sign that is not the
# gradient's is 0. `cautious_decay`: weights decay only where that is the update's direction. Where
# exp_avgs[i] is int8, block_scales[i] holds a float32 for every 128 elements of its storage, as
# int8.py says. No parameter may be None: they are optional because PyTorch takes parameters into
# such a list in half the time (lion_step of 2,000 tensors of 64 elements: 0.62 ms instead of 0.89;
# AMD EPYC, one thread, 2026-11-26).


@op(
    "(Tensor(a!)?[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor lr, float beta1, "
    "float beta2, float weight_decay, bool maximize, Tensor(c!)? nonfinite=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, str rounding='nearest', "
    "Tensor(d!)[]? lows=None, int seed=0, Tensor(e!)? step=None, bool cautious=False, "
    "bool cautious_decay=False, Tensor(f!)[]? block_scales=None, Tensor? agreeing=None, "
    "bool uniform=False) -> ()"
)
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
    """One device's step: what encode and apply do, in one pass. ``nonfinite``, int64 (1,), counts
    the elements whose c is not finite, which stay as they are; without it none is skipped, and a
    NaN shows in the parameter. With ``agreeing``, what count_agreeing counted, a cautious update is
    multiplied by a tensor's elements over (agreeing + 1). ``uniform``: parameters must be of one
    dtype, and momenta of one."""
    _check_written(params)
    _check_pairs(grads, params, "grads", "params")
    _check_pairs(exp_avgs, params, "exp_avgs", "params")
    _check_storage(params, "params")
    _check_storage(grads, "grads")
    _check_momenta(exp_avgs, block_scales)
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        _rule(g.dtype == p.dtype, f"grads[{i}] must be {p.dtype}, got {g.dtype}")
    check_one(lr, "lr")
    _check_counter(nonfinite, "nonfinite")
    _check_amp(grad_scale, found_inf)
    _check_rounding(rounding, lows, params, step)
    if agreeing is not None:
        _rule(cautious, "agreeing rescales a cautious update, got cautious=False")
        _check_agreeing(agreeing, len(params))
    for tensors, name in ((params, "params"), (exp_avgs, "exp_avgs")) if uniform else ():
        for i, t in enumerate(tensors):
            _rule(t.dtype == tensors[0].dtype, f"{name}[{i}] must be of the first one's dtype")


@op(
    "(Tensor[] grads, Tensor[] exp_avgs, Tensor(a!) agreeing, float beta1, bool maximize, "
    "Tensor? grad_scale=None, Tensor[]? block_scales=None) -> ()"
)
def count_agreeing(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    agreeing: Tensor,
    beta1: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    block_scales: Sequence[Tensor] | None = None,
) -> None:
    """Adds to ``agreeing``, int64 (tensors,), how many elements of each tensor have sign(c) =
    sign(g), not 0."""
    _check_pairs(grads, exp_avgs, "grads", "exp_avgs")
    _check_storage(grads, "grads")
    _check_momenta(exp_avgs, block_scales)
    _check_agreeing(agreeing, len(grads))
    _check_amp(grad_scale, None)


@op(
    "(Tensor?[] grads, Tensor(a!)[] exp_avgs, Tensor(b!) ballot, Tensor(c!)? blanks, float beta1, "
    "float beta2, bool maximize, int seed, int rank, Tensor step, Tensor(d!) nonfinite, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, bool cautious=False, "
    "Tensor(e!)[]? block_scales=None, int first_word=0, Tensor(f!)? trailers=None, "
    "Tensor? trailer=None, Tensor? shared=None) -> ()"
)
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
    """A rank's votes, and its momenta moved on. ``ballot``: (shards, 1 or 2 planes, words), written
    from ``first_word`` of word space on, to the end of the tensors' last octet; ``blanks``: of
    binary ballots, (shards, words / 32). A gradient of None abstains; ``nonfinite``, int64 (1,),
    counts the elements that abstain because c is not finite. Every row of ``trailers``, (shards,
    words), becomes ``trailer``, (words,), whose digest takes up ``shared``, int64 (n,): also where
    ``found_inf`` is set."""
    _check_pairs(grads, exp_avgs, "grads", "exp_avgs")
    _check_storage(grads, "grads")
    _check_momenta(exp_avgs, block_scales)
    _check_planes(ballot, "ballot", 3)
    _rule(
        ballot.shape[1] in (1, 2),
        f"ballot must have 1 plane (binary) or 2 (ternary), got {ballot.shape[1]}",
    )
    _check_room(exp_avgs, ballot, "ballot", first_word)
    wanted = "there: one plane cannot say zero" if ballot.shape[1] == 1 else None
    _check_blanks(blanks, "blanks", ballot, wanted)
    _check_trailer(trailers, trailer, shared)
    _rule(
        trailers is None or trailers.shape[0] == ballot.shape[0],
        f"trailers must have a row for each of {ballot.shape[0]} shards",
    )
    _check_counter(step, "step")
    _check_counter(nonfinite, "nonfinite")
    _check_amp(grad_scale, found_inf)


# What tally and elect take. ``scale``: what the integers of all ballots can sum up to; ``blanks``,
# of ballots of one plane, (n, words / 32): whose words stand at the middle; ``out_blanks``, (1,
# words / 32), beside an odd scale: words that all left blank; ``weights``, int32 (n,), at least 1:
# as how many ballots each counts. ``first_word``: where word 0 lies in word space, for the coins.


@op(
    "(Tensor ballots, Tensor(a!) tally, int scale, int first_word, int seed, Tensor step, "
    "Tensor? blanks=None, Tensor(b!)? out_blanks=None, Tensor? weights=None) -> ()"
)
def tally(
    ballots: Tensor,
    tally: Tensor,
    scale: int,
    first_word: int,
    seed: int,
    step: Tensor,
    blanks: Tensor | None = None,
    out_blanks: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """The sum of ``ballots``, integers in (n, planes, words), into ``tally``, (planes, words). A
    blank word counts half; a half that is left is a coin's."""
    _check_ballots(ballots, tally, "tally", scale, step, blanks, out_blanks, weights)
    _rule(
        tally.shape[0] == scale.bit_length(),
        f"tally must have {scale.bit_length()} planes for scale {scale}, got {tally.shape[0]}",
    )


@op(
    "(Tensor ballots, Tensor(a!) verdict, int scale, int first_word, int seed, Tensor step, "
    "Tensor? blanks=None, Tensor(b!)? out_blanks=None, Tensor? weights=None) -> ()"
)
def elect(
    ballots: Tensor,
    verdict: Tensor,
    scale: int,
    first_word: int,
    seed: int,
    step: Tensor,
    blanks: Tensor | None = None,
    out_blanks: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """The sum of ``ballots`` against scale / 2, into ``verdict``, (1 or 2 planes, words): one plane
    tosses a coin for a tie, two hold 0, 1 or 2."""
    _check_ballots(ballots, verdict, "verdict", scale, step, blanks, out_blanks, weights)
    _rule(
        verdict.shape[0] == 1 or (verdict.shape[0] == 2 and scale % 2 == 0),
        "verdict must have 1 plane, or 2 where scale is even; "
        f"got {verdict.shape[0]} for scale {scale}",
    )


@op(
    "(Tensor(a!)?[] params, Tensor verdict, Tensor? blanks, Tensor trailers, int scale, Tensor lr, "
    "float weight_decay, Tensor(b!) step, Tensor? found_inf=None, str rounding='nearest', "
    "Tensor(c!)[]? lows=None, int seed=0, bool cautious_decay=False, int first_word=0, "
    "int first_flag=0) -> ()"
)
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
    """The update of the parameters that any rank voted on. ``verdict``: (shards, planes, words),
    integers v that stand for the direction (2 * v - scale) / scale, in blank words for none;
    ``blanks``: (shards, words / 32), of an odd scale, if it has any. ``trailers``: (ranks, words),
    those of every rank; the parameters' flags begin at ``first_flag``. Writes nothing unless every
    rank is ready and their digests are equal."""
    _check_written(params)
    _check_storage(params, "params")
    _check_planes(verdict, "verdict", 3)
    _rule(scale >= 1, f"scale must be at least 1, got {scale}")
    _check_flags(trailers, first_flag, len(params))
    _check_room(params, verdict, "verdict", first_word)
    _check_blanks(blanks, "blanks", verdict, "there" if blanks is not None else None)
    check_one(lr, "lr")
    _check_amp(None, found_inf)
    _check_rounding(rounding, lows, params, step)
