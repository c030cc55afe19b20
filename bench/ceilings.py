"""What this GPU's memory gives to a kernel that does nothing but read and write: the ceiling of the
bench, with the mix of reads and writes that an op has, and the data sheet.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from timing import Case

# Streams read, and of these written in place, as the ops do: a copy's, lion_step's, encode's and
# those of vote counts.
MIXES = ((1, 1), (3, 2), (2, 1), (4, 1), (8, 1), (16, 1))
BLOCK = 2048


@triton.jit
def _stream_kernel(
    data_ptr,
    stream_elements: tl.int64,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # multiple_of: without it the compiler loads four bytes at a time.
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(data_ptr + tile)
    for stream in tl.static_range(1, READS):
        stream_ptr = tl.multiple_of(data_ptr + stream * stream_elements, 16)
        total += tl.load(stream_ptr + tile)
    for stream in tl.static_range(WRITES):
        stream_ptr = tl.multiple_of(data_ptr + stream * stream_elements, 16)
        tl.store(stream_ptr + tile, total)


def stream(data: torch.Tensor, reads: int, writes: int) -> int:
    """Read so many equal parts of ``data`` (int32) and write to some of them; returns the bytes."""
    tiles = data.numel() // reads // BLOCK
    n = tiles * BLOCK
    _stream_kernel[(tiles,)](data, n, READS=reads, WRITES=writes, BLOCK=BLOCK, num_warps=8)
    return 4 * n * (reads + writes)


def nearest(read: float, written: float) -> tuple[int, int]:
    """The mix whose share of reads is closest."""
    return min(MIXES, key=lambda mix: abs(mix[0] / sum(mix) - read / (read + written)))


def ceiling_of(data: torch.Tensor, mix: tuple[int, int], label: str) -> Case:
    name = f"plain, {mix[0]} read {mix[1]} written, {label}"
    return Case(name, partial(stream, data, *mix), stream(data, *mix))


def copy_case(data: torch.Tensor, label: str) -> Case:
    """torch's copy of one half onto the other, which the (1, 1) ceiling should not stay behind."""
    source, target = data.chunk(2)
    copy = partial(target.copy_, source[: target.numel()])
    return Case(f"torch copy, {label}", copy, 2 * target.nbytes)


def data_sheet_gb_per_s(device: torch.device) -> float | None:
    """Two transfers a clock over the whole bus, as data sheets count (an H100 SXM: 3,352); None
    without a GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8 / 1e9
