"""Distributed Lion: a Lion whose buckets move by the vote of all ranks.

Owns the ranks' agreement on what they vote on. The vote itself is vote/'s, and every bit is the
ops'. Nothing that only one rank knows touches a parameter after the vote.
"""

import hashlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from . import averaged, states
from .alone import Alone
from .bucket import Move
from .checks import check_voter, is_whole, label
from .layout import WIRE_VERSION
from .lion import Lion
from .options import DISTRIBUTED_LION, GROUP_OPTIONS, OPTIONS, checked
from .shards import memory_order
from .vote.agreement import (
    ADDS,
    VERIFIES,
    Fact,
    ask,
    broadcast_parameters,
    compare_facts,
    compare_parameters,
)
from .vote.election import Electorate
from .vote.exchange import choose
from .vote.forms import below, is_integer
from .vote.poll import Poll
from .vote.statistics import VoteStatistics
from .vote.wire import ProcessGroupWire, Transfer, Wire

logger = logging.getLogger(__name__)
_requires_grad = attrgetter("requires_grad")

# What must be the same on every rank: of the optimizer, and of its groups.
_AGREED = tuple(o.name for o in OPTIONS[DISTRIBUTED_LION].values() if o.agreed and not o.in_group)
_AGREED_IN_GROUPS = (
    *(o.name for o in GROUP_OPTIONS[DISTRIBUTED_LION].values() if o.agreed), "reference_lr", "step",
)  # fmt: skip


def _hashed(said: list[Any]) -> int:
    digest = hashlib.blake2b(repr(said).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _wire(process_group: ProcessGroup | Wire | None) -> Wire:
    """This rank's end of a process group; raises RuntimeError where it is in none."""
    if isinstance(process_group, Wire):
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "DistributedLion needs a process group: call "
            "torch.distributed.init_process_group() first"
        )
    given = dist.group.WORLD if process_group is None else process_group
    if not isinstance(given, ProcessGroup) or dist.get_rank(given) < 0:
        raise RuntimeError(f"process_group must be a group that this rank is in, got {given}")
    return ProcessGroupWire(given)


