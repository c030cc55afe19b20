"""What each op computes, in plain PyTorch: the readable specification, slow and allocating.

The formula of Lion (arXiv:2302.06675, Algorithm 2) and of the vote (arXiv:2404.00438, Algorithm 1)
stands here once as mathematics. Signatures are those of the ops in ops.py; results equal the
kernels' bit for bit, but for the last bit of a fused multiply-add that float64 rounds twice
(about one in 2**29 elements).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .coins import GAMMA, ROUNDING_STREAM, TIE_STREAM, ZERO_STREAM, mix64, stream_key
from .declare import checked
from .dense import like_storage, storage_order
from .int8 import read_momentum, write_momentum
from .layout import BITS_PER_WORD, DIGEST, READY, STATUS, room_of, words_of


def unpack(planes: Tensor) -> Tensor:
    """int32 planes (..., P, W) as the int64 integers they hold, (..., 32 * W)."""
    shifts = torch.arange(BITS_PER_WORD, device=planes.device)
    bits = (planes.to(torch.int64).unsqueeze(-1) >> shifts) & 1
    weights = 1 << torch.arange(planes.shape[-2], device=planes.device)
    return (bits.flatten(-2) * weights.unsqueeze(-1)).sum(-2)


def pack(integers: Tensor, n_planes: int) -> Tensor:
    """Integers (..., n) as int32 planes (..., P, ceil(n / 32)); padding elements are zero."""
    padded = torch.nn.functional.pad(
        integers.to(torch.int64), (0, -integers.shape[-1] % BITS_PER_WORD)
    )
    planes = (padded.unsqueeze(-2) >> torch.arange(n_planes).unsqueeze(-1)) & 1
    words = planes.unflatten(-1, (-1, BITS_PER_WORD)) << torch.arange(BITS_PER_WORD)
    return words.sum(-1).to(torch.int32)  # wraps: bit 31 is the sign bit


def coins(seed: int, stream: int, step: int, first_word: int, n_words: int) -> Tensor:
    """Fair coins, 0 or 1, of elements [32 * first_word, 32 * (first_word + n_words))."""
    key = mix64(stream_key(seed, stream) ^ step)
    words = [mix64(key + w * GAMMA) >> 32 for w in range(first_word, first_word + n_words)]
    word_tensor = torch.tensor(words, dtype=torch.int64).unsqueeze(-1)
    return ((word_tensor >> torch.arange(BITS_PER_WORD)) & 1).flatten()


def _scale(block_scales: Sequence[Tensor] | None, i: int) -> Tensor | None:
    return block_scales[i] if block_scales else None


def _fma(a: Tensor, b: float, c: Tensor) -> Tensor:
    """a * b + c in float32 with one rounding."""
    return (a.double() * b + c.double()).float()


def _f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def _interpolate(
    m: Tensor, g: Tensor, beta: float, maximize: bool, grad_scale: Tensor | None
) -> Tensor:
    """beta * m + (1 - beta) * g, with g negated for maximize and divided by the grad scale."""
    scale = 1.0 if grad_scale is None else grad_scale.item()
    complement = _f32(_f32(beta - 1 if maximize else 1 - beta) / scale)
    return _fma(g.float(), complement, m.float() * _f32(beta))


def _cautious(sign: Tensor, g: Tensor, maximize: bool) -> Tensor:
    """Signs that are not the gradient's, as it is descended, are 0."""
    return torch.where(sign == g.float().sign() * (-1 if maximize else 1), sign, 0.0)


