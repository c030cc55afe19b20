"""Tables of pointers: what lets one launch handle every tensor of a list.

A table has a row a tensor (columns in bits.py) and the row of each tile. It lies on the device, is
built once for a list of tensors and sent from pinned memory without waiting; gradients that lie
elsewhere in the next step are patched in. Knows no op.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..capture import is_capturing
from ..layout import room_of
from . import bits

# One tensor of a list: pointers of p, g, m, low and scale (0: absent), elements, first word, place.
Row = tuple[int, int, int, int, int, int, int, int]
Key = tuple[object, ...]
# The rows of each launch, by the dtypes that its kernel is compiled for.
Launches = dict[tuple[torch.dtype, ...], list[Row]]


_COLUMNS, _GRAD = int(bits.COLUMNS.value), int(bits.GRAD.value)


@dataclass
class Table:
    rows: Tensor  # int64: the columns of each tensor
    tile_rows: Tensor  # int32 (tiles,)
    values: Tensor  # what rows holds, on the host
    # Where gradients stand in values, and in the list: int64.
    slots: Tensor
    indices: Tensor

    @property
    def n_tiles(self) -> int:
        return self.tile_rows.numel()

    @property
    def n_bytes(self) -> int:
        """On the device, in pinned memory and on the host."""
        return 3 * self.rows.nbytes + self.tile_rows.nbytes

    def patch(self, addresses: bytes) -> None:
        """Point to the gradients at ``addresses``, one for each tensor of the list. What reads the
        table was queued on this stream before, or comes after."""
        there = torch.frombuffer(bytearray(addresses), dtype=torch.int64)
        self.values[self.slots] = there[self.indices]
        self.rows.copy_(_pinned(self.values, self.rows.device), non_blocking=True)


@dataclass
class Found:
    """The tables of a list, one a launch, and the addresses of the gradients that they point to."""

    tables: list[tuple[tuple[torch.dtype, ...], Table]]
    addresses: bytes

    @property
    def n_bytes(self) -> int:
        return sum(table.n_bytes for _, table in self.tables)


# Of each list and stream: what is patched on a stream is read on it alone.
_found: OrderedDict[Key, Found] = OrderedDict()
_tile_rows: OrderedDict[Key, Tensor] = OrderedDict()
# Captured graphs read these for as long as they live: one for every list of sizes, whatever is
# captured with it.
_captured_tile_rows: dict[Key, Tensor] = {}
# A step of a thousand tensors of 100M elements takes 0.4 MB.
_MOST_BYTES = 64 * 2**20
# Backward calls from a thread of each device.
_lock = threading.RLock()


def _trim(found: OrderedDict[Key, Found]) -> None:
    """Drop the oldest lists until the others have few enough bytes."""
    total = sum(each.n_bytes for each in found.values())
    while total > _MOST_BYTES and len(found) > 1:
        total -= found.popitem(last=False)[1].n_bytes


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """A copy to send from without waiting. PyTorch's allocator keeps it until it was read: for a
    graph that is captured, as long as the graph lives."""
    return values.pin_memory() if device.type == "cuda" else values.clone()


def _tile_rows_of(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """The row of each tile, int32, for rows of so many tiles."""
    if is_capturing(device):
        # Sent on any stream: the device was synchronized before the capture.
        sent = (rows for key, rows in _tile_rows.items() if key[:2] == (tiles, device))
        if (rows := _captured_tile_rows.get((tiles, device), next(sent, None))) is not None:
            _captured_tile_rows[tiles, device] = rows
            return rows
        return _new_tile_rows(tiles, device)
    key = (tiles, device, _stream(device))
    if key not in _tile_rows:
        _tile_rows[key] = _new_tile_rows(tiles, device)
        while len(_tile_rows) > 64:  # lists of sizes; tables keep those that they read
            _tile_rows.popitem(last=False)
    return _tile_rows[key]


def _new_tile_rows(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    rows = torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles))
    return _pinned(rows, device).to(device, non_blocking=True)


def _build(rows: Sequence[Row], block: int, device: torch.device) -> Table:
    values: list[int] = []
    tiles, first_tile = [], 0
    for p, g, m, low, scale, numel, first_word, index in rows:
        aligned = all(pointer % 16 == 0 for pointer in (p, g, m, low))
        values += (p, g, m, numel, first_word, first_tile, aligned, index, low, scale)
        # An empty row gets a tile, so that a list of empty tensors is a launch like any other.
        tiles.append(max(1, -(-numel // block)))
        first_tile += tiles[-1]
    on_host = torch.tensor(values, dtype=torch.int64)
    on_device = _pinned(on_host, device).to(device, non_blocking=True)
    with_gradient = [(r, row[-1]) for r, row in enumerate(rows) if row[1] != 0]
    return Table(
        rows=on_device,
        tile_rows=_tile_rows_of(tuple(tiles), device),
        values=on_host,
        slots=torch.tensor([r * _COLUMNS + _GRAD for r, _ in with_gradient], dtype=torch.int64),
        indices=torch.tensor([index for _, index in with_gradient], dtype=torch.int64),
    )


def identity(
    grads: Sequence[Tensor | None] = (), *fixed: Sequence[Tensor | None]
) -> tuple[Key, bytes]:
    """What a table and the checks of lists depend on: equal for lists that are the same, wherever
    their gradients lie; and the addresses of the gradients, as int64."""
    together = [t for tensors in fixed for t in tensors]
    numbers: object
    try:
        addresses, numbers = native.identity(together, grads)
    except RuntimeError:  # a tensor without data: the checks of a list that is new say so
        addresses, numbers = b"", object()
    return (*map(len, fixed), len(grads), numbers), addresses


def check_dense(
    tensors: Sequence[Tensor | None],
    name: str,
    like: Sequence[Tensor],
    device: torch.device | None = None,
) -> None:
    """Raise unless element i of each storage means the same element as in ``like``."""
    for i, (t, other) in enumerate(zip(tensors, like, strict=True)):
        if t is None:
            continue
        where = other.device if device is None else device
        if t.device != where:
            raise ValueError(f"{name}[{i}] must be on {where}, got {t.device}")
        if not (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)):
            raise ValueError(
                f"{name}[{i}] must be dense (no gaps, no overlaps), got shape {list(t.shape)} "
                f"with strides {list(t.stride())}"
            )
        strides = zip(t.shape, t.stride(), other.stride(), strict=True)
        if t.numel() > 0 and any(n > 1 and a != b for n, a, b in strides):
            raise ValueError(
                f"{name}[{i}] must have strides {list(other.stride())}, got {list(t.stride())}"
            )


def tables(
    key: Key,
    addresses: bytes,
    block: int,
    device: torch.device,
    launches: Callable[[], Launches],
) -> list[tuple[tuple[torch.dtype, ...], Table]]:
    """(dtypes, table) of each launch of a list; from the cache where ``key`` was seen before on
    this stream, with its gradients at ``addresses``; else ``launches()`` checks the list and says
    its rows."""

    def build() -> Found:
        rows = launches().items()
        return Found([(t, _build(each, block, device)) for t, each in rows], addresses)

    with _lock:
        # What a capture builds is sent by its graph's replays alone: no other call may use it.
        if is_capturing(device):
            return build().tables
        key = (*key, block, device, _stream(device))
        found = _found.get(key)
        if found is None:
            found = _found[key] = build()
            _trim(_found)
        _found.move_to_end(key)
        if found.addresses != addresses:
            for _, table in found.tables:
                table.patch(addresses)
            found.addresses = addresses
        return found.tables


def rows_by_dtypes(
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    block_scales: Sequence[Tensor | None],
    decided_by: Sequence[Sequence[Tensor | None]],
) -> Launches:
    """The rows of each launch: tensors with the same dtypes in the lists of ``decided_by``, each
    at its place in the list's word space. Rows that lack one of them join the first launch."""
    launches: Launches = {}
    undecided: list[Row] = []
    word = 0
    for i, tensors in enumerate(zip(params, grads, exp_avgs, lows, block_scales, strict=True)):
        numel = next(t.numel() for t in tensors if t is not None)
        p, g, m, low, scale = (0 if t is None else t.data_ptr() for t in tensors)
        deciding = [each[i] for each in decided_by]
        row = (p, g, m, low, scale, numel, word, i)
        word += room_of(numel)
        if any(t is None for t in deciding):
            undecided.append(row)
        elif numel > 0:
            launches.setdefault(tuple(t.dtype for t in deciding if t is not None), []).append(row)
    if undecided or not launches:
        first = next(iter(launches), (torch.float32,) * len(decided_by))
        launches.setdefault(first, []).extend(undecided or [(0, 0, 0, 0, 0, 0, 0, -1)])
    return launches
