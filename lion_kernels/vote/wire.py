"""Who is at the other end: a process group, or a loopback of workers in one process.

A wire starts transfers, counts the bytes of votes and verdicts that it sends to other ranks, and
drives generators that yield transfers. Knows no bits and no optimizer.
"""

import json
import weakref
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


# The largest message that a rank takes from another.
_MOST_BYTES = 2**28


class Values:
    """What every rank gave, in ``everyones`` once it has arrived: JSON, which runs no code of
    those who sent it. What is none raises RuntimeError, which names the rank."""

    everyones: list[Any]

    def __init__(self, ask: Callable[[], list[bytes]]) -> None:
        self._ask = ask

    def wait(self) -> None:
        self.everyones = [_parsed(message, rank) for rank, message in enumerate(self._ask())]


def _parsed(message: bytes, rank: int) -> Any:
    try:
        return json.loads(message)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"rank {rank} sent what is no JSON: {error}") from None


def _check_sizes(sizes: list[int]) -> None:
    for rank, size in enumerate(sizes):
        if not 0 <= size <= _MOST_BYTES:
            raise RuntimeError(
                f"rank {rank} announced a message of {size} bytes, and at most {_MOST_BYTES} are "
                "taken: it does something else than the others"
            )


class Wire(ABC):
    """One rank's end. ``sent_bytes``: of votes and verdicts, to other ranks. ``n_users``: how many
    optimizers were ever built on it; every rank builds them in one order."""

    rank: int
    world_size: int
    sent_bytes = 0
    n_users = 0

    def enroll(self) -> int:
        """The number of another user of it."""
        self.n_users += 1
        return self.n_users - 1

    def gather(self, received: Tensor, sent: Tensor) -> Transfer:
        """As all_gather, of what is no vote."""
        return self._all_gather(received, sent)

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

    def values(self, value: Any, device: torch.device) -> Values:
        """A value of each rank that JSON can say, by way of ``device``."""
        return Values(self._messages(json.dumps(value).encode(), device))

    @abstractmethod
    def _messages(self, message: bytes, device: torch.device) -> Callable[[], list[bytes]]: ...

    @abstractmethod
    def drive(self, work: Iterator[Transfer]) -> None:
        """Run to its end what every rank runs."""


# Of each process group: its users so far.
_users: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


class ProcessGroupWire(Wire):
    """A rank of a process group."""

    def __init__(self, process_group: ProcessGroup) -> None:
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self._process_group = process_group
        self._how: dict[str, Any] = {"group": process_group, "async_op": True}

    @property
    def n_users(self) -> int:  # type: ignore[override]
        return _users.get(self._process_group, 0)

    def enroll(self) -> int:
        _users[self._process_group] = self.n_users + 1
        return self.n_users - 1

    def _all_gather(self, received: Tensor, sent: Tensor) -> Transfer:
        return cast(Transfer, _all_gather(received, sent, **self._how))

    def _all_to_all(self, received: Tensor, sent: Tensor) -> Transfer:
        return cast(Transfer, dist.all_to_all_single(received, sent, **self._how))

    def largest(self, tensor: Tensor) -> Transfer:
        return cast(Transfer, dist.all_reduce(tensor, dist.ReduceOp.MAX, **self._how))

    def broadcast(self, tensor: Tensor) -> Transfer:
        source = dist.get_global_rank(self._process_group, 0)
        return cast(Transfer, dist.broadcast(tensor, src=source, **self._how))

    def _messages(self, message: bytes, device: torch.device) -> Callable[[], list[bytes]]:
        def ask() -> list[bytes]:
            size = torch.tensor([[len(message)]], device=device)
            sizes = size.new_zeros(self.world_size, 1)
            self._all_gather(sizes, size).wait()
            n_bytes = sizes.flatten().tolist()
            _check_sizes(n_bytes)
            sent = torch.zeros(1, max(n_bytes), dtype=torch.uint8)
            sent[0, : len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            sent = sent.to(device)
            received = sent.new_zeros(self.world_size, sent.shape[1])
            self._all_gather(received, sent).wait()
            rows = zip(received.cpu().numpy(), n_bytes, strict=True)
            return [row[:n].tobytes() for row, n in rows]

        def ask_there() -> list[bytes]:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return ask()

        return ask_there

    def drive(self, work: Iterator[Transfer]) -> None:
        for transfer in work:
            transfer.wait()


class _Copy:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


def _fill(received: Tensor, rows: list[Tensor]) -> None:
    """A worker's own row may be there already."""
    for row, sent in zip(received, rows, strict=True):
        row.copy_(sent)


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
        return _Copy(lambda: _fill(received, [each[0] for each in self._everyones()]))

    def _all_to_all(self, received: Tensor, sent: Tensor) -> Transfer:
        self._posted = ("all_to_all", sent)
        return _Copy(lambda: _fill(received, [each[self.rank] for each in self._everyones()]))

    def largest(self, tensor: Tensor) -> Transfer:
        self._posted = ("largest", tensor.clone())
        return _Copy(lambda: tensor.copy_(torch.stack(self._everyones()).amax(0)))

    def broadcast(self, tensor: Tensor) -> Transfer:
        self._posted = ("broadcast", tensor)
        return _Copy(lambda: tensor.copy_(self._everyones()[0]))

    def _messages(self, message: bytes, device: torch.device) -> Callable[[], list[bytes]]:
        self._posted = ("values", message)
        return self._everyones

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