@checked
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
    """c = beta1 * m + (1 - beta1) * g;  m = beta2 * m + (1 - beta2) * g;
    p = p * (1 - lr * weight_decay) - lr * sign(c), with sign(NaN) = NaN. Cautious: a sign that is
    not g's is 0; with ``agreeing``, the update is multiplied by elements / (agreeing + 1). Cautious
    decay: no decay where sign(c) * p < 0."""
    if _is_set(found_inf):
        return
    decay = _f32(1 - lr.item() * weight_decay)
    put = _Rounding(params, rounding, lows, seed, step)
    for i, (g, exp_avg) in enumerate(zip(grads, exp_avgs, strict=True)):
        m = read_momentum(exp_avg, _scale(block_scales, i)).float()
        c = _interpolate(m, g, beta1, maximize, grad_scale)
        next_m = _interpolate(m, g, beta2, maximize, grad_scale)
        sign = _cautious(c.sign(), g, maximize) if cautious else c.sign()
        sign = torch.where(c.isnan(), c, sign)
        p, step_size = put.parameter(i), _f32(lr.item())
        if agreeing is not None:
            factor = _f32(p.numel()) / _f32(int(agreeing[i]) + 1)
            step_size = _f32(step_size * _f32(factor))
        next_p = _fma(p, decay, -step_size * sign)
        if cautious_decay:
            next_p = torch.where(sign * p < 0, _fma(p, 1.0, -step_size * sign), next_p)
        if nonfinite is not None:
            skip = ~c.isfinite()
            nonfinite += skip.sum()
            next_p = torch.where(skip, p, next_p)
            next_m = torch.where(skip, m, next_m)
        put.store(i, next_p)
        write_momentum(exp_avg, _scale(block_scales, i), next_m)
    if step is not None:
        step += 1


@checked
def count_agreeing(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    agreeing: Tensor,
    beta1: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    block_scales: Sequence[Tensor] | None = None,
) -> None:
    """Adds to agreeing[i] the elements of tensor i where sign(c) is g's, as g is descended."""
    for i, (g, exp_avg) in enumerate(zip(grads, exp_avgs, strict=True)):
        c = _interpolate(
            read_momentum(exp_avg, _scale(block_scales, i)), g, beta1, maximize, grad_scale
        )
        agreeing[i] += (_cautious(c.sign(), g, maximize).abs() == 1).sum()


