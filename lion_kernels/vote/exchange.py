"""Room 2: how ballots get to where they are counted, and verdicts back.

Each exchange is a generator that yields what travels; whoever drives it decides what happens until
it has arrived. It fills ``buffers.received`` with a chunk from every rank and ``buffers.verdict``
with the verdict of all, the same on every rank. Knows a wire and buffers; the count is handed in,
and bit positions are layout.py's.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from .buffers import Buffers
from .wire import Transfer, Wire

# (ballots (ranks, planes, words), verdict (planes, words), first word of the shard) -> None
Count = Callable[[Tensor, Tensor, int], None]


def allgather(wire: Wire, buffers: Buffers, count: Count) -> Iterator[Transfer]:
    """Every rank gets every ballot and counts for itself: one round."""
    yield wire.all_gather(buffers.received, buffers.ballot)
    count(buffers.received_planes, buffers.own_verdict, 0)


def sharded(wire: Wire, buffers: Buffers, count: Count) -> Iterator[Transfer]:
    """Each rank counts one shard for all: an all-to-all of ballots, an all-gather of verdicts."""
    yield wire.all_to_all(buffers.received, buffers.ballot)
    first_word = wire.rank * buffers.layout.words_per_shard
    count(buffers.received_planes, buffers.own_verdict, first_word)
    yield wire.all_gather(buffers.verdict, buffers.own_verdict.unsqueeze(0))


EXCHANGES = {"allgather": allgather, "sharded": sharded}


def choose(world_size: int) -> str:
    """The exchange that "auto" stands for: one round while it costs few bytes, else flat in N."""
    return "allgather" if world_size <= 3 else "sharded"