class DistributedLion(Lion):
    r"""Distributed Lion (Liu et al. 2024, arXiv:2404.00438, Algorithm 1): N data-parallel workers
    exchange the signs of their updates instead of gradients. Equivalent, on worker i of N::

        c = beta1 * m + (1 - beta1) * g_i;  vote = sign(c);  m = beta2 * m + (1 - beta2) * g_i
        delta = sign(sum of votes)          # aggregation="majority"
        delta = (sum of votes) / N          # aggregation="average"
        p = p * (1 - lr * weight_decay) - lr * delta

    The momentum m (state key "exp_avg") stays on its worker: save every rank's state. Gradients
    must not be averaged: use a bare module, or DDP with a no-op communication hook. With N = 1
    this is Lion, bit for bit. A non-finite c votes zero and leaves its momentum. From a parameter
    without a gradient on some ranks, those abstain; on all ranks, it is left alone, whatever
    requires_grad says. What is first given a gradient later is so in the same step on all ranks.
    Parameters of which each rank holds a part (FSDP1, DTensors) are refused if they vote. Under
    torch.amp.GradScaler, on all ranks or none, a step that one rank skips is skipped by all.

    Args:
        params, lr, betas, weight_decay, maximize, momentum_dtype, rounding,
            independent_weight_decay: as for Lion.
        cautious: a worker whose c has not the sign of its gradient votes zero; best with ternary
            ballots, for a binary zero vote is a coin.
        cautious_weight_decay: decay only where delta * p >= 0.
        process_group: the workers; None means the default group. Also this worker's end of a
            loopback, for workers in one process (simulate.py).
        aggregation: "majority" or "average".
        ballots: "binary", one bit: words of 32 zero votes abstain, another zero vote is a coin
            hashed from (seed, step, element), which every other rank and step takes the other way
            round; "ternary", two bits: a zero vote is a zero.
        ties: of a majority: "zero", no move; or "coin", hashed from (seed, step, element), the
            same on every rank. Without effect on an average.
        exchange: "allgather" (one round, bits grow with N), "sharded" (two rounds, bits flat in
            N) or "auto"; the attribute ``exchange`` says which it is. All give the same verdicts.
        seed: of the coins and of stochastic rounding; the same on every rank.
        weight: as how many votes this rank's counts, 1 to 255: of a rank with larger batches, say.
        broadcast: overwrite the parameters with those of the group's rank 0 at construction.
        check_every: call verify_replicas() after every so many steps; 0 means never.
        statistics_every: count how ranks vote in every so many steps, for vote_statistics().
        audit_every: under a sharded exchange, count a slice of every shard again on all ranks in
            every so many steps, and name an owner whose verdict is another.

    Raises:
        ValueError, RuntimeError: as Lion; an unknown choice; no process group; and, on every rank,
            where ranks differ in names, shapes, dtypes, strides, options, seed or wire format.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        process_group: ProcessGroup | Wire | None = None,
        aggregation: str = "majority",
        ballots: str = "binary",
        ties: str = "zero",
        exchange: str = "auto",
        seed: int = 0,
        weight: int = 1,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        rounding: str = "nearest",
        independent_weight_decay: bool = False,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        broadcast: bool = True,
        check_every: int = 0,
        statistics_every: int = 0,
        audit_every: int = 0,
    ) -> None:
        votes = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
        given: dict[str, Any] = {
            **votes,
            "exchange": exchange,
            "broadcast": broadcast,
            "check_every": check_every,
            "statistics_every": statistics_every,
            "audit_every": audit_every,
        }
        self.weight: int = checked(DISTRIBUTED_LION, {"weight": weight})["weight"]
        given = checked(DISTRIBUTED_LION, given)
        self._wire = _wire(process_group)
        n = self._wire.world_size
        self.aggregation, self.ballots, self.ties = aggregation, ballots, ties
        self.exchange = choose(n) if exchange == "auto" else exchange
        self._broadcast, self._constructed = given["broadcast"], False
        self._check_every, self._steps = given["check_every"], 0
        # Of the options of no group: what all ranks must share.
        self._shared = {**given, "exchange": self.exchange}
        poll = Poll(n, aggregation, ballots, ties)
        # With N = 1 there is nothing to vote on.
        self._electorate = None
        if n > 1:
            every = given["statistics_every"], given["audit_every"]
            self._electorate = Electorate(
                self._wire, poll, self.exchange, weakref.proxy(self), *every
            )
        # Buckets and what was trained, and what they were hashed to.
        self._digested: tuple[list[Any], list[list[bool]], int] = [], [], 0
        self._construct(
            DISTRIBUTED_LION, params, self._electorate or Alone(is_whole=True),
            lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize,
            momentum_dtype=momentum_dtype, rounding=rounding,
            independent_weight_decay=independent_weight_decay, cautious=cautious,
            cautious_weight_decay=cautious_weight_decay, seed=seed,
        )  # fmt: skip
        self._shared["seed"] = self.seed
        self._agree(self.param_groups)
        self._constructed = True
        logger.info("%s of %d ranks over the %r exchange", aggregation, n, self.exchange)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "DistributedLion holds a process group and cannot be copied or pickled: "
            "save its state_dict() and build a new one"
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes of votes and verdicts that this rank handed to collectives for other ranks."""
        return self._wire.sent_bytes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group on every rank; compared, and broadcast, like those at construction."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[before]
            states.step_counter(group, torch.device("cpu"))
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    check_voter(group, before, i)
            if self._constructed:
                self._agree([group], before)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _device(self) -> torch.device:
        """Of the first parameter that there is."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _facts(self, groups: Sequence[dict[str, Any]], first: int) -> list[Fact]:
        found: list[tuple[str, Any]] = [("wire format version", WIRE_VERSION)]
        number = 0 if self._electorate is None else self._electorate.roll_call.number
        found.append(("number of the optimizer on its process group", number))
        found += [(name, self._shared[name]) for name in _AGREED]
        found.append(("number of parameter groups", len(self.param_groups)))
        for number, group in enumerate(groups, first):
            for option in _AGREED_IN_GROUPS:
                value: Any = group.get(option)
                if isinstance(value, Tensor):
                    value = value.item()
                elif isinstance(value, list):
                    value = tuple(value)
                found.append((f"{option} of group {number}", value))
            found.append((f"number of parameters of group {number}", len(group["params"])))
            names = group.get("param_names", [""] * len(group["params"]))
            for i, (p, name) in enumerate(zip(group["params"], names, strict=True)):
                where = f"parameter {i} of group {number}"
                found += [
                    (f"name of {where}", name),
                    (f"shape of {where}", tuple(p.shape) if is_whole(p) else "a part"),
                    (f"dtype of {where}", p.dtype),
                    (f"memory layout of {where}", memory_order(p)),
                    (f"requires_grad of {where}", p.requires_grad),
                ]
        return [(label, str(value)) for label, value in found]

    def facts(self) -> list[Fact]:
        """What all ranks must share in a step."""
        return self._facts(self.param_groups, 0)

    def digest(self, moves: Sequence[Move]) -> int:
        """64 bits of what all ranks must share in a step, but for what may lie on a device. What
        seldom changes is asked where a bucket did, or what is trained."""
        buckets = [move.bucket for move in moves]
        trained = [list(map(_requires_grad, group["params"])) for group in self.param_groups]
        asked, flags, of_layout = self._digested
        is_same = len(asked) == len(buckets) and all(
            a() is b for a, b in zip(asked, buckets, strict=False)
        )
        if not is_same or flags != trained:
            assert self._electorate is not None
            said: list[Any] = [self._electorate.roll_call.number, self._shared, trained]
            for move in moves:
                ps = move.bucket.params
                said.append((move.number, [(p.shape, p.dtype, memory_order(p)) for p in ps]))
            of_layout = _hashed(said)
            self._digested = [*map(weakref.ref, buckets)], trained, of_layout
        return _hashed([of_layout, *(move.settings.digest for move in moves)])

    def compare_gradients(self, moves: Sequence[Move]) -> Iterator[Transfer]:
        """Notices gradients that were averaged before the vote, and says so once."""
        mine = averaged.hash_of([g for move in moves for g in move.bucket.grads])
        hashes = yield from ask(
            "compares its first gradients", mine, is_integer, self._wire, self._device()
        )
        if len(set(hashes)) == 1 and mine != 0 and self._wire.rank == 0:
            averaged.warn([p for group in self.param_groups for p in group["params"]])

    def vote_statistics(self) -> VoteStatistics | None:
        """How ranks voted, in the steps that were counted since the last call (statistics_every):
        of each rank the share of votes that equal the verdict; of each group the shares that were
        unanimous, tied and abstained from, and that turned over since the verdict that was counted
        before. A rank that clearly agrees with less than half (it is broken, or fed with another
        sign) is named in a warning. All ranks must call it; waits for the device. In a loopback the
        last worker's call gives it, the others' None."""
        electorate = self._electorate
        if electorate is None:
            raise RuntimeError("vote_statistics needs at least two ranks")
        found: list[VoteStatistics] = []

        def work() -> Iterator[Transfer]:
            counts = yield from electorate.statistics(len(self.param_groups))
            found.append(counts)
            if counts.suspects and self._wire.rank == 0:
                shares = [f"{r} ({counts.agreement[r]:.0%})" for r in counts.suspects]
                logger.warning(
                    "ranks that vote against most of what is decided: %s; their gradients are "
                    "broken, or have another sign", ", ".join(shares),
                )  # fmt: skip

        self._wire.drive(work())
        return found[0] if found else None

    def _agree(self, groups: list[dict[str, Any]], first: int = 0) -> None:
        """Compare groups, which are numbered from ``first`` on, and share their parameters."""

        wire, device, electorate = self._wire, self._device(), self._electorate
        is_new = not self._constructed

        @torch.no_grad()
        def work() -> Iterator[Transfer]:
            if electorate is not None and not is_new:
                yield from electorate.open()
                yield from electorate.announce(ADDS)
            yield from compare_facts(self._facts(groups, first), wire, device)
            if electorate is not None and is_new:
                form = below(256, first=1)
                weights = yield from ask("weighs its vote", self.weight, form, wire, device)
                electorate.poll = replace(electorate.poll, weights=tuple(weights))
            if self._broadcast:
                params = [p for group in groups for p in group["params"] if is_whole(p)]
                yield from broadcast_parameters([p.detach() for p in params], wire)

        self._wire.drive(work())

    def verify_replicas(self) -> None:
        """Compare a 64-bit hash of every parameter over the ranks; raise RuntimeError on every
        rank that names the first parameter that differs and the ranks. All ranks must call it."""
        self._wire.drive(self._verify())

    def _verify(self) -> Iterator[Transfer]:
        if self._electorate is not None:
            yield from self._electorate.open()
            yield from self._electorate.announce(VERIFIES)
        yield from self._compare_replicas()

    def _compare_replicas(self) -> Iterator[Transfer]:
        params, labels = [], []
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if not is_whole(p):
                    continue
                params.append(p.detach())
                labels.append(label(group, number, i))
                if "compensation" in self.state.get(p, {}):
                    params.append(self.state[p]["compensation"])
                    labels.append(f"the compensation of {labels[-1]}")
        yield from compare_parameters(params, labels, self._wire)

    def _work(self) -> Iterator[Any]:
        # Not a hook of step: torch would compile it with step, and call it twice for a class that
        # overrides step, on those ranks where another Lion exists.
        yield from super()._work()
        self._steps += 1
        if self._check_every and self._steps % self._check_every == 0:
            yield from self._compare_replicas()
