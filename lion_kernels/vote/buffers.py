"""What travels: the buffers of one bucket's election. Knows sizes, and nobody at the other end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BallotLayout
from .poll import Poll


@dataclass(frozen=True)
class Buffers:
    """All int32. ``verdict`` shares memory with ``ballot``, which is spent once it was sent:
    together they take half a byte a parameter at most (majority, binary ballots, sharded)."""

    layout: BallotLayout
    ballot: Tensor  # (shards, chunk_words): this rank's votes
    ballot_planes: Tensor  # (shards, planes, words_per_shard), a view of it
    ballot_flags: Tensor  # (shards, flag_words), a view of it
    received: Tensor  # (ranks, chunk_words): every rank's votes on this rank's shard
    received_planes: Tensor  # (ranks, planes, words_per_shard), a view of it
    presence: Tensor  # (ranks, flag_words), a view of it
    own_verdict: Tensor  # (planes, words_per_shard): of this rank's shard
    verdict: Tensor  # (shards, planes, words_per_shard)

    @classmethod
    def allocate(
        cls, numels: tuple[int, ...], poll: Poll, is_sharded: bool, device: torch.device
    ) -> "Buffers":
        """For tensors of ``numels`` elements; with a shard for each voter, or one in all."""
        shards = poll.voters if is_sharded else 1
        layout = BallotLayout(numels, poll.ballot_planes, shards)
        verdict_shape = (shards, poll.verdict_planes, layout.words_per_shard)
        verdict_words = shards * poll.verdict_planes * layout.words_per_shard
        ballot_words = shards * layout.chunk_words
        sent = torch.zeros(max(ballot_words, verdict_words), dtype=torch.int32, device=device)
        verdict = sent[:verdict_words].view(verdict_shape)
        ballot = sent[:ballot_words].view(shards, layout.chunk_words)
        received = sent.new_zeros(poll.voters, layout.chunk_words)
        return cls(
            layout=layout,
            ballot=ballot,
            ballot_planes=layout.planes_of(ballot),
            ballot_flags=layout.flags_of(ballot),
            received=received,
            received_planes=layout.planes_of(received),
            presence=layout.flags_of(received),
            own_verdict=verdict[0] if shards == 1 else sent.new_zeros(verdict_shape[1:]),
            verdict=verdict,
        )
