"""What all ranks must share before and after a vote: options, metadata, parameters.

Compares facts and parameter hashes over a wire and names the first that differs, on every rank.
What ranks say travels as JSON. Generators, as elections are. Knows no ballots and no optimizer.
"""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..layout import READY
from .forms import Form, below, is_facts, is_integer, is_report, is_text, list_of, row_of, shown
from .wire import Transfer, Wire

# A label and a value that must be the same on every rank: ("lr of group 0", "0.01").
Fact = tuple[str, str]

# The status of a rank that takes part in an exchange; layout.READY is that of a step.
REFUSES, CHANGED, ADDS, VERIFIES, COUNTS = 1, 2, 3, 4, 5
_DOES = {
    READY: "steps",
    REFUSES: "refuses its input",
    CHANGED: "has other parameters that take part",
    ADDS: "adds a group of parameters",
    VERIFIES: "verifies the replicas",
    COUNTS: "reads the statistics of votes",
}
# What a rank raises that hears of another's error.
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (RuntimeError, TypeError, ValueError, NotImplementedError)
}

# What is worked on at a time: of a message, of a hash, and of small tensors together.
_PART_BYTES = 25 * 2**20
_PART_WORDS = 1 << 22
_SMALL_WORDS = 1 << 17


def _on(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """The ranks that have each value."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return ranks


def _ranks_by_value(values: Sequence[Any]) -> str:
    """ "(4, 5) on ranks 0, 2; (4, 6) on rank 1"."""
    return "; ".join(f"{value} on {_on(ranks)}" for value, ranks in _by_value(values).items())


@dataclass(frozen=True)
class Report:
    """What a rank says of itself where the ranks part ways."""

    does: str
    error: Exception | None = None
    facts: Sequence[Fact] = ()

    @classmethod
    def of(cls, status: int, error: Exception | None, facts: Sequence[Fact]) -> "Report":
        return cls(_DOES[status], error, facts)

    def value(self) -> dict[str, Any]:
        kinds = [] if self.error is None else [c.__name__ for c in type(self.error).__mro__]
        kind = next((name for name in kinds if name in _ERRORS), "RuntimeError")
        error = None if self.error is None else [kind, str(self.error)]
        return {"does": self.does, "error": error, "facts": list(self.facts)}


def _raise_for(reports: Sequence[Any], mine: Exception | None) -> NoReturn:
    """Raise what ranks that part ways report, the same on every rank."""
    errors = [report.get("error") for report in reports]
    texts = _by_value([error[1] if error else "" for error in errors])
    if texts.pop("", None) != [*range(len(reports))]:
        kind = next(_ERRORS.get(error[0], RuntimeError) for error in errors if error)
        said = "; ".join(f"{text} (on {_on(ranks)})" for text, ranks in texts.items())
        raise kind(said) from mine
    facts = [report.get("facts", []) for report in reports]
    if all(facts):
        _compare(facts)
    does = [report["does"] for report in reports]
    if len(set(does)) > 1:
        said = "; ".join(f"{_on(ranks)} {what}" for what, ranks in _by_value(does).items())
        raise RuntimeError(f"ranks do not do the same: {said}")
    raise RuntimeError(
        "ranks disagree on what all must share in a step, and now they agree: an option or a state "
        "was changed since, or a ballot was damaged on its way"
    )


def explain(report: Report, wire: Wire, device: torch.device) -> Iterator[Transfer]:
    """What every rank calls where one of them noticed that not all are ready, or that what they
    share is not the same: raises the same error on every rank."""
    reports = yield from ask("explain", report.value(), is_report, wire, device)
    _raise_for(reports, report.error)


def ask(
    what: str, value: Any, form: Form, wire: Wire, device: torch.device
) -> Generator[Transfer, None, list[Any]]:
    """Every rank's ``value``, each of the ``form``; raises RuntimeError on every rank where one has
    another form, where they ask for something else, or report a refusal."""
    yield (answers := wire.values([what, value], device))
    everyones = answers.everyones
    _check_all(everyones, row_of(is_text, lambda _: True), "no answer")
    whats = [each for each, _ in everyones]
    if len(set(whats)) > 1:
        _raise_for([v if is_report(v) else {"does": what} for what, v in everyones], None)
    values = [each for _, each in everyones]
    _check_all(values, form, f"something else than a rank that {what}")
    return values


def _check_all(values: Sequence[Any], form: Form, what: str) -> None:
    for rank, value in enumerate(values):
        if not form(value):
            raise RuntimeError(f"rank {rank} sent {what}, got {shown(value)}")


def union_of(
    sets: Sequence[Sequence[int]], sizes: Sequence[int], wire: Wire, device: torch.device
) -> Generator[Transfer, None, list[list[int]]]:
    """Of each group, what is in the set of any rank, in order; ``sizes``: how many parameters each
    group has on this rank."""
    everyones = yield from ask(
        "asks which parameters take part", [*zip(sizes, map(list, sets), strict=True)],
        list_of(row_of(is_integer, list_of(is_integer))), wire, device,
    )  # fmt: skip
    lengths = [len(each) for each in everyones]
    if len(set(lengths)) > 1:
        raise RuntimeError(f"ranks disagree on the number of groups: {_ranks_by_value(lengths)}")
    unions = []
    for number, rows in enumerate(zip(*everyones, strict=True)):
        theirs = [size for size, _ in rows]
        if len(set(theirs)) > 1:
            raise RuntimeError(
                f"ranks disagree on the number of parameters of group {number}: "
                f"{_ranks_by_value(theirs)}"
            )
        indices = [each for _, each in rows]
        _check_all(indices, list_of(below(theirs[0])), "parameters that are none")
        unions.append(sorted(set().union(*indices)))
    return unions


def compare_facts(facts: Sequence[Fact], wire: Wire, device: torch.device) -> Iterator[Transfer]:
    """Raise RuntimeError on every rank where the ranks' facts differ, naming the first. The facts
    themselves travel only where their digests differ."""
    digest = hashlib.sha256(repr([tuple(fact) for fact in facts]).encode()).hexdigest()
    digests = yield from ask("builds an optimizer or a group", digest, is_text, wire, device)
    if len(set(digests)) > 1:
        lists = yield from ask("tells what it has", list(facts), is_facts, wire, device)
        _compare(lists)


def _compare(lists: Sequence[Sequence[Fact]]) -> None:
    """Raise RuntimeError that names the first fact which is not the same in every list."""
    for row in zip_longest(*lists, fillvalue=("end of the list", "")):
        labels, values = {fact[0] for fact in row}, [fact[1] for fact in row]
        if len(labels) > 1:
            raise RuntimeError(f"ranks disagree: {_ranks_by_value([fact[0] for fact in row])}")
        if len(set(values)) > 1:
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
    hashes = yield from ask(
        _DOES[VERIFIES], hash_parameters(params).tolist(), list_of(is_integer), wire,
        params[0].device,
    )  # fmt: skip
    lengths = [len(every) for every in hashes]
    if len(set(lengths)) > 1:
        raise RuntimeError(
            f"replicas differ: parameters and compensations are {_ranks_by_value(lengths)}"
        )
    for label, values in zip(labels, zip(*hashes, strict=True), strict=True):
        if len(set(values)) > 1:
            words = [f"hash {value & (2**64 - 1):016x}" for value in values]
            raise RuntimeError(f"replicas differ: {label} has {_ranks_by_value(words)}")
