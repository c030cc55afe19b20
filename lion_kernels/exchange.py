"""Room 2: the collectives that carry ballots to where they are counted, and verdicts back.

Knows process groups, buffers and bytes; the count itself is handed in, and bit positions are
layout.py's. Each exchange fills ``buffers.received`` with a chunk from every rank and
``buffers.verdict`` with the verdict of the whole group, the same on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lion_kernels.layout import BallotLayout

# (ballots (ranks, planes, words), verdict (planes, words), first word of the shard) -> None
Count = Callable[[Tensor, Tensor, int], None]

# torch 2.13 renamed all_gather_into_tensor, and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Buffers:
    """The buffers of one group, all int32. ``verdict`` shares memory with ``ballot``, which is
    spent once it was sent: together they take half a byte a parameter at most (majority, binary
    ballots, sharded)."""

    layout: BallotLayout
    ballot: Tensor  # (shards, chunk_words): this rank's votes
    received: Tensor  # (ranks, chunk_words): every rank's votes on this rank's shard
    own_verdict: Tensor  # (planes, words_per_shard): of this rank's shard
    verdict: Tensor  # (shards, planes, words_per_shard)

    @classmethod
    def allocate(
        cls, layout: BallotLayout, verdict_planes: int, world_size: int, device: torch.device
    ) -> "Buffers":
        verdict_shape = (layout.shards, verdict_planes, layout.words_per_shard)
        verdict_words = layout.shards * verdict_planes * layout.words_per_shard
        ballot_words = layout.shards * layout.chunk_words
        sent = torch.zeros(max(ballot_words, verdict_words), dtype=torch.int32, device=device)
        verdict = sent[:verdict_words].view(verdict_shape)
        return cls(
            layout=layout,
            ballot=sent[:ballot_words].view(layout.shards, layout.chunk_words),
            received=sent.new_zeros(world_size, layout.chunk_words),
            own_verdict=verdict[0] if layout.shards == 1 else sent.new_zeros(verdict_shape[1:]),
            verdict=verdict,
        )


def allgather(buffers: Buffers, group: ProcessGroup, count: Count) -> int:
    """Every rank gets every ballot and counts for itself: one round. Returns the bytes that this
    rank sent to others."""
    n = dist.get_world_size(group)
    _all_gather(buffers.received, buffers.ballot, group=group)
    count(buffers.layout.planes_of(buffers.received), buffers.own_verdict, 0)
    return buffers.ballot.nbytes * (n - 1)


def sharded(buffers: Buffers, group: ProcessGroup, count: Count) -> int:
    """Each rank counts one shard for all: an all-to-all of ballots, an all-gather of verdicts.
    Returns the bytes that this rank sent to others."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    dist.all_to_all_single(buffers.received, buffers.ballot, group=group)
    first_word = rank * buffers.layout.words_per_shard
    count(buffers.layout.planes_of(buffers.received), buffers.own_verdict, first_word)
    _all_gather(buffers.verdict, buffers.own_verdict.unsqueeze(0), group=group)
    return (buffers.received[0].nbytes + buffers.own_verdict.nbytes) * (n - 1)


EXCHANGES = {"allgather": allgather, "sharded": sharded}


def choose(world_size: int) -> str:
    """The exchange that "auto" stands for: one round while it costs few bytes, else flat in N."""
    return "allgather" if world_size <= 3 else "sharded"