@checked
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
    """vote = sign(c), sent as v = (vote + 1) / 2 (one plane) or v = vote + 1 (two planes). Beside
    one plane, a word whose votes are all zero is blank, its bits 0; a zero elsewhere is a coin, its
    opposite on every other rank, and in every other step. A non-finite c votes zero and leaves its
    momentum; cautious, a vote that is not the gradient's sign is zero."""
    if trailers is not None and trailer is not None and shared is not None:
        trailers.copy_(_sealed(trailer, shared))
    if _is_set(found_inf):
        return
    votes, valid = [], []
    for i, (g, exp_avg) in enumerate(zip(grads, exp_avgs, strict=True)):
        m = read_momentum(exp_avg, _scale(block_scales, i)).float()
        vote = torch.zeros_like(m)
        if g is not None:
            c = _interpolate(m, g, beta1, maximize, grad_scale)
            abstain = ~c.isfinite()
            vote = _cautious(c.sign(), g, maximize) if cautious else c.sign()
            vote = torch.where(abstain, 0.0, vote)
            next_m = _interpolate(m, g, beta2, maximize, grad_scale)
            write_momentum(exp_avg, _scale(block_scales, i), torch.where(abstain, m, next_m))
            nonfinite += abstain.sum()
        pad = (0, BITS_PER_WORD * room_of(m.numel()) - m.numel())
        flat = storage_order(torch.empty_like(m).copy_(vote)).long()
        votes.append(torch.nn.functional.pad(flat, pad))
        valid.append(torch.nn.functional.pad(torch.ones_like(flat), pad))
    v, is_element = (
        torch.cat(votes or [torch.empty(0).long()]),
        torch.cat(valid or [torch.empty(0).long()]),
    )
    n_words = v.numel() // BITS_PER_WORD
    if ballot.shape[1] == 2:
        _put(ballot, first_word, pack((v + 1) * is_element, 2))
        return
    assert blanks is not None
    by_word = v.view(n_words, BITS_PER_WORD), is_element.view(n_words, BITS_PER_WORD)
    blank = (by_word[0] == 0).all(1) & by_word[1].any(1)
    count = int(step.item())
    toss = coins(seed, ZERO_STREAM, count // 2, first_word, n_words) ^ ((rank + count) & 1)
    bits = torch.where(v == 0, toss, (v + 1) // 2)
    is_vote = is_element * ~blank.repeat_interleave(BITS_PER_WORD)
    _put(ballot, first_word, pack(bits * is_vote, 1))
    words_per_shard, flags = ballot.shape[2], unpack(blanks.unsqueeze(1))
    for k, is_blank in enumerate(blank.long().tolist(), first_word):
        flags[k // words_per_shard, k % words_per_shard] = is_blank
    blanks.copy_(pack(flags, 1).squeeze(1))


def _put(ballot: Tensor, first_word: int, planes: Tensor) -> None:
    """Writes planes (planes, words) into a ballot, from a word of word space on."""
    whole = ballot.transpose(0, 1).flatten(1).clone()
    whole[:, first_word : first_word + planes.shape[1]] = planes
    ballot.copy_(whole.unflatten(1, (ballot.shape[0], ballot.shape[2])).transpose(0, 1))


def _sealed(trailer: Tensor, shared: Tensor) -> Tensor:
    """A trailer whose digest has taken up what is shared."""
    low, high = (int(word) & 0xFFFFFFFF for word in trailer[DIGEST:].tolist())
    digest = low | high << 32
    for value in shared.tolist():
        digest = mix64(digest ^ (value & 2**64 - 1))
    sealed = trailer.clone()
    words = torch.tensor([digest & 0xFFFFFFFF, digest >> 32], dtype=torch.int64)
    sealed[DIGEST:] = words.to(torch.int32)  # wraps
    return sealed


def _sum(
    ballots: Tensor,
    scale: int,
    first_word: int,
    seed: int,
    step: Tensor,
    blanks: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twice the sum of the ballots' integers, blank words at their middle; each element's coin; and
    which words all left blank."""
    n, _, n_words = ballots.shape
    weight = torch.ones(n, dtype=torch.int64) if weights is None else weights.long()
    twice = 2 * unpack(ballots)
    is_blank = torch.zeros(n, n_words, dtype=torch.int64)
    if blanks is not None:
        is_blank = unpack(blanks.unsqueeze(1))[:, :n_words]
        twice = torch.where(is_blank.repeat_interleave(BITS_PER_WORD, 1) == 1, 1, twice)
    toss = coins(seed, TIE_STREAM, int(step.item()), first_word, n_words)
    return (twice * weight.unsqueeze(1)).sum(0), toss, is_blank.all(0)


@checked
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
    """The sum of the ballots' integers, a half rounded by a coin; 0 in a word that is blank."""
    twice, toss, is_blank = _sum(ballots, scale, first_word, seed, step, blanks, weights)
    v = (twice + toss) // 2
    _write_count(v, is_blank, tally, out_blanks)


def _write_count(v: Tensor, is_blank: Tensor, out: Tensor, out_blanks: Tensor | None) -> None:
    if out_blanks is not None:
        v = torch.where(is_blank.repeat_interleave(BITS_PER_WORD), 0, v)
        pad = BITS_PER_WORD * out_blanks.shape[1] - is_blank.numel()
        out_blanks.copy_(pack(torch.nn.functional.pad(is_blank.long(), (0, pad)), 1))
    out.copy_(pack(v, out.shape[0]))


@checked
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
    """The sum v of the ballots against scale / 2. One plane: 1 where v is more, or a tie's coin
    falls so, 0 in a word that is blank; two planes: 0, 1 or 2 where v is less, equal or more."""
    twice, toss, is_blank = _sum(ballots, scale, first_word, seed, step, blanks, weights)
    if verdict.shape[0] == 2:
        v = (twice >= scale).long() + (twice > scale).long()
    else:
        v = torch.where(twice == scale, toss, (twice > scale).long())
    _write_count(v, is_blank, verdict, out_blanks)


@checked
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
    """p = p * (1 - lr * weight_decay) - (lr / scale) * (2 * v - scale), without the last term in a
    blank word, for tensors that any rank flagged as present; the others are left alone. Cautious
    decay: none where (2 * v - scale) * p is below 0. Nothing where a rank is not ready, or another
    has another digest."""
    seals = trailers[:, DIGEST:]
    is_agreed = bool((trailers[:, STATUS] == READY).all() and (seals == seals[:1]).all())
    if _is_set(found_inf) or not is_agreed:
        return
    put = _Rounding(params, rounding, lows, seed, step)
    decay, step_size = _f32(1 - lr.item() * weight_decay), _f32(lr.item() * (1 / scale))
    flags = unpack(trailers.unsqueeze(-2)).any(0)
    sums = 2 * unpack(verdict).flatten() - scale
    if blanks is not None:
        is_blank = unpack(blanks.unsqueeze(1))[:, : verdict.shape[2]].flatten()
        sums = torch.where(is_blank.repeat_interleave(BITS_PER_WORD) == 1, 0, sums)
    sums = sums[BITS_PER_WORD * first_word :]
    present = flags[first_flag:].tolist()
    for i, (p, span) in enumerate(zip(params, _spans(params), strict=True)):
        if present[i]:
            delta = like_storage(sums[span].float(), p)
            whole = put.parameter(i)
            next_p = _fma(whole, decay, -step_size * delta)
            if cautious_decay:
                kept = _fma(whole, 1.0, -step_size * delta)
                next_p = torch.where(delta * whole < 0, kept, next_p)
            put.store(i, next_p)
    step += 1


def random_bits(seed: int, step: int, first_word: int, n_words: int) -> Tensor:
    """16 random bits, int64, of elements [32 * first_word, 32 * (first_word + n_words))."""
    key = mix64(stream_key(seed, ROUNDING_STREAM) ^ step)
    hashes = [mix64(key + w * GAMMA) for w in range(first_word, first_word + n_words)]
    low = torch.tensor([h & 0xFFFFFFFF for h in hashes], dtype=torch.int64).unsqueeze(-1)
    high = torch.tensor([h >> 32 for h in hashes], dtype=torch.int64).unsqueeze(-1)
    x = (torch.arange(16) * 0x9E3779B9 + low) & 0xFFFFFFFF
    x = _multiply32(x ^ (x >> 16), 0x7FEB352D)
    x = _multiply32(x ^ (x >> 15), 0x846CA68B)
    x = x ^ (x >> 16) ^ high
    return torch.cat([x & 0xFFFF, x >> 16], dim=1).flatten()


def _multiply32(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product, in int64 that must not overflow."""
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & 0xFFFFFFFF


def round_at_random(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x to one of its two neighbours in a 16-bit dtype, the nearer one more often."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    if dtype == torch.bfloat16:
        cut = (bits + random) & 0xFFFF0000
    else:
        noise, magnitude = random & 0x1FFF, x.abs()
        cut = (bits + noise) & 0xFFFFE000
        # Below 2**-14 float16 has a fixed point: multiples of 2**-24.
        units = torch.where(magnitude < 2**-14, magnitude, 0) * 2.0**24 + noise.float() * 2**-13
        tiny = (units.floor() * 2.0**-24).view(torch.int32).long() | (bits & 0x80000000)
        cut = torch.where(magnitude < 2**-14, tiny, cut)
    rounded = (cut - ((cut >> 31) << 32)).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


class _Rounding:
    """How parameters of a list are read as float32 and stored again."""

    def __init__(
        self,
        params: Sequence[Tensor],
        rounding: str,
        lows: Sequence[Tensor] | None,
        seed: int,
        step: Tensor | None,
    ) -> None:
        self.params, self.rounding, self.lows = params, rounding, lows or []
        self.seed, self.step = seed, 0 if step is None else int(step.item())
        self.first_words = [span.start // BITS_PER_WORD for span in _spans(params)]

    def parameter(self, i: int) -> Tensor:
        p = self.params[i]
        if self.rounding != "compensated" or p.dtype == torch.float32:
            return p.float()
        if p.dtype == torch.float16:
            return p.float() + self.lows[i].float()
        return (p.float().view(torch.int32) + self.lows[i].int()).view(torch.float32)

    def store(self, i: int, x: Tensor) -> None:
        p = self.params[i]
        if self.rounding == "nearest" or p.dtype == torch.float32:
            p.copy_(x)
        elif self.rounding == "stochastic":
            random = random_bits(self.seed, self.step, self.first_words[i], words_of(p.numel()))
            p.copy_(round_at_random(x, like_storage(random[: p.numel()], p), p.dtype))
        elif p.dtype == torch.float16:
            p.copy_(x)
            dropped = x - p.float()
            self.lows[i].copy_(torch.where(dropped.isfinite(), dropped, 0))
        else:
            # Ties go away from zero, so that what is dropped fits 16 bits with a sign.
            bits, finite = x.view(torch.int32).long(), x.isfinite()
            kept = (bits + 0x8000) & ~0xFFFF
            p.copy_(torch.where(finite, kept.to(torch.int32).view(torch.float32), x))
            self.lows[i].copy_(torch.where(finite, bits - kept, 0))


def _is_set(found_inf: Tensor | None) -> bool:
    return found_inf is not None and found_inf.item() != 0


def _spans(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Each tensor's elements in word space."""
    word = 0
    for t in tensors:
        yield slice(word * BITS_PER_WORD, word * BITS_PER_WORD + t.numel())
        word += room_of(t.numel())
