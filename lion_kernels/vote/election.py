"""The election of buckets: encode, exchange, count, apply, as one generator that stops while
ballots and verdicts travel; and the electorate, which holds what one optimizer's elections need.

All buckets of a device, of one kind, have one election. Whoever drives it decides what happens
while it stops. Parameters are written when the verdict is whole and every rank was ready, and not
before. Knows no optimizer.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import double, ops
from ..bucket import Bucket, Move
from ..layout import READY, cap_at_two
from ..options import Settings
from ..scaling import Scaling
from .agreement import CHANGED, COUNTS, REFUSES, ask, union_of
from .audit import audit
from .booth import Booth
from .buffers import Buffers
from .exchange import EXCHANGES
from .poll import Poll
from .roll_call import Owner, RollCall
from .statistics import Statistics, VoteStatistics, counts_of, summed
from .wire import Transfer, Wire

# Marks the seed of the coins of float64 ballots.
_DOUBLES = 0x40
# The buckets of one election: their device, and whether they are float64.
_Family = tuple[torch.device, bool]


class Electorate:
    """The ranks that vote on the buckets of one optimizer, step after step."""

    votes = is_whole = True

    def __init__(
        self,
        wire: Wire,
        poll: Poll,
        exchange: str,
        owner: Owner,
        statistics_every: int = 0,
        audit_every: int = 0,
    ) -> None:
        self.wire, self.poll, self.exchange = wire, poll, EXCHANGES[exchange]
        self.drive, self._owner = wire.drive, owner
        self._statistics_every, self._audit_every = statistics_every, audit_every
        self.roll_call = RollCall(wire, self.exchange, owner)
        # By family, in the order of a step, which is the same on every rank.
        self._booths: dict[_Family, Booth] = {}
        self._voters: list[list[Tensor]] = []  # of each group, the same on every rank
        self._n_elections = 0
        self._statistics: list[Statistics] = []  # with votes that were not read

    def is_member(self, p: Tensor) -> bool:
        return p.grad is not None or p.requires_grad

    def open(self) -> Iterator[Transfer]:
        """What comes first where all ranks come together."""
        yield from self.roll_call.open()

    def refuse(self, error: Exception) -> Iterator[Transfer]:
        """Tells every rank of an error of this one, and raises it on all."""
        yield from self.announce(REFUSES, error)

    def announce(
        self, status: int, error: Exception | None = None, first: int = 0
    ) -> Iterator[Transfer]:
        """Takes part in the exchanges of a step, from the first one on, without a vote."""
        yield from self.roll_call.announce(status, error, [*self._booths.values()][first:])

    def members(
        self, groups: list[list[Tensor]], mine: list[list[int]], asked: list[bool]
    ) -> Generator[Transfer, None, list[list[int]]]:
        """Of each group, the indices of the parameters that this rank votes on or abstains from:
        those that have had a gradient, or might, on any rank. Ranks agree on them at the first
        step, and again where one finds that its own changed, in the same step on every rank;
        ``asked``: whether those of a group may have."""
        has_changed = len(groups) != len(self._voters)
        known = list(mine)
        for number, params in enumerate(groups if not has_changed else ()):
            if asked[number]:
                voters = [*map(id, self._voters[number])]
                here = {i for i, p in enumerate(params) if id(p) in {*voters}}
                known[number] = sorted(here.union(mine[number]))
                has_changed |= [id(params[i]) for i in known[number]] != voters
        if not has_changed:
            return known
        every = [p for params in groups for p in params]
        self.roll_call.device = next((p.device for p in every if p.is_cuda), self.roll_call.device)
        grads = [p.grad for p in every]
        yield from self.announce(CHANGED)
        known = yield from union_of(known, [*map(len, groups)], self.wire, self.roll_call.device)
        if not all(p.grad is g for p, g in zip(every, grads, strict=True)):
            raise RuntimeError("gradients must stay until the step of every rank has ended")
        pairs = zip(groups, known, strict=True)
        self._voters = [[params[i] for i in indices] for params, indices in pairs]
        return known

    def agreed(self, scaling: Scaling) -> Generator[Transfer, None, Scaling]:
        """Ranks scale and overflow on their own; a step that one of them skips, all must skip,
        before a momentum moves. Four bytes in one all-reduce, only under a GradScaler."""
        assert scaling.found_inf is not None
        found = scaling.found_inf.clone()
        yield self.wire.largest(found)
        return replace(scaling, found_inf=found)

    def move(self, moves: list[Move], scaling: Scaling, seed: int) -> Iterator[Transfer]:
        """An election for each family of buckets. seed: of the coins."""
        if self._n_elections == 0:
            yield from self._owner.compare_gradients(moves)
        digest = self._owner.digest(moves)
        families: dict[_Family, list[Move]] = {}
        for move in moves:
            families.setdefault((move.bucket.device, move.bucket.is_double), []).append(move)
        self._booths = {
            family: Booth.for_moves(
                mine, self._booths.get(family), self.poll, self.exchange.is_sharded, self.wire.rank
            )
            for family, mine in families.items()
        }
        for family, mine in families.items():
            booth, there = self._booths[family], scaling.to(family[0])
            # Other coins than those of the other ballot, at the same places.
            yield from self._elect(booth, mine, there, seed ^ (family[1] * _DOUBLES), digest)
        # Of those that no rank refused, the same on every rank: audits are due by them.
        self._n_elections += 1

    def _elect(
        self, booth: Booth, moves: list[Move], scaling: Scaling, seed: int, digest: int
    ) -> Iterator[Transfer]:
        buffers, refusal = booth.buffers, None
        votes = [(move.bucket, move.settings) for move in moves]
        ballots = votes
        try:
            if moves[0].bucket.is_double:
                ballots = [
                    (double.ballot(*vote, scaling), double.ballot_settings(vote[1]))
                    for vote in votes
                ]
                scaling = replace(scaling, grad_scale=None)
            self._encode(booth, moves, [bucket for bucket, _ in ballots], scaling, seed, digest)
        except Exception as error:
            refusal = error
        if refusal is not None:
            yield from self.announce(REFUSES, refusal, [*self._booths.values()].index(booth))
        sent = self._kept(buffers)
        yield self.exchange.ballots(self.wire, buffers)
        yield from self.roll_call.check(buffers)
        self._count(booth, moves, seed)
        yield from self.exchange.verdicts(self.wire, buffers)
        if sent is not None:
            yield from audit(
                self.wire, buffers, sent, self.poll, booth.weights, seed=seed, step=moves[0].step
            )
        trailers = buffers.trailers
        for i, (move, (bucket, settings)) in enumerate(zip(moves, ballots, strict=True)):
            ops.apply(
                bucket.params, buffers.verdict_planes, buffers.verdict_blanks, trailers,
                scale=self.poll.verdict_scale, lr=settings.lr, weight_decay=settings.weight_decay,
                step=move.step, found_inf=scaling.found_inf, rounding=settings.rounding,
                lows=bucket.lows, seed=seed, cautious_decay=settings.cautious_decay,
                first_word=booth.first_words[i], first_flag=booth.first_flags[i],
            )  # fmt: skip
            if move.bucket.is_double:
                double.apply(move.bucket, move.settings, bucket, self.poll.verdict_scale)

    def _is_due(self, every: int) -> bool:
        ended = self._n_elections - self.roll_call.n_unfinished
        return every > 0 and (ended + 1) % every == 0

    def _kept(self, buffers: Buffers) -> Tensor | None:
        """This rank's chunks, which an audit needs when the verdict lies where they were."""
        is_due = self.exchange.is_sharded and self._is_due(self._audit_every)
        return buffers.ballot.clone() if is_due else None

    def _count(self, booth: Booth, moves: list[Move], seed: int) -> None:
        """This rank's shard of the verdict, from every rank's ballots."""
        buffers, layout = booth.buffers, booth.buffers.layout
        ballots, blanks = layout.planes_of(buffers.received), layout.blanks_of(buffers.received)
        verdict, out_blanks = buffers.verdict_planes[buffers.shard], buffers.verdict_blanks
        if out_blanks is not None:
            out_blanks = out_blanks[buffers.shard : buffers.shard + 1]
        cap_at_two(ballots)
        is_due = self._is_due(self._statistics_every)
        before = ballots.clone() if is_due else ballots  # which may be counted in place
        self.poll.count(
            ballots, blanks, verdict, out_blanks, booth.weights, first_word=buffers.first_word,
            seed=seed, step=moves[0].step,
        )  # fmt: skip
        if is_due:
            if booth.statistics is None:
                numbers = [move.number for move in moves]
                sizes = [len(move.bucket.params) for move in moves]
                booth.statistics = Statistics(
                    layout, buffers.first_word, numbers, sizes, self.poll, buffers.device
                )
            if booth.statistics not in self._statistics:
                self._statistics.append(booth.statistics)
            booth.statistics.add(before, blanks, verdict, out_blanks)

    def statistics(self, n_groups: int) -> Generator[Transfer, None, VoteStatistics]:
        """Of the steps counted since this was called last, on every rank; waits for the device."""
        yield from self.open()
        yield from self.announce(COUNTS)
        mine = [s.taken() for s in self._statistics]
        self._statistics.clear()
        n_ranks = self.wire.world_size
        form = counts_of(n_ranks, n_groups)
        everyones = yield from ask(
            "tells its statistics", mine, form, self.wire, self.roll_call.device
        )
        return summed(everyones, n_ranks, n_groups)

    def _encode(
        self,
        booth: Booth,
        moves: list[Move],
        buckets: list[Bucket],
        scaling: Scaling,
        seed: int,
        digest: int,
    ) -> None:
        """The ballot of all buckets: one call for those in a row that have the same options."""
        buffers, layout, step = booth.buffers, booth.buffers.layout, moves[0].step
        ballot = buffers.ballot
        present = [g is not None for bucket in buckets for g in bucket.grads]
        trailer: tuple[Tensor | None, ...] = (
            layout.trailers_of(ballot),
            booth.trailer_of(present, READY, digest),
            _on_device(moves, buffers.device),
        )
        alike = groupby(range(len(moves)), lambda i: _encoding(moves[i].settings, buckets[i]))
        for (_, (beta1, beta2), maximize, cautious), run in alike:
            numbers = [*run]
            some = [buckets[i] for i in numbers]
            ops.encode(
                _joined([bucket.grads for bucket in some]),
                _joined([bucket.exp_avgs for bucket in some]),
                layout.planes_of(ballot), layout.blanks_of(ballot), beta1=beta1, beta2=beta2,
                maximize=maximize, seed=seed, rank=self.wire.rank, step=step,
                nonfinite=moves[0].nonfinite, grad_scale=scaling.grad_scale,
                found_inf=scaling.found_inf, cautious=cautious,
                block_scales=None if some[0].block_scales is None
                else _joined([bucket.block_scales or [] for bucket in some]),
                first_word=booth.first_words[numbers[0]],
                trailers=trailer[0], trailer=trailer[1], shared=trailer[2],
            )  # fmt: skip
            trailer = (None, None, None)


def _encoding(settings: Settings, bucket: Bucket) -> tuple[Any, ...]:
    """What buckets must have in common to be encoded by one call."""
    is_int8 = bucket.block_scales is not None
    return is_int8, settings.betas, settings.maximize, settings.cautious


def _joined(lists: Sequence[list[Any]]) -> list[Any]:
    return lists[0] if len(lists) == 1 else [item for each in lists for item in each]


def _on_device(moves: Sequence[Move], device: torch.device) -> Tensor:
    """What all must share and the host may not know: step counters, and rates that lie on the
    device, int64 (n,)."""
    steps = [move.step.reshape(1) for move in moves]
    rates = [
        move.settings.lr.reshape(1).double().view(torch.int64)
        for move in moves
        if move.settings.lr.device == device and device.type != "cpu"
    ]
    shared = [*steps, *rates]
    return shared[0] if len(shared) == 1 else torch.cat(shared)
