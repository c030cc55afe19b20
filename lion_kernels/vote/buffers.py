"""What travels: the buffers of one election. Knows sizes, and nobody at the other end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BallotLayout, blank_words
from .poll import Poll


@dataclass(frozen=True)
class Buffers:
    """All int32. What is spent is used again, so that all of it takes less than half a byte a
    parameter (majority, binary ballots): under a sharded exchange ``verdict`` lies where ``ballot``
    did; else a rank's ballot lies among those that it gets, and binary ballots are counted in place
    where there is room. Either way a rank's own part is a row of what it gathers into."""

    layout: BallotLayout
    ballot: Tensor  # (shards, chunk words): this rank's votes
    received: Tensor  # (ranks, chunk words): every rank's votes on this rank's shard
    verdict: Tensor  # (shards, words): planes, and blank bits where the verdict has any
    verdict_planes: Tensor  # (shards, planes, words per shard), a view of it
    verdict_blanks: Tensor | None  # (shards, blank words), a view of it
    shard: int  # which this rank counts

    @classmethod
    def allocate(
        cls,
        numels: tuple[int, ...],
        poll: Poll,
        is_sharded: bool,
        rank: int,
        device: torch.device,
    ) -> "Buffers":
        """For tensors of ``numels`` elements; with a shard for each voter, or one in all."""
        shards = poll.voters if is_sharded else 1
        layout = BallotLayout(numels, poll.ballot_planes, shards)
        planes, n_words = poll.verdict_planes, layout.words_per_shard
        n_blank = blank_words(n_words) if poll.verdict_has_blanks else 0
        verdict_words = planes * n_words + n_blank
        zeros = torch.zeros(poll.voters, layout.chunk_words, dtype=torch.int32, device=device)
        # Plane b of the verdict in the place of rank b's ballot.
        in_place = not is_sharded and poll.ballot_planes == 1 and planes <= poll.voters
        if is_sharded:
            n_ballot, n_verdict = shards * layout.chunk_words, shards * verdict_words
            sent = zeros.new_zeros(max(n_ballot, n_verdict))
            ballot = sent[:n_ballot].view(shards, layout.chunk_words)
            verdict = sent[:n_verdict].view(shards, verdict_words)
        else:
            ballot = zeros[rank : rank + 1]
            verdict = zeros.new_zeros(1, n_blank if in_place else verdict_words)
        if in_place:
            verdict_planes = layout.planes_of(zeros)[:planes, 0].unsqueeze(0)
        else:
            verdict_planes = verdict[:, : planes * n_words].unflatten(1, (planes, n_words))
        return cls(
            layout=layout,
            ballot=ballot,
            received=zeros,
            verdict=verdict,
            verdict_planes=verdict_planes,
            verdict_blanks=verdict[:, verdict.shape[1] - n_blank :]
            if poll.verdict_has_blanks
            else None,
            shard=rank if is_sharded else 0,
        )

    @property
    def trailers(self) -> Tensor:
        """Every rank's, (ranks, trailer words)."""
        return self.layout.trailers_of(self.received)

    @property
    def first_word(self) -> int:
        """Of this rank's shard, in word space."""
        return self.shard * self.layout.words_per_shard

    @property
    def device(self) -> torch.device:
        return self.ballot.device
