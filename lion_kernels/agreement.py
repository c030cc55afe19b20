"""What all ranks must share before and after a vote: options, metadata, parameters.

Compares facts and parameter hashes over a process group and names the first that differs, on every
rank. Knows no ballots and no optimizer.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# A labelled value that must be the same on every rank: ("shape of parameter 0 of group 0", (4, 5)).
Fact = tuple[str, Any]

_ROW = 1 << 16


def _ranks_by_value(values: Sequence[Any]) -> str:
    """ "(4, 5) on ranks 0, 2; (4, 6) on rank 1"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(on) > 1 else ''} {', '.join(on)}"
        for value, on in ranks.items()
    )


def compare_facts(facts: Sequence[Fact], group: ProcessGroup) -> None:
    """Raise RuntimeError on every rank where the ranks' facts differ, naming the first."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(facts), group=group)
    for row in zip_longest(*gathered, fillvalue=("end of the list", None)):
        labels, values = {fact[0] for fact in row}, [fact[1] for fact in row]
        if len(labels) > 1:
            raise RuntimeError(f"ranks disagree: {_ranks_by_value([fact[0] for fact in row])}")
        if any(value != values[0] for value in values):
            raise RuntimeError(f"ranks disagree on the {row[0][0]}: {_ranks_by_value(values)}")


def broadcast_parameters(params: Sequence[Tensor], group: ProcessGroup) -> None:
    """Overwrite ``params`` with those of the group's rank 0, bit for bit."""
    source = dist.get_global_rank(group, 0)
    for p in params:
        dense = torch.empty_like(p).copy_(p)
        if p.numel() > 0:
            flat = dense.as_strided((p.numel(),), (1,)).view(torch.uint8)
            dist.broadcast(flat, src=source, group=group)
            p.copy_(dense)


def _weights(n: int, device: torch.device) -> Tensor:
    """n fixed odd 64-bit multipliers."""
    i = torch.arange(1, n + 1, device=device) * -7046029254386353131  # 2**64 / golden ratio
    i = (i ^ (i >> 29)) * -4658895280553007687
    return (i ^ (i >> 32)) | 1


def hash_parameter(p: Tensor) -> Tensor:
    """A 64-bit hash of the bits of ``p`` in the order of its elements: a 0-d int64 tensor.

    A weighted sum, modulo 2**64, with a fixed odd weight a position: one differing element always
    changes it, several cancel with probability 2**-64. Works a few MB at a time.
    """
    real = torch.view_as_real(p) if p.is_complex() else p
    bits = real.contiguous().view(torch.int16 if real.element_size() == 2 else torch.int32)
    level = bits.flatten()
    weights = _weights(_ROW, p.device)
    while True:
        rows = [(part.long() * weights[: part.numel()]).sum() for part in level.split(_ROW)]
        if len(rows) == 1:
            return rows[0]
        level = torch.stack(rows)


def compare_parameters(
    params: Sequence[Tensor], labels: Sequence[str], group: ProcessGroup
) -> None:
    """Raise RuntimeError on every rank where a parameter's bits differ over the ranks."""
    if not params:
        return
    hashes = torch.stack([hash_parameter(p) for p in params])
    gathered = [torch.empty_like(hashes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, hashes, group=group)
    for i, label in enumerate(labels):
        values = [f"hash {int(h[i].item()) & (2**64 - 1):016x}" for h in gathered]
        if len(set(values)) > 1:
            raise RuntimeError(f"replicas differ: {label} has {_ranks_by_value(values)}")
