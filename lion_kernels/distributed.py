"""Distributed Lion: encode, exchange, elect and apply, one parameter group after the other.

Owns the options of the vote, its buffers and counters. The ranks' agreement is agreement.py's, the
collectives are exchange.py's, and every bit is the ops'. Nothing that only one rank knows touches
a parameter after the vote.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from lion_kernels import double, states
from lion_kernels.agreement import (
    Fact,
    broadcast_parameters,
    compare_facts,
    compare_parameters,
    union_of,
)
from lion_kernels.bucket import Bucket
from lion_kernels.checks import check_voter, is_whole, label
from lion_kernels.exchange import EXCHANGES, Buffers, choose
from lion_kernels.layout import MAX_SCALE, WIRE_VERSION, BallotLayout
from lion_kernels.lion import Lion
from lion_kernels.options import Settings, check_choice, check_integer
from lion_kernels.scaling import Scaling
from lion_kernels.shards import memory_order

logger = logging.getLogger(__name__)

CHOICES = {
    "aggregation": ("majority", "average"),
    "ballots": ("binary", "ternary"),
    "ties": ("zero", "coin"),
    "exchange": ("auto", *EXCHANGES),
}

# Marks the seed of the coins of float64 ballots.
_DOUBLES = 0x40
# Of a group, the same on every rank.
OPTIONS = (
    "lr", "betas", "weight_decay", "maximize", "momentum_dtype", "rounding",
    "independent_weight_decay", "cautious", "cautious_weight_decay", "reference_lr", "step",
)  # fmt: skip


class DistributedLion(Lion):
    r"""Distributed Lion (Liu et al. 2024, arXiv:2404.00438, Algorithm 1): N data-parallel workers
    exchange the signs of their updates instead of gradients. Equivalent, on worker i of N::

        c = beta1 * m + (1 - beta1) * g_i;  vote = sign(c);  m = beta2 * m + (1 - beta2) * g_i
        delta = sign(sum of votes)          # aggregation="majority"
        delta = (sum of votes) / N          # aggregation="average"
        p = p * (1 - lr * weight_decay) - lr * delta

    The momentum m (state key "exp_avg") stays on its worker: save every rank's state. Gradients
    must not be averaged: use a bare module, or DDP with a no-op communication hook. With N = 1
    this is Lion, bit for bit. A non-finite c votes zero and leaves its momentum. A parameter
    without a gradient on some ranks has their zero votes; on all ranks, it is left alone, whatever
    requires_grad says. What is first given a gradient later is so in the same step on all ranks.
    Parameters of which each rank holds a part (FSDP1, DTensors) are refused if they vote. Under
    torch.amp.GradScaler, on all ranks or none, a step that one rank skips is skipped by all.

    Args:
        params, lr, betas, weight_decay, maximize, momentum_dtype, rounding,
            independent_weight_decay: as for Lion.
        cautious: a worker whose c has not the sign of its gradient votes zero; best with ternary
            ballots, for a binary zero vote is a coin.
        cautious_weight_decay: decay only where delta * p >= 0.
        process_group: the workers; None means the default group.
        aggregation: "majority" or "average".
        ballots: "binary", one bit: a zero vote is a coin hashed from (seed, rank, step, element);
            "ternary", two bits: a zero vote is a zero.
        ties: of a majority: "zero", no move; or "coin", hashed from (seed, step, element), the
            same on every rank. Without effect on an average.
        exchange: "allgather" (one round, bits grow with N), "sharded" (two rounds, bits flat in
            N) or "auto"; the attribute ``exchange`` says which it is. All give the same verdicts.
        seed: of the coins and of stochastic rounding; the same on every rank.
        broadcast: overwrite the parameters with those of the group's rank 0 at construction.
        check_every: call verify_replicas() after every so many steps; 0 means never.

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
        process_group: ProcessGroup | None = None,
        aggregation: str = "majority",
        ballots: str = "binary",
        ties: str = "zero",
        exchange: str = "auto",
        seed: int = 0,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        rounding: str = "nearest",
        independent_weight_decay: bool = False,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        broadcast: bool = True,
        check_every: int = 0,
    ) -> None:
        given = {"aggregation": aggregation, "ballots": ballots, "ties": ties, "exchange": exchange}
        for name, value in given.items():
            check_choice(name, value, CHOICES[name])
        check_choice("broadcast", broadcast, (False, True))
        check_every = check_integer("check_every", check_every, "at least 0")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedLion needs a process group: call "
                "torch.distributed.init_process_group() first"
            )
        group = dist.group.WORLD if process_group is None else process_group
        if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:
            raise RuntimeError(f"process_group must be a group that this rank is in, got {group}")
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._vote_scale = (1 if ballots == "binary" else 2) * self._world_size
        if self._vote_scale > MAX_SCALE:
            raise ValueError(f"at most {MAX_SCALE} votes can be counted, got {self._vote_scale}")
        self.aggregation, self.ballots, self.ties = aggregation, ballots, ties
        self.exchange = choose(self._world_size) if exchange == "auto" else exchange
        self._broadcast, self._check_every = broadcast, check_every
        self._buffers: dict[tuple[int, bool], Buffers] = {}
        self._voters: dict[int, list[Tensor]] = {}  # of each group, the same on every rank
        self._steps = self._wire_bytes = 0
        self._votes = self._world_size > 1
        self._constructed = False
        super().__init__(
            params, lr, betas, weight_decay, maximize=maximize, momentum_dtype=momentum_dtype,
            rounding=rounding, nonfinite="skip", seed=seed,
            independent_weight_decay=independent_weight_decay, cautious=cautious,
            cautious_weight_decay=cautious_weight_decay,
        )  # fmt: skip
        self._agree(self.param_groups)
        self._constructed = True
        logger.info(
            "%s of %d ranks over the %r exchange", aggregation, self._world_size, self.exchange
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "DistributedLion holds a process group and cannot be copied or pickled: "
            "save its state_dict() and build a new one"
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes of votes and verdicts that this rank handed to collectives for other ranks."""
        return self._wire_bytes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group on every rank; compared, and broadcast, like those at construction."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[before]
            states.step_counter(group, torch.device("cpu"))
            self._check_nonfinite(before)
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    check_voter(group, before, i)
            if self._constructed:
                self._agree([group])
        except BaseException:
            del self.param_groups[before:]
            raise

    def _number(self, group: dict[str, Any]) -> int:
        return next(i for i, g in enumerate(self.param_groups) if g is group)

    def _device(self) -> torch.device:
        """Of the first parameter that there is."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _facts(self, groups: list[dict[str, Any]]) -> list[Fact]:
        facts: list[Fact] = [
            ("wire format version", WIRE_VERSION),
            ("aggregation", self.aggregation),
            ("ballots", self.ballots),
            ("ties", self.ties),
            ("exchange", self.exchange),
            ("seed", self.seed),
            ("number of parameter groups", len(self.param_groups)),
        ]
        for group in groups:
            number = self._number(group)
            for option in OPTIONS:
                value: Any = group.get(option)
                if isinstance(value, Tensor):
                    value = value.item()
                elif isinstance(value, list):
                    value = tuple(value)
                facts.append((f"{option} of group {number}", value))
            facts.append((f"number of parameters of group {number}", len(group["params"])))
            names = group.get("param_names", [""] * len(group["params"]))
            for i, (p, name) in enumerate(zip(group["params"], names, strict=True)):
                where = f"parameter {i} of group {number}"
                facts += [
                    (f"name of {where}", name),
                    (f"shape of {where}", tuple(p.shape) if is_whole(p) else "a part"),
                    (f"dtype of {where}", p.dtype),
                    (f"memory layout of {where}", memory_order(p)),
                    (f"requires_grad of {where}", p.requires_grad),
                ]
        return facts

    def _agree(self, groups: list[dict[str, Any]]) -> None:
        compare_facts(self._facts(groups), self._group, self._device())
        if self._broadcast:
            params = [p for group in groups for p in group["params"] if is_whole(p)]
            broadcast_parameters([p.detach() for p in params], self._group)

    def verify_replicas(self) -> None:
        """Compare a 64-bit hash of every parameter over the ranks; raise RuntimeError on every
        rank that names the first parameter that differs and the ranks. All ranks must call it."""
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
        compare_parameters(params, labels, self._group)

    def _after_step(self) -> None:
        self._steps += 1
        if self._check_every and self._steps % self._check_every == 0:
            self.verify_replicas()

    def _is_member(self, p: Tensor) -> bool:
        return p.grad is not None or (self._votes and p.requires_grad)

    def _members(self, number: int, group: dict[str, Any]) -> list[int]:
        """The indices of the parameters that this rank votes on or abstains from: those that have
        had a gradient, or might, on any rank. Ranks agree on them at a group's first step, and
        again where one gets a gradient that none expected, in the same step on every rank."""
        mine = super()._members(number, group)
        if self._world_size == 1:
            return mine
        params, voters = group["params"], set(map(id, self._voters.get(number, ())))
        known = [i for i, p in enumerate(params) if id(p) in voters]
        if number not in self._voters or not set(mine).issubset(known):
            known = union_of({*mine, *known}, self._group, self._device())
            self._voters[number] = [params[i] for i in known]
        return known

    def _settings_of(self, number: int) -> Settings:
        self._check_nonfinite(number)
        return super()._settings_of(number)

    def _check(self, number: int, indices: list[int], beside: list[int]) -> None:
        super()._check(number, indices, beside)
        for i in indices:
            check_voter(self.param_groups[number], number, i)

    def _check_nonfinite(self, number: int) -> None:
        given = self.param_groups[number]["nonfinite"]
        if given != "skip":
            raise ValueError(
                "nonfinite is not for DistributedLion, where a vote that is not finite abstains: "
                f"group {number} has {given!r}"
            )

    def _step_group(
        self, number: int, buckets: list[Bucket], settings: Settings, scaling: Scaling
    ) -> None:
        if self._world_size == 1:
            super()._step_group(number, buckets, settings, scaling)
            return
        for i, bucket in enumerate(buckets):
            step = states.step_counter(self.param_groups[number], bucket.device)
            step = step if i == len(buckets) - 1 else step.clone()  # it advances once
            self._vote(number, bucket, settings, scaling.to(bucket.device), step)

    def _agreed(self, scaling: Scaling) -> Scaling:
        """Ranks scale and overflow on their own; a step that one of them skips, all must skip,
        before a momentum moves. Four bytes in one all-reduce, only under a GradScaler."""
        if scaling.found_inf is None or self._world_size == 1:
            return scaling
        agreed = scaling.found_inf.clone()
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        return replace(scaling, found_inf=agreed)

    def _verdict_planes(self) -> int:
        if self.aggregation == "average":
            return self._vote_scale.bit_length()
        return 2 if self.ties == "zero" and self._vote_scale % 2 == 0 else 1

    def _buffers_for(self, number: int, bucket: Bucket) -> Buffers:
        """The buffers of a group's bucket; built anew when the list of voters changed."""
        numels, key = tuple(p.numel() for p in bucket.params), (number, bucket.is_double)
        buffers = self._buffers.get(key)
        is_same = buffers is not None and buffers.layout.numels == numels
        if buffers is None or not is_same or buffers.ballot.device != bucket.device:
            layout = BallotLayout(
                numels=numels,
                planes=1 if self.ballots == "binary" else 2,
                shards=self._world_size if self.exchange == "sharded" else 1,
            )
            planes, n = self._verdict_planes(), self._world_size
            buffers = Buffers.allocate(layout, planes, n, bucket.device)
            self._buffers[key] = buffers
        return buffers

    def _vote(
        self, number: int, bucket: Bucket, settings: Settings, scaling: Scaling, step: Tensor
    ) -> None:
        buffers, ops = self._buffers_for(number, bucket), torch.ops.lion_kernels
        layout = buffers.layout
        encoded, applied, seed = bucket, settings, self.seed
        if bucket.is_double:
            encoded = double.ballot(bucket, settings, scaling)
            applied = double.ballot_settings(settings)
            # Other coins than those of the group's other ballot, at the same places.
            seed ^= _DOUBLES
        ops.encode(
            encoded.grads,
            encoded.exp_avgs,
            layout.planes_of(buffers.ballot),
            layout.flags_of(buffers.ballot),
            *settings.betas,
            settings.maximize,
            seed,
            self._rank,
            step,
            self._counter(bucket.device),
            None if bucket.is_double else scaling.grad_scale,
            scaling.found_inf,
            settings.cautious,
            encoded.scales,
        )

        def count(ballots: Tensor, verdict: Tensor, first_word: int) -> None:
            if self.aggregation == "average":
                ops.tally(ballots, verdict, self._vote_scale)
            else:
                ops.elect(ballots, verdict, self._vote_scale, first_word, seed, step)

        self._wire_bytes += EXCHANGES[self.exchange](buffers, self._group, count)

        # A majority verdict stands for -1, (0,) +1 in one or two planes: scale 1 or 2.
        planes = buffers.verdict.shape[1]
        scale = self._vote_scale if self.aggregation == "average" else planes
        ops.apply(
            encoded.params,
            buffers.verdict,
            layout.flags_of(buffers.received),
            scale,
            applied.lr,
            applied.weight_decay,
            step,
            scaling.found_inf,
            applied.rounding,
            encoded.lows,
            seed,
            applied.cautious_decay,
        )
        if bucket.is_double:
            double.apply(bucket, settings, encoded, scale)
        bucket.write_back()
