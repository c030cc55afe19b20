"""Parameters in float64, and complex128 as pairs: the same update in float64 arithmetic, in plain
PyTorch, which is fast enough for what is trained in float64.

``step`` is what the op lion_step is to the other types. For a vote, ``ballot`` turns momenta into
gradients whose signs are the votes, so that encode packs them, and ``apply`` takes the verdict from
what the op apply wrote into the ballot's parameters.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .bucket import Bucket
from .int8 import read_momentum, write_momentum
from .options import Settings
from .scaling import Scaling

# No verdict writes a 2 into a parameter of the ballot: it writes -delta, of size 1 at most.
_ABSENT = 2.0


def _scale(block_scales: Sequence[Tensor] | None, i: int) -> Tensor | None:
    return block_scales[i] if block_scales else None


class _Moments:
    """A tensor's descent direction, c and next momentum; what must not move is marked."""

    def __init__(
        self,
        bucket: Bucket,
        i: int,
        settings: Settings,
        grad_scale: Tensor | None,
    ) -> None:
        g = bucket.grads[i]
        assert g is not None
        self.exp_avg, self.scale = bucket.exp_avgs[i], _scale(bucket.block_scales, i)
        self.m = read_momentum(self.exp_avg, self.scale).double()
        g = -g if settings.maximize else g
        self.g = g if grad_scale is None else g / grad_scale.reshape(()).double()
        beta1, beta2 = settings.betas
        self.c = self.m.mul(beta1).add(self.g, alpha=1 - beta1)
        self.next_m = self.m.mul(beta2).add(self.g, alpha=1 - beta2)
        self.agrees = self.c.sign() == self.g.sign()

    def sign(self, cautious: bool) -> Tensor:
        sign = torch.where(self.agrees, self.c.sign(), 0.0) if cautious else self.c.sign()
        return torch.where(self.c.isnan(), self.c, sign)

    def move_on(self, moves: Tensor) -> None:
        write_momentum(self.exp_avg, self.scale, torch.where(moves, self.next_m, self.m))


def _moves(found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Whether this step changes anything, on the device: a found infinity is not waited for."""
    if found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return found_inf.reshape(()) == 0


def step(bucket: Bucket, settings: Settings, scaling: Scaling, nonfinite: Tensor | None) -> None:
    """reference.lion_step in float64; ``nonfinite``: int64 (1,), counts skipped elements."""
    for i, p in enumerate(bucket.params):
        moments = _Moments(bucket, i, settings, scaling.grad_scale)
        moves = _moves(scaling.found_inf, p.device).expand(p.shape)
        if nonfinite is not None:
            finite = moments.c.isfinite()
            nonfinite += (moves & ~finite).sum()
            moves = moves & finite
        delta = moments.sign(settings.cautious)
        if settings.rescales:
            delta = delta * (p.numel() / ((delta.abs() == 1).sum().double() + 1))
        _update(p, delta, settings, moves)
        moments.move_on(moves)


def _update(p: Tensor, delta: Tensor, settings: Settings, moves: Tensor) -> None:
    rate = settings.lr.reshape(()).double()
    decayed = p * (1 - rate * settings.weight_decay)
    if settings.cautious_decay:
        decayed = torch.where(delta * p < 0, p, decayed)
    p.copy_(torch.where(moves, decayed - rate * delta, p))


def ballot(bucket: Bucket, settings: Settings, scaling: Scaling) -> Bucket:
    """A float32 bucket that encodes to this bucket's votes: its gradients are the signs of c, as
    encode reads them, NaN where c is not finite; its parameters wait for the verdict. Moves the
    momenta on."""
    votes: list[Tensor | None] = []
    for i, g in enumerate(bucket.grads):
        if g is None:
            votes.append(None)
            continue
        moments = _Moments(bucket, i, settings, scaling.grad_scale)
        finite = moments.c.isfinite()
        vote = torch.where(finite, moments.sign(settings.cautious), torch.nan)
        votes.append((-vote if settings.maximize else vote).float().contiguous())
        moments.move_on(finite & _moves(scaling.found_inf, g.device))
    shapes = [torch.empty_like(p, dtype=torch.float32) for p in bucket.params]
    return Bucket(
        params=[torch.full_like(t, _ABSENT) for t in shapes],
        grads=votes,
        exp_avgs=[torch.zeros_like(t) for t in shapes],
    )


def apply(bucket: Bucket, settings: Settings, verdict: Bucket, scale: int) -> None:
    """reference.apply in float64, from what the op apply wrote into the ballot's parameters with
    ``ballot_settings``: -delta, float32, or nothing where no rank had a gradient."""
    for p, written in zip(bucket.params, verdict.params, strict=True):
        # Multiples of 1 / scale, which float32 holds inexactly and far apart.
        delta = -(written.double() * scale).round() / scale
        _update(p, delta, settings, written != _ABSENT)


def ballot_settings(settings: Settings) -> Settings:
    """With which the op apply writes 0 * p - 1 * delta."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return replace(settings, lr=one, weight_decay=1.0, rounding="nearest", cautious_decay=False)
