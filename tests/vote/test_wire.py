"""The bytes that a vote sends, by its own count, the formula and the sockets."""

import os
import socket
import struct

import pytest
import torch
import torch.distributed as dist

from lion_kernels import DistributedLion
from voters import CHOICES, HYPER


def tcp_bytes_sent():
    """Payload bytes that the kernel counts as sent on this process's TCP sockets."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        except OSError:
            continue
        if len(info) >= 216:
            sent, again = struct.unpack_from("<QQ", info, 200)  # tcpi_bytes_sent, _retrans
            total += sent - again
    return total


def count_bytes(rank, n_elements, steps, options):
    p, group = torch.nn.Parameter(torch.zeros(n_elements)), dist.new_group()
    opt = DistributedLion([p], **HYPER, **options, process_group=group)
    p.grad = torch.randn(n_elements)
    opt.step()
    dist.barrier()
    before = opt.wire_bytes, tcp_bytes_sent()
    for _ in range(steps):
        opt.step()
    return opt.wire_bytes - before[0], tcp_bytes_sent() - before[1]


@pytest.mark.parametrize(("aggregation", "ballots", "ties", "exchange"), CHOICES)
@pytest.mark.parametrize("n", [3, 4])
def test_bytes_on_the_wire(worlds, n, aggregation, ballots, ties, exchange):
    """What was handed to the collectives is the formula plus padding and trailers; what the kernel
    counts on the sockets is that plus a few headers."""
    n_elements, steps = 400_000, 3
    options = {"aggregation": aggregation, "ballots": ballots, "ties": ties, "exchange": exchange}
    per_ballot = 1 if ballots == "binary" else 2
    scale = per_ballot * n
    if aggregation == "average":
        planes_down, scale_down = scale.bit_length(), scale
    else:
        planes_down = scale_down = 2 if ties == "zero" and scale % 2 == 0 else 1
    # Beside one bit of an odd scale, a bit a word of 32.
    up = per_ballot + (per_ballot == 1) / 32
    down = planes_down + (per_ballot == 1 and scale_down % 2 == 1) / 32
    bits = (up + down) * (n - 1) / n if exchange == "sharded" else up * (n - 1)
    floor = steps * n_elements * bits / 8
    padding = steps * n * (32 * (per_ballot + planes_down) + 2 * 16 + 32)
    for wire_bytes, socket_bytes in worlds(n).run(count_bytes, n_elements, steps, options):
        assert floor <= wire_bytes <= floor + padding
        if socket_bytes:  # a kernel that keeps this count
            assert wire_bytes <= socket_bytes <= wire_bytes * 1.01 + 10_000 * steps
