"""Distributed Lion: encode, exchange, elect and apply, one parameter group after the other.

Owns the options of the vote, its buffers and counters. The ranks' agreement is agreement.py's, the
collectives are exchange.py's, and every bit is the ops'. Nothing that only one rank knows touches
a parameter after the vote.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from lion_kernels.agreement import (
    Fact,
    broadcast_parameters,
    compare_facts,
    compare_parameters,
)
from lion_kernels.checks import label
from lion_kernels.exchange import EXCHANGES, Buffers, choose
from lion_kernels.layout import MAX_SCALE, WIRE_VERSION, BallotLayout
from lion_kernels.lion import Lion
from lion_kernels.options import lr_tensor, weight_decay

logger = logging.getLogger(__name__)

CHOICES = {
    "aggregation": ("majority", "average"),
    "ballots": ("binary", "ternary"),
    "ties": ("zero", "coin"),
    "exchange": ("auto", *EXCHANGES),
}


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
    without a gradient on some ranks has their zero votes; on all ranks, it is left alone. Under
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
            where ranks differ in shapes, dtypes, strides, options, seed or wire format.
    """

    _rescales = False

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
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
        if check_every < 0:
            raise ValueError(f"check_every must be at least 0, got {check_every}")
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
        self._buffers: dict[int, Buffers] = {}
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
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        device = group["params"][0].device if group["params"] else None
        group.setdefault("step", torch.zeros((), dtype=torch.int64, device=device))
        if self._constructed:
            try:
                self._agree([group])
            except RuntimeError:
                self.param_groups.pop()
                raise

    def _number(self, group: dict[str, Any]) -> int:
        return next(i for i, g in enumerate(self.param_groups) if g is group)

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
            for i, p in enumerate(group["params"]):
                where = f"parameter {i} of group {number}"
                strides = torch.empty_like(p, device="meta").stride()
                facts += [
                    (f"shape of {where}", tuple(p.shape)),
                    (f"dtype of {where}", p.dtype),
                    (f"memory layout of {where}", tuple(strides)),
                    (f"requires_grad of {where}", p.requires_grad),
                ]
        return facts

    def _agree(self, groups: list[dict[str, Any]]) -> None:
        compare_facts(self._facts(groups), self._group)
        if self._broadcast:
            params = [p.detach() for group in groups for p in group["params"]]
            broadcast_parameters(params, self._group)

    def verify_replicas(self) -> None:
        """Compare a 64-bit hash of every parameter over the ranks; raise RuntimeError on every
        rank that names the first parameter that differs and the ranks. All ranks must call it."""
        params, labels = [], []
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
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

    def _step_group(self, group: dict[str, Any]) -> None:
        if self._world_size == 1:
            super()._step_group(group)
        else:
            self._vote(group)

    def _agreed(self, found_inf: Tensor | None) -> Tensor | None:
        """Ranks scale and overflow on their own; a step that one of them skips, all must skip,
        before a momentum moves. Four bytes in one all-reduce, only under a GradScaler."""
        if found_inf is None or self._world_size == 1:
            return found_inf
        agreed = found_inf.clone()
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        return agreed

    def _verdict_planes(self) -> int:
        if self.aggregation == "average":
            return self._vote_scale.bit_length()
        return 2 if self.ties == "zero" and self._vote_scale % 2 == 0 else 1

    def _buffers_for(self, group: dict[str, Any], batch_numels: tuple[int, ...]) -> Buffers:
        """The group's buffers; built anew, and the ranks compared again, when the list of
        parameters that require a gradient changed."""
        number, device = self._number(group), group["params"][0].device
        buffers = self._buffers.get(number)
        if buffers is None or buffers.layout.numels != batch_numels:
            if buffers is not None:
                compare_facts(self._facts([group]), self._group)
            layout = BallotLayout(
                numels=batch_numels,
                planes=1 if self.ballots == "binary" else 2,
                shards=self._world_size if self.exchange == "sharded" else 1,
            )
            buffers = Buffers.allocate(layout, self._verdict_planes(), self._world_size, device)
            self._buffers[number] = buffers
        return buffers

    def _vote(self, group: dict[str, Any]) -> None:
        batch = self._batch(group, abstain=True)
        if not batch.params:
            return
        buffers = self._buffers_for(group, tuple(p.numel() for p in batch.params))
        layout, ops = buffers.layout, torch.ops.lion_kernels
        device = batch.params[0].device
        grad_scale, found_inf = self._amp(device)
        ops.encode(
            batch.grads,
            batch.exp_avgs,
            layout.planes_of(buffers.ballot),
            layout.flags_of(buffers.ballot),
            *group["betas"],
            group["maximize"],
            self.seed,
            self._rank,
            group["step"],
            self._counter(device),
            grad_scale,
            found_inf,
            group["cautious"],
            batch.scales,
        )

        def count(ballots: Tensor, verdict: Tensor, first_word: int) -> None:
            if self.aggregation == "average":
                ops.tally(ballots, verdict, self._vote_scale)
            else:
                ops.elect(ballots, verdict, self._vote_scale, first_word, self.seed, group["step"])

        self._wire_bytes += EXCHANGES[self.exchange](buffers, self._group, count)

        # A majority verdict stands for -1, (0,) +1 in one or two planes: scale 1 or 2.
        planes = buffers.verdict.shape[1]
        ops.apply(
            batch.params,
            buffers.verdict,
            layout.flags_of(buffers.received),
            self._vote_scale if self.aggregation == "average" else planes,
            lr_tensor(group),
            weight_decay(group),
            group["step"],
            found_inf,
            group["rounding"],
            batch.lows,
            self.seed,
            group["cautious_weight_decay"],
        )
        batch.write_back()
