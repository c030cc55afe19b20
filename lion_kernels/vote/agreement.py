"""What all ranks must share before and after a vote: options, metadata, parameters.

Compares facts and parameter hashes over a wire and names the first that differs, on every rank.
Generators, as exchanges are. Knows no ballots and no optimizer.
"""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .wire import Transfer, Wire

# A labelled value that must be the same on every rank: ("shape of parameter 0 of group 0", (4, 5)).
Fact = tuple[str, Any]

# What is worked on at a time: of a message, of a hash, and of small tensors together.
_PART_BYTES = 25 * 2**20
_PART_WORDS = 1 << 22
_SMALL_WORDS = 1 << 17


def _ranks_by_value(values: Sequence[Any]) -> str:
    """ "(4, 5) on ranks 0, 2; (4, 6) on rank 1"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(on) > 1 else ''} {', '.join(on)}"
        for value, on in ranks.items()
    )


def union_of(
    members: set[int], wire: Wire, device: torch.device
) -> Generator[Transfer, None, list[int]]:
    """What is in the set of any rank, in order."""
    yield (sets := wire.values(members, device))
    return sorted(set().union(*sets.everyones))


def compare_facts(facts: Sequence[Fact], wire: Wire, device: torch.device) -> Iterator[Transfer]:
    """Raise RuntimeError on every rank where the ranks' facts differ, naming the first. The facts
    themselves travel only where their digests differ."""
    digest = hashlib.sha256(repr(list(facts)).encode()).hexdigest()
    yield (digests := wire.values(digest, device))
    if len(set(digests.everyones)) == 1:
        return
    yield (lists := wire.values(list(facts), device))
    for row in zip_longest(*lists.everyones, fillvalue=("end of the list", None)):
        labels, values = {fact[0] for fact in row}, [fact[1] for fact in row]
        if len(labels) > 1:
            raise RuntimeError(f"ranks disagree: {_ranks_by_value([fact[0] for fact in row])}")
        if len({repr(value) for value in values}) > 1:
            raise RuntimeError(f"ranks disagree on the {row[0][0]}: {_ranks_by_value(values)}")


def _in_parts(tensors: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Runs of tensors on one device that have ``most`` bytes together, or are alone."""
    part: list[Tensor] = []
    n_bytes = 0
    for t in tensors:
        if part and (n_bytes + t.nbytes > most or t.device != part[0].device):
            yield part
            part, n_bytes = [], 0
        part.append(t)
        n_bytes += t.nbytes
    if part:
        yield part


def broadcast_parameters(params: Sequence[Tensor], wire: Wire) -> Iterator[Transfer]:
    """Overwrite ``params`` with those of the wire's rank 0, bit for bit, many in one message."""
    for part in _in_parts([p for p in params if p.numel() > 0], _PART_BYTES):
        dense = [torch.empty_like(p).copy_(p) for p in part]
        flat = [d.as_strided((d.numel(),), (1,)).view(torch.uint8) for d in dense]
        message = torch.cat(flat) if len(flat) > 1 else flat[0]
        yield wire.broadcast(message)
        received = message.split([f.numel() for f in flat])
        for p, d, f, r in zip(part, dense, flat, received, strict=True):
            f.copy_(r)
            p.copy_(d)


@lru_cache(maxsize=4)
def _weights(n: int, device: torch.device) -> Tensor:
    """n fixed odd 64-bit multipliers."""
    i = torch.arange(1, n + 1, device=device) * -7046029254386353131  # 2**64 / golden ratio
    i = (i ^ (i >> 29)) * -4658895280553007687
    return (i ^ (i >> 32)) | 1


def _words(t: Tensor) -> Tensor:
    """The bits of a tensor, in the order of its elements, as int64; of the last ones with zeros."""
    real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    n_bytes = t.nbytes
    data = real.contiguous().flatten().view(torch.uint8)
    if n_bytes % 8 != 0 or data.storage_offset() % 8 != 0:
        padded = data.new_zeros(-(-n_bytes // 8) * 8)
        padded[:n_bytes] = data
        data = padded
    return data.view(torch.int64)


def _hash_words(words: Tensor) -> Tensor:
    """A 64-bit hash of a 1-d tensor of words, 32 MiB of them at a time."""
    rows = [
        (part * _weights(_PART_WORDS, words.device)[: part.numel()]).sum()
        for part in words.split(_PART_WORDS)
    ]
    if len(rows) == 1:
        return rows[0]
    return _hash_words(torch.stack(rows))


def hash_parameters(params: Sequence[Tensor]) -> Tensor:
    """A 64-bit hash of the bits of each of ``params``, in the order of its elements: int64 (n,), on
    the device of the first.

    A weighted sum, modulo 2**64, with a fixed odd weight a position: one differing word always
    changes it, several cancel with probability 2**-64. Small tensors are hashed together.
    """
    hashes: list[Tensor] = []
    for part in _in_parts(params, 8 * _SMALL_WORDS):
        words = [_words(p) for p in part]
        if len(part) == 1:
            hashes.append(_hash_words(words[0]).reshape(1))
            continue
        # The weights go on from tensor to tensor; sums of runs are differences of running sums.
        together = torch.cat(words)
        sums = (together * _weights(_PART_WORDS, together.device)[: together.numel()]).cumsum(0)
        ends = torch.tensor([w.numel() for w in words]).cumsum(0)
        padded = torch.cat([sums.new_zeros(1), sums])
        at = padded[torch.cat([ends.new_zeros(1), ends]).to(sums.device)]
        hashes.append(at.diff())
    return torch.cat([h.to(params[0].device) for h in hashes])


def hash_parameter(p: Tensor) -> Tensor:
    """The hash of one tensor: a 0-d int64 tensor."""
    return hash_parameters([p])[0]


def compare_parameters(
    params: Sequence[Tensor], labels: Sequence[str], wire: Wire
) -> Iterator[Transfer]:
    """Raise RuntimeError on every rank where a parameter's bits differ over the ranks."""
    if not params:
        return
    yield (hashes := wire.values(hash_parameters(params).tolist(), params[0].device))
    lengths = [len(every) for every in hashes.everyones]
    if len(set(lengths)) > 1:
        raise RuntimeError(
            f"replicas differ: parameters and compensations are {_ranks_by_value(lengths)}"
        )
    for label, values in zip(labels, zip(*hashes.everyones, strict=True), strict=True):
        if len(set(values)) > 1:
            words = [f"hash {value & (2**64 - 1):016x}" for value in values]
            raise RuntimeError(f"replicas differ: {label} has {_ranks_by_value(words)}")
