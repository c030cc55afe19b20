"""N ranks in one process: the two exchanges as slices of buffers, everything else the real ops.

Each `Rank` owns real buffers; where exchange.py calls a collective, this file copies slices.
"""

import torch

from common import lr_of, no_counts, step_of
from lion_kernels.exchange import Buffers
from lion_kernels.layout import BallotLayout

ops = torch.ops.lion_kernels


class SimulatedWorld:
    """N ranks with common parameters (one copy each) that vote; mirrors DistributedLion._vote."""

    def __init__(self, params, n, *, aggregation, ballots, ties, exchange, seed, lr, betas, wd):
        self.n, self.exchange, self.seed, self.lr, self.betas, self.wd = (
            n, exchange, seed, lr, betas, wd,
        )  # fmt: skip
        per_ballot = 1 if ballots == "binary" else 2
        self.scale, self.average = per_ballot * n, aggregation == "average"
        if self.average:
            planes = self.scale.bit_length()
        else:
            planes = 2 if ties == "zero" and self.scale % 2 == 0 else 1
        self.layout = BallotLayout(
            tuple(p.numel() for p in params), per_ballot, n if exchange == "sharded" else 1
        )
        self.params = [[p.clone() for p in params] for _ in range(n)]
        self.exp_avgs = [[torch.zeros_like(p) for p in params] for _ in range(n)]
        self.buffers = [
            Buffers.allocate(self.layout, planes, n, torch.device("cpu")) for _ in range(n)
        ]
        self.steps = 0

    def count(self, ballots, verdict, first_word):
        if self.average:
            ops.tally(ballots, verdict, self.scale)
        else:
            ops.elect(ballots, verdict, self.scale, first_word, self.seed, step_of(self.steps))

    def step(self, grads):
        """grads[rank][tensor]: a tensor or None."""
        layout = self.layout
        for rank, mine in enumerate(self.buffers):
            ops.encode(
                grads[rank], self.exp_avgs[rank], layout.planes_of(mine.ballot),
                layout.flags_of(mine.ballot), *self.betas, False, self.seed, rank,
                step_of(self.steps), no_counts(),
            )  # fmt: skip
        for rank, mine in enumerate(self.buffers):
            shard = rank if self.exchange == "sharded" else 0
            for sender, theirs in enumerate(self.buffers):
                mine.received[sender] = theirs.ballot[shard]
        for rank, mine in enumerate(self.buffers):
            first_word = rank * layout.words_per_shard if self.exchange == "sharded" else 0
            self.count(layout.planes_of(mine.received), mine.own_verdict, first_word)
        if self.exchange == "sharded":
            verdict = torch.stack([owner.own_verdict for owner in self.buffers])
            for mine in self.buffers:
                mine.verdict.copy_(verdict)
        for rank, mine in enumerate(self.buffers):
            scale = self.scale if self.average else mine.verdict.shape[1]
            ops.apply(
                self.params[rank], mine.verdict, layout.flags_of(mine.received), scale,
                lr_of(self.lr), self.wd, step_of(self.steps),
            )  # fmt: skip
        self.steps += 1
