"""Who is at the other end: a process group, or a loopback of workers in one process.

A wire starts transfers, counts the bytes of votes and verdicts that it sends to other ranks, and
drives generators that yield transfers. Knows no bits and no optimizer.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed all_gather_into_tensor, and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Transfer(Protocol):
    """Something on its way."""

    def wait(self) -> object:
        """Go on when it has arrived; on a GPU, the stream waits."""


class Values:
    """What every rank gave, in ``everyones`` once it has arrived."""

    everyones: list[Any]

    def __init__(self, ask: Callable[[], list[Any]]) -> None:
        self._ask = ask

    def wait(self) -> None:
        self.everyones = self._ask()


class Wire(ABC):
    """One rank's end. ``sent_bytes``: of votes and verdicts, to other ranks."""

    rank: int
    world_size: int
    sent_bytes = 0

    def all_gather(self, received: Tensor, sent: Tensor) -> Transfer:
        """Every rank's ``sent`` (1, ...) into ``received`` (ranks, ...)."""
        self.sent_bytes += sent.nbytes * (self.world_size - 1)
        return self._all_gather(received, sent)

    def all_to_all(self, received: Tensor, sent: Tensor) -> Transfer:
        """Row r of ``sent`` (ranks, ...) goes to rank r; what it gets is in the order of ranks."""
        self.sent_bytes += received[0].nbytes * (self.world_size - 1)
        return self._all_to_all(received, sent)

    @abstractmethod
    def _all_gather(self, received: Tensor, sent: Tensor) -> Transfer: ...

    @abstractmethod
    def _all_to_all(self, received: Tensor, sent: Tensor) -> Transfer: ...

    @abstractmethod
    def largest(self, tensor: Tensor) -> Transfer:
        """The elementwise maximum over ranks, into ``tensor``."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Transfer:
        """Rank 0's, into ``tensor``."""

    @abstractmethod
    def values(self, value: Any, device: torch.device) -> Values:
        """A Python object of each rank, by way of ``device`` where objects travel as tensors."""

    @abstractmethod
    def drive(self, work: Iterator[Transfer]) -> None:
        """Run to its end what every rank runs."""


class ProcessGroupWire(Wire):
    """A rank of a process group."""

    def __init__(self, process_group: ProcessGroup) -> None:
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self._process_group = process_group
        self._how: dict[str, Any] = {"group": process_group, "async_op": True}

    def _all_gather(self, received: Tensor, sent: Tensor) -> Transfer:
        return cast(Transfer, _all_gather(received, sent, **self._how))

    def _all_to_all(self, received: Tensor, sent: Tensor) -> Transfer:
        return cast(Transfer, dist.all_to_all_single(received, sent, **self._how))

    def largest(self, tensor: Tensor) -> Transfer:
        return cast(Transfer, dist.all_reduce(tensor, dist.ReduceOp.MAX, **self._how))

    def broadcast(self, tensor: Tensor) -> Transfer:
        source = dist.get_global_rank(self._process_group, 0)
        return cast(Transfer, dist.broadcast(tensor, src=source, **self._how))

    def values(self, value: Any, device: torch.device) -> Values:
        def ask() -> list[Any]:
            found: list[Any] = [None] * self.world_size
            # NCCL sends objects by way of the current device, which may be another rank's.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                dist.all_gather_object(found, value, group=self._process_group)
            return found

        return Values(ask)

    def drive(self, work: Iterator[Transfer]) -> None:
        for transfer in work:
            transfer.wait()


class _Copy:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


class Loopback(Wire):
    """One worker of several in this process. Its work stops at the first transfer until every
    other worker's has come as far; then all go on in lock-step, within the last one's call."""

    def __init__(self, rank: int, world_size: int, workers: "list[Loopback]") -> None:
        self.rank, self.world_size, self._workers = rank, world_size, workers
        self._posted: tuple[str, Any] = ("nothing", None)
        self._queue: deque[Iterator[Transfer]] = deque()
        self._transfer: Transfer | None = None  # at which the first of the queue stands

    def _everyones(self) -> list[Any]:
        if any(worker._posted[0] != self._posted[0] for worker in self._workers):
            self._refuse([worker._posted[0] for worker in self._workers])
        return [worker._posted[1] for worker in self._workers]

    def _refuse(self, what: list[str]) -> NoReturn:
        said = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(what))
        raise RuntimeError(f"the workers of a loopback must do the same, got {said}")

    def _all_gather(self, received: Tensor, sent: Tensor) -> Transfer:
        self._posted = ("all_gather", sent)
        return _Copy(lambda: torch.cat(self._everyones(), out=received))

    def _all_to_all(self, received: Tensor, sent: Tensor) -> Transfer:
        self._posted = ("all_to_all", sent)
        mine = slice(self.rank, self.rank + 1)
        return _Copy(lambda: torch.cat([each[mine] for each in self._everyones()], out=received))

    def largest(self, tensor: Tensor) -> Transfer:
        self._posted = ("largest", tensor.clone())
        return _Copy(lambda: tensor.copy_(torch.stack(self._everyones()).amax(0)))

    def broadcast(self, tensor: Tensor) -> Transfer:
        self._posted = ("broadcast", tensor)
        return _Copy(lambda: tensor.copy_(self._everyones()[0]))

    def values(self, value: Any, device: torch.device) -> Values:
        self._posted = ("values", value)
        return Values(self._everyones)

    def drive(self, work: Iterator[Transfer]) -> None:
        self._queue.append(work)
        if len(self._queue) == 1:
            self._begin()
        while all(worker._queue for worker in self._workers):
            self._finish_together()

    def _begin(self) -> None:
        """Run what is first in the queue up to its first transfer. What raises leaves the queue to
        what comes behind it."""
        if self._queue:
            try:
                self._transfer = next(self._queue[0], None)
            except BaseException:
                self._queue.popleft()
                self._begin()
                raise

    def _finish_together(self) -> None:
        workers = self._workers
        try:
            while transfers := [each._transfer for each in workers if each._transfer is not None]:
                if len(transfers) < len(workers):
                    ended = [each._transfer is None for each in workers]
                    self._refuse(["the end" if is_end else "more" for is_end in ended])
                for transfer in transfers:
                    transfer.wait()
                for worker in workers:
                    worker._transfer = next(worker._queue[0], None)
        except BaseException:
            for worker in workers:
                worker._queue.clear()
            raise
        errors = []
        for worker in workers:
            worker._queue.popleft()
            worker._transfer = None
            try:
                worker._begin()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]
