"""The election of a bucket: encode, exchange, count, apply, as one generator that stops while
ballots and verdicts travel; and the electorate, which holds one for each bucket of an optimizer.

Whoever drives an election decides what happens while it stops. Parameters are written when the
verdict is whole, and not before. Knows no optimizer.
"""

import weakref
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import double, ops
from ..bucket import Bucket
from ..options import Settings
from ..scaling import Scaling
from .agreement import union_of
from .buffers import Buffers
from .exchange import EXCHANGES
from .poll import Poll
from .wire import Transfer, Wire

# Marks the seed of the coins of float64 ballots.
_DOUBLES = 0x40


class Electorate:
    """The ranks that vote on the buckets of one optimizer, group after group."""

    votes = is_whole = True

    def __init__(self, wire: Wire, poll: Poll, exchange: str) -> None:
        self.wire, self.poll, self.exchange = wire, poll, EXCHANGES[exchange]
        self.drive = wire.drive
        # Of each group and kind, with the last bucket that they served.
        self._buffers: dict[tuple[int, bool], tuple[weakref.ref[Bucket], Buffers]] = {}
        # Of the last parameter on a GPU: NCCL sends Python objects by way of one.
        self._device = torch.device("cpu")
        self._voters: dict[int, list[Tensor]] = {}  # of each group, the same on every rank

    def is_member(self, p: Tensor) -> bool:
        return p.grad is not None or p.requires_grad

    def members(
        self, number: int, params: list[Tensor], mine: list[int]
    ) -> Generator[Transfer, None, list[int]]:
        """The indices of the parameters that this rank votes on or abstains from: those that have
        had a gradient, or might, on any rank. Ranks agree on them at a group's first step, and
        again where one gets a gradient that none expected, in the same step on every rank."""
        voters = set(map(id, self._voters.get(number, ())))
        known = [i for i, p in enumerate(params) if id(p) in voters]
        if number not in self._voters or not set(mine).issubset(known):
            self._device = next((p.device for p in params if p.is_cuda), self._device)
            grads = [p.grad for p in params]
            known = yield from union_of({*mine, *known}, self.wire, self._device)
            if not all(p.grad is g for p, g in zip(params, grads, strict=True)):
                raise RuntimeError("gradients must stay until the step of every rank has ended")
            self._voters[number] = [params[i] for i in known]
        return known

    def agreed(self, scaling: Scaling) -> Generator[Transfer, None, Scaling]:
        """Ranks scale and overflow on their own; a step that one of them skips, all must skip,
        before a momentum moves. Four bytes in one all-reduce, only under a GradScaler."""
        assert scaling.found_inf is not None
        found = scaling.found_inf.clone()
        yield self.wire.largest(found)
        return replace(scaling, found_inf=found)

    def move(
        self,
        number: int,
        bucket: Bucket,
        settings: Settings,
        scaling: Scaling,
        seed: int,
        step: Tensor | None,
        nonfinite: Tensor | None,
    ) -> Iterator[Transfer]:
        """The election of a bucket of group ``number``. seed, step: of the coins; step, int64 (1,),
        advances by one; nonfinite, int64 (1,), counts votes that abstain as they are not finite."""
        assert step is not None and nonfinite is not None
        buffers, encoded, applied = self._buffers_for(number, bucket), bucket, settings
        if bucket.is_double:
            encoded = double.ballot(bucket, settings, scaling)
            applied = double.ballot_settings(settings)
            # Other coins than those of the group's other ballot, at the same places.
            seed ^= _DOUBLES
        ops.encode(
            encoded.grads, encoded.exp_avgs, buffers.ballot_planes,
            flags=buffers.ballot_flags, beta1=settings.betas[0],
            beta2=settings.betas[1], maximize=settings.maximize, seed=seed, rank=self.wire.rank,
            step=step, nonfinite=nonfinite,
            grad_scale=None if bucket.is_double else scaling.grad_scale,
            found_inf=scaling.found_inf, cautious=settings.cautious,
            block_scales=encoded.block_scales,
        )  # fmt: skip
        count = partial(self.poll.count, seed=seed, step=step)
        yield from self.exchange(self.wire, buffers, count)
        ops.apply(
            encoded.params, buffers.verdict, buffers.presence,
            scale=self.poll.verdict_scale, lr=applied.lr, weight_decay=applied.weight_decay,
            step=step, found_inf=scaling.found_inf, rounding=applied.rounding, lows=encoded.lows,
            seed=seed, cautious_decay=applied.cautious_decay,
        )  # fmt: skip
        if bucket.is_double:
            double.apply(bucket, settings, encoded, self.poll.verdict_scale)

    def _buffers_for(self, number: int, bucket: Bucket) -> Buffers:
        """Those of a group's bucket; built anew when the list of voters changed."""
        key = (number, bucket.is_double)
        before, buffers = self._buffers.get(key, (None, None))
        if before is None or before() is not bucket or buffers is None:
            numels = tuple(p.numel() for p in bucket.params)
            is_same = buffers is not None and buffers.layout.numels == numels
            if buffers is None or not is_same or buffers.ballot.device != bucket.device:
                is_sharded = self.exchange is EXCHANGES["sharded"]
                buffers = Buffers.allocate(numels, self.poll, is_sharded, bucket.device)
            self._buffers[key] = weakref.ref(bucket), buffers
        return buffers
