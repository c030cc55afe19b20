"""Tables of pointers: what lets one launch handle every tensor of a list.

A table has a row a tensor (columns in bits.py) and the row of each tile. It lives on the device; it
is built, and sent from pinned memory without waiting, only when a pointer changed. Knows no op.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lion_kernels.kernels import WARM_UP, is_capturing
from lion_kernels.layout import words_of

# One tensor of a list: pointers of p, g, m, low and scale (0: absent), elements, first word, place.
Row = tuple[int, int, int, int, int, int, int, int]
Key = tuple[object, ...]
# The rows of each launch, by the dtypes that its kernel is compiled for.
Launches = dict[tuple[torch.dtype, ...], list[Row]]


@dataclass
class Table:
    rows: Tensor  # int64: the columns of each tensor, then the presence flags
    flags: Tensor  # int64 (flag words,), a view of rows
    tile_rows: Tensor  # int32 (tiles,)
    staging: Tensor  # pinned: a captured copy reads it again at every replay
    spare: Tensor | None  # pinned: nothing can be pinned while a graph is captured
    stream: torch.cuda.Stream | None
    sent: torch.cuda.Event | None

    @property
    def n_tiles(self) -> int:
        return self.tile_rows.numel()


_tables: OrderedDict[Key, list[tuple[tuple[torch.dtype, ...], Table]]] = OrderedDict()
_tile_rows: OrderedDict[Key, Tensor] = OrderedDict()
# Captured graphs read these for as long as they live.
_captured: list[Table] = []
# A table is small, and gradient release has one a parameter.
_MOST = 4096
# Backward calls from a thread of each device.
_lock = threading.RLock()


def _trim(cache: OrderedDict) -> None:
    while len(cache) > _MOST:
        cache.popitem(last=False)


def _tile_rows_of(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """The row of each tile, int32, for rows of so many tiles."""
    if is_capturing(device):
        # Sent on any stream: the device was synchronized before the capture.
        found = (rows for key, rows in _tile_rows.items() if key[:2] == (tiles, device))
        if (rows := next(found, None)) is None:
            raise RuntimeError(WARM_UP)
        return rows
    is_cuda = device.type == "cuda"
    key = (tiles, device, torch.cuda.current_stream(device).cuda_stream if is_cuda else 0)
    if key not in _tile_rows:
        rows = torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles))
        if device.type == "cuda":
            rows = rows.pin_memory().to(device, non_blocking=True)
        _tile_rows[key] = rows
        _trim(_tile_rows)
    return _tile_rows[key]


def _staging(n: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if device.type != "cuda":
        return torch.empty(n, dtype=torch.int64), None
    if is_capturing(device):
        for table in (table for tables in _tables.values() for _, table in tables):
            if table.spare is not None and table.spare.numel() == n:
                spare, table.spare = table.spare, None
                return spare, None
        raise RuntimeError(WARM_UP)
    return (
        torch.empty(n, dtype=torch.int64, pin_memory=True),
        torch.empty(n, dtype=torch.int64, pin_memory=True),
    )


def _build(rows: Sequence[Row], flags: Sequence[int], block: int, device: torch.device) -> Table:
    values: list[int] = []
    tiles, first_tile = [], 0
    for p, g, m, low, scale, numel, first_word, index in rows:
        # Words without a tensor take the masked path, which knows that they hold no votes.
        aligned = index >= 0 and all(pointer % 16 == 0 for pointer in (p, g, m, low))
        values += (p, g, m, numel, first_word, first_tile, aligned, index, low, scale)
        # An empty row gets a tile, so that a list of empty tensors is a launch like any other.
        tiles.append(max(1, -(-numel // block)))
        first_tile += tiles[-1]
    values += [0] * (len(values) % 2)  # the flags start at 16 bytes
    values += flags
    tile_rows = _tile_rows_of(tuple(tiles), device)
    staging, spare = _staging(len(values), device)
    staging.copy_(torch.tensor(values, dtype=torch.int64))
    on_device = staging.to(device, non_blocking=True)
    table = Table(
        rows=on_device,
        flags=on_device[len(values) - len(flags) :],
        tile_rows=tile_rows,
        staging=staging,
        spare=spare,
        stream=None,
        sent=None,
    )
    if device.type == "cuda" and not is_capturing(device):
        table.stream = torch.cuda.current_stream(device)
        table.sent = table.stream.record_event()
    return table


def _make_ready(table: Table, device: torch.device) -> None:
    """Order the current stream behind the copy of a table that another stream sent."""
    if is_capturing(device):
        # torch.cuda.graph waits for the whole device before it captures: the copy has ended.
        _captured.append(table)
    elif table.stream is not None:
        stream = torch.cuda.current_stream(device)
        if stream != table.stream and table.sent is not None:
            stream.wait_event(table.sent)
            table.rows.record_stream(stream)
            table.tile_rows.record_stream(stream)
        if table.spare is None:
            table.spare = torch.empty_like(table.staging, pin_memory=True)


def identity(
    params: Sequence[Tensor | None] = (),
    grads: Sequence[Tensor | None] = (),
    exp_avgs: Sequence[Tensor | None] = (),
    lows: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor | None] = (),
) -> bytes:
    """What a table and the checks of lists depend on: equal for lists that are the same."""
    lists = params, grads, exp_avgs, lows, scales
    return torch.ops.lion_kernels._identity(*lists).numpy().tobytes()


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
    block: int,
    device: torch.device,
    launches: Callable[[], Launches],
    flags: Callable[[], Sequence[int]] = tuple,
) -> list[tuple[tuple[torch.dtype, ...], Table]]:
    """(dtypes, table) of each launch of a list; from the cache where ``key`` was seen before,
    else ``launches()`` checks the list and says its rows."""
    key = (*key, block, device)
    with _lock:
        return _tables_of(key, block, device, launches, flags)


def _tables_of(
    key: Key,
    block: int,
    device: torch.device,
    launches: Callable[[], Launches],
    flags: Callable[[], Sequence[int]],
) -> list[tuple[tuple[torch.dtype, ...], Table]]:
    found = _tables.get(key)
    if found is None:
        found = [
            (dtypes, _build(rows, flags(), block, device)) for dtypes, rows in launches().items()
        ]
        # What a capture builds is sent by its graph's replays alone: no other call may use it.
        if not is_capturing(device):
            _tables[key] = found
            _trim(_tables)
    else:
        _tables.move_to_end(key)
    for _, table in found:
        _make_ready(table, device)
    return found


def rows_by_dtypes(
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    decided_by: Sequence[Sequence[Tensor | None]],
    n_words: int | None = None,
) -> Launches:
    """The rows of each launch: tensors with the same dtypes in the lists of ``decided_by``, each
    at its place in word space. Rows that lack one of them join the first launch; so do the words
    behind the last tensor, as a row without a tensor, where the word space has ``n_words``."""
    launches: Launches = {}
    undecided: list[Row] = []
    word = 0
    for i, tensors in enumerate(zip(params, grads, exp_avgs, lows, scales, strict=True)):
        numel = next(t.numel() for t in tensors if t is not None)
        p, g, m, low, scale = (0 if t is None else t.data_ptr() for t in tensors)
        deciding = [each[i] for each in decided_by]
        row = (p, g, m, low, scale, numel, word, i)
        word += words_of(numel)
        if any(t is None for t in deciding):
            undecided.append(row)
        elif numel > 0:
            launches.setdefault(tuple(t.dtype for t in deciding if t is not None), []).append(row)
    if n_words is not None and word < n_words:
        undecided.append((0, 0, 0, 0, 0, 32 * (n_words - word), word, -1))
    if undecided or not launches:
        first = next(iter(launches), (torch.float32,) * len(decided_by))
        launches.setdefault(first, []).extend(undecided or [(0, 0, 0, 0, 0, 0, 0, -1)])
    return launches
