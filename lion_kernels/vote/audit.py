"""An audit by sampling: under a sharded exchange the owner of a shard counts for all, and could say
what it likes. Every so many steps all ranks count a slice of every shard again, from ballots that
each rank hands to all, and name the owner whose verdict is another, before a parameter is written.

Which slice is drawn when verdicts are out, by all ranks together. Knows no optimizer.
"""

import hashlib
import secrets
from collections.abc import Generator, Iterator
from functools import partial

import torch
from torch import Tensor

from ..layout import BITS_PER_WORD, cap_at_two
from .agreement import ask
from .buffers import Buffers
from .forms import below, is_integer, is_text, list_of
from .poll import Poll
from .wire import Transfer, Wire

# Words of each shard: 32,768 elements.
_SLICE_WORDS = 1024


def audit(
    wire: Wire, buffers: Buffers, sent: Tensor, poll: Poll, weights: Tensor | None, seed: int,
    step: Tensor,
) -> Iterator[Transfer]:  # fmt: skip
    """Raise RuntimeError on every rank where a verdict is not that of the ballots. ``sent``: this
    rank's chunks (shards, chunk words), as they left; ``buffers.received``: those it counted."""
    layout, n_words = buffers.layout, buffers.layout.words_per_shard
    draws = yield from _draws(wire, buffers.device)
    # The last place may hold fewer words: those behind the last whole word of blank bits.
    n_places = -(-max(n_words - _SLICE_WORDS, 0) // BITS_PER_WORD) + 1
    begin = sum(draws) % n_places * BITS_PER_WORD
    cut = slice(begin, min(begin + _SLICE_WORDS, n_words))
    cut_blanks = slice(begin // BITS_PER_WORD, -(-cut.stop // BITS_PER_WORD))

    def slices(chunks: Tensor) -> Tensor:
        planes = layout.planes_of(chunks)[:, :, cut].clone()
        cap_at_two(planes)
        parts = [planes.flatten(1)]
        if (blanks := layout.blanks_of(chunks)) is not None:
            parts.append(blanks[:, cut_blanks])
        return torch.cat(parts, 1)

    mine = slices(sent).unsqueeze(0)
    claimed = mine.new_zeros(wire.world_size, *mine.shape[1:])
    yield wire.all_gather(claimed, mine)
    end = layout.planes * (cut.stop - cut.start)
    cap_at_two(claimed[..., :end].unflatten(-1, (layout.planes, -1)))
    recount = partial(
        _is_right, buffers, cut=cut, cut_blanks=cut_blanks, poll=poll, weights=weights, seed=seed,
        step=step,
    )  # fmt: skip
    accused = [s for s in range(layout.shards) if not recount(claimed[:, s], s)]
    received = slices(buffers.received)
    others = (claimed[:, buffers.shard] != received).flatten(1).any(1)
    found = yield from ask(
        "tells what its audit found", [accused, others.nonzero().flatten().tolist()],
        list_of(list_of(below(wire.world_size)), 2), wire, buffers.device,
    )  # fmt: skip
    if any(counts or ballots for counts, ballots in found):
        said = [
            f"rank {rank} finds that the verdict of rank {owner} is not that of the ballots"
            for rank, (owners, _) in enumerate(found)
            for owner in owners
        ]
        said += [
            f"rank {rank} says that rank {voter} had sent it another ballot"
            for rank, (_, voters) in enumerate(found)
            for voter in voters
        ]
        raise RuntimeError(f"an audit of the vote failed: {'; '.join(said)}")


def _draws(wire: Wire, device: torch.device) -> Generator[Transfer, None, list[int]]:
    """A random number of every rank, none of which knew another's when it chose its own."""
    mine = secrets.randbits(62)
    seals = yield from ask("seals its draw", _seal(wire.rank, mine), is_text, wire, device)
    draws = yield from ask("opens its draw", mine, is_integer, wire, device)
    for rank, draw in enumerate(draws):
        if _seal(rank, draw) != seals[rank]:
            raise RuntimeError(f"an audit of the vote failed: rank {rank} opened another draw")
    return draws


def _seal(rank: int, draw: int) -> str:
    return hashlib.sha256(f"{rank} {draw}".encode()).hexdigest()


def _is_right(
    buffers: Buffers, ballots: Tensor, owner: int, *, cut: slice, cut_blanks: slice, poll: Poll,
    weights: Tensor | None, seed: int, step: Tensor,
) -> bool:  # fmt: skip
    """Whether the verdict of a shard's slice is that of ballots, rows of planes and blank bits."""
    length, planes = cut.stop - cut.start, buffers.layout.planes
    end = planes * length
    blanks = ballots[:, end:].contiguous() if planes % 2 else None
    given = buffers.verdict_planes[owner, :, cut]
    counted = torch.zeros_like(given, memory_format=torch.contiguous_format)
    out_blanks = None
    if buffers.verdict_blanks is not None:
        out_blanks = counted.new_zeros(1, ballots.shape[1] - end)
    poll.count(
        ballots[:, :end].unflatten(1, (planes, length)), blanks, counted, out_blanks, weights,
        first_word=owner * buffers.layout.words_per_shard + cut.start, seed=seed, step=step,
    )  # fmt: skip
    is_same = torch.equal(counted, given)
    if out_blanks is not None and buffers.verdict_blanks is not None:
        is_same &= torch.equal(out_blanks, buffers.verdict_blanks[owner : owner + 1, cut_blanks])
    return is_same
