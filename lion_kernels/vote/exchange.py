"""Room 2: how ballots get to where they are counted, and verdicts back.

An exchange is two transfers, which whoever drives an election waits for: ``ballots`` fills
``buffers.received`` with a chunk from every rank; once this rank has counted its shard,
``verdicts`` fills ``buffers.verdict`` with the verdict of all, the same on every rank. Knows a wire
and buffers; bit positions are layout.py's.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from .buffers import Buffers
from .wire import Transfer, Wire


class Exchange(ABC):
    is_sharded: bool

    @abstractmethod
    def ballots(self, wire: Wire, buffers: Buffers) -> Transfer: ...

    @abstractmethod
    def verdicts(self, wire: Wire, buffers: Buffers) -> Iterator[Transfer]: ...


class AllGather(Exchange):
    """Every rank gets every ballot and counts for itself: one round."""

    is_sharded = False

    def ballots(self, wire: Wire, buffers: Buffers) -> Transfer:
        return wire.all_gather(buffers.received, buffers.ballot)

    def verdicts(self, wire: Wire, buffers: Buffers) -> Iterator[Transfer]:
        yield from ()


class Sharded(Exchange):
    """Each rank counts one shard for all: an all-to-all of ballots, an all-gather of verdicts."""

    is_sharded = True

    def ballots(self, wire: Wire, buffers: Buffers) -> Transfer:
        return wire.all_to_all(buffers.received, buffers.ballot)

    def verdicts(self, wire: Wire, buffers: Buffers) -> Iterator[Transfer]:
        own = buffers.verdict[buffers.shard : buffers.shard + 1]
        yield wire.all_gather(buffers.verdict, own)


EXCHANGES: dict[str, Exchange] = {"allgather": AllGather(), "sharded": Sharded()}


def choose(world_size: int) -> str:
    """The exchange that "auto" stands for: one round while it costs few bytes, else flat in N."""
    return "allgather" if world_size <= 3 else "sharded"
