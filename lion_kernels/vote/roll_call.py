"""Who is there, and whether all do the same: what every rank asks before a vote, and reads in the
seals of ballots. Ranks that part ways are named on every rank.

Knows booths and an exchange, and counts no votes.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..bucket import Move
from ..capture import is_capturing
from ..layout import READY, STATUS
from .agreement import Fact, Report, ask, explain
from .booth import Booth
from .buffers import Buffers
from .exchange import Exchange
from .forms import is_report
from .wire import Transfer, Wire

# How often ranks compare which optimizer they step where that makes the host wait.
_FIRST = 8


class Owner(Protocol):
    """Whose elections they are: says what all ranks must share in a step."""

    def digest(self, moves: Sequence[Move]) -> int:
        """Of all that the host knows, 64 bits."""

    def facts(self) -> list[Fact]:
        """The same, to be compared where digests differ."""

    def compare_gradients(self, moves: Sequence[Move]) -> Iterator[Transfer]:
        """In the first step: notices gradients that were averaged."""


class RollCall:
    """Of the ranks of one optimizer, which has a ``number`` on its wire."""

    def __init__(self, wire: Wire, exchange: Exchange, owner: Owner) -> None:
        self.wire, self.exchange, self._owner = wire, exchange, owner
        self.number = wire.enroll()
        # Of the last parameter on a GPU: NCCL sends what ranks say by way of one.
        self.device = torch.device("cpu")
        # Seals that the device had not seen when the host went on, and how many elections that the
        # host took for ended turned out to be refused.
        self._unseen: list[tuple[Tensor, torch.cuda.Event]] = []
        self.n_unfinished = 0
        self._n_openings = 0

    def open(self) -> Iterator[Transfer]:
        """What comes first where all ranks come together. Raises RuntimeError on every rank where
        some step another optimizer of the process group: its ballots have other sizes."""
        yield from self._settle()
        waits = self.device.type == "cuda"  # for a number from the device
        if self.wire.n_users > 1 and not (waits and self._n_openings >= _FIRST):
            number = torch.tensor([[self.number]], device=self.device)
            numbers = number.new_zeros(self.wire.world_size, 1)
            yield self.wire.gather(numbers, number)
            if len(set(seen := numbers.flatten().tolist())) > 1:
                said = ", ".join(f"optimizer {n} on rank {rank}" for rank, n in enumerate(seen))
                raise RuntimeError(
                    f"ranks step different optimizers, numbered as they were built: {said}"
                )
        self._n_openings += 1

    def announce(
        self, status: int, error: Exception | None, booths: Sequence[Booth]
    ) -> Iterator[Transfer]:
        """Takes part in the exchanges of a step, of the sizes that every rank expects, without a
        vote. Returns where every rank does the same; else raises the same error on every rank."""
        if not booths and error is not None:  # nobody has stepped
            report = self._report(status, error)
            yield from ask(report.does, report.value(), is_report, self.wire, self.device)
        seals: list[list[int]] = []
        for booth in booths:
            buffers = booth.buffers
            trailer = booth.trailer_of([False] * len(buffers.layout.numels), status, 0)
            buffers.layout.trailers_of(buffers.ballot).copy_(trailer)
            yield self.exchange.ballots(self.wire, buffers)
            if buffers.device.type == "cpu":  # where every rank reads it now
                seals = buffers.trailers[:, STATUS:].tolist()
                break
            yield from self.exchange.verdicts(self.wire, buffers)
            seals = buffers.trailers[:, STATUS:].tolist()
        if error is not None or (seals and not _is_one(seals, status)):
            yield from explain(self._report(status, error), self.wire, self.device)

    def _report(self, status: int, error: Exception | None) -> Report:
        return Report.of(status, error, self._owner.facts())

    def check(self, buffers: Buffers) -> Iterator[Transfer]:
        """Raise on every rank where one is not ready, or shares something else. On a GPU, where
        apply writes nothing then, that is read when ranks next come together: now, the host would
        wait."""
        seals = buffers.trailers[:, STATUS:]
        if buffers.device.type == "cuda":
            if not is_capturing(buffers.device):
                seen = torch.empty(seals.shape, dtype=seals.dtype, pin_memory=True)
                seen.copy_(seals, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(buffers.device))
                self._unseen.append((seen, event))
        elif not _is_one(seals.tolist(), READY):
            yield from self._explain()

    def _settle(self) -> Iterator[Transfer]:
        unseen, self._unseen = self._unseen, []
        for seals, event in unseen:
            event.synchronize()
            if not _is_one(seals.tolist(), READY):
                self.n_unfinished += 1
                yield from self._explain()

    def _explain(self) -> Iterator[Transfer]:
        yield from explain(self._report(READY, None), self.wire, self.device)


def _is_one(seals: list[list[int]], status: int) -> bool:
    """Whether every rank has the status, and the version and the digest of the first."""
    return seals[0][0] == status and all(seal == seals[0] for seal in seals)
