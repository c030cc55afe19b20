"""How ranks vote: who agrees with the verdict, and how much is unanimous, tied, abstained from and
turned over. Counted by popcount on the shard that a rank counts anyway, and read when asked.

Knows planes and layouts, no wire and no optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import BITS_PER_WORD, BallotLayout, room_of
from .forms import Form, below, list_of, row_of
from .poll import Poll

# A rank that votes against more than so many of the elements that it had a say in is named.
_CLEARLY_LESS_THAN_HALF = 0.45
# Of fewer elements, it may be chance.
_FEWEST = 10_000

# Of each group: elements; those that are unanimous, not moved, turned over, and could have been so;
# and votes of zero.
_COLUMNS = 6


@dataclass(frozen=True)
class GroupStatistics:
    """Shares of the elements of a group that were counted."""

    unanimous: float  # every rank voted the same, and none abstained
    tied: float  # the verdict left them where they were
    abstaining: float  # of votes: zeros that are sent as such
    flipped: float  # of those that moved the last time and now: the other way


@dataclass(frozen=True)
class VoteStatistics:
    """What vote_statistics() gives."""

    steps: int  # that were counted
    agreement: tuple[float, ...]  # of each rank: votes that equal the verdict, of those it had
    groups: tuple[GroupStatistics, ...]
    suspects: tuple[int, ...]  # ranks that clearly agree with less than half


def popcount(words: Tensor) -> Tensor:
    """The bits that are set in each int32 word."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def spread(blanks: Tensor, n_words: int) -> Tensor:
    """Bits (n, words / 32), one a word, as words (n, n_words) of all ones or none."""
    bits = (blanks.unsqueeze(-1) >> torch.arange(BITS_PER_WORD, device=blanks.device)) & 1
    return -bits.flatten(1)[:, :n_words].to(torch.int32)


def signs_of(planes: Tensor, scale: int, blank: Tensor | None) -> tuple[Tensor, Tensor]:
    """The elements above and below the middle of integers (..., planes, words), int32 (...,
    words); blank words are neither."""
    above = torch.zeros_like(planes[..., 0, :])
    equal = ~above
    for b in reversed(range(planes.shape[-2])):
        plane = planes[..., b, :]
        if (scale // 2) >> b & 1:
            equal = equal & plane
        else:
            above = above | (equal & plane)
            equal = equal & ~plane
    below = ~above & ~equal if scale % 2 == 0 else ~above
    return (above, below) if blank is None else (above & ~blank, below & ~blank)


class Statistics:
    """Counts of one election: of the shard of ``layout`` that begins at ``first_word``, for groups
    of ``n_tensors`` tensors each, in ``number`` of the optimizer."""

    def __init__(
        self,
        layout: BallotLayout,
        first_word: int,
        numbers: Sequence[int],
        n_tensors: Sequence[int],
        poll: Poll,
        device: torch.device,
    ) -> None:
        self._poll, self.numbers = poll, list(numbers)
        end_word, n_words = first_word + layout.words_per_shard, layout.words_per_shard
        is_element = torch.zeros(layout.words_per_shard * layout.shards, dtype=torch.int32)
        word, self._ranges, rest = 0, [], list(layout.numels)
        for n in n_tensors:
            begin = word
            for numel in rest[:n]:
                is_element[word : word + numel // BITS_PER_WORD] = -1
                if numel % BITS_PER_WORD:
                    is_element[word + numel // BITS_PER_WORD] = (1 << numel % BITS_PER_WORD) - 1
                word += room_of(numel)
            rest = rest[n:]
            cut = [min(max(w, first_word), end_word) - first_word for w in (begin, word)]
            self._ranges.append(slice(*cut))
        self._is_element = is_element[first_word : first_word + n_words].to(device)
        self.votes = torch.zeros(2, poll.voters, dtype=torch.int64, device=device)
        self.groups = torch.zeros(len(n_tensors), _COLUMNS, dtype=torch.int64, device=device)
        self._n_steps = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def add(
        self, ballots: Tensor, blanks: Tensor | None, verdict: Tensor, out_blanks: Tensor | None
    ) -> None:
        """Count ballots (ranks, planes, words) and their verdict (planes, words), which has a blank
        bit a word where it has any, (1, words / 32)."""
        self._n_steps += 1
        n_words, here = ballots.shape[2], self._is_element
        blank = None if blanks is None else spread(blanks, n_words)
        up, down = signs_of(ballots, ballots.shape[1], blank)
        scale = self._poll.verdict_scale
        left = None if out_blanks is None else spread(out_blanks, n_words)[0]
        won, lost = signs_of(verdict, scale, left)
        won, lost = won & here, lost & here
        for i in range(len(up)):  # a rank at a time: of words, none are kept
            agrees = (up[i] & won) | (down[i] & lost)
            had = (up[i] | down[i]) & (won | lost)
            self.votes[0, i] += popcount(agrees).sum()
            self.votes[1, i] += popcount(had).sum()
        every_up, every_down, zeros = here.clone(), here.clone(), torch.zeros_like(here)
        for one, other in zip(up, down, strict=True):
            every_up &= one
            every_down &= other
            zeros += popcount(here & ~(one | other))
        before = (
            (torch.zeros_like(won), torch.zeros_like(won)) if self._last is None else self._last
        )
        turned = (won & before[1]) | (lost & before[0])
        could = (won | lost) & (before[0] | before[1])
        self._last = won, lost
        counted = (here, every_up | every_down, here & ~(won | lost), turned, could)
        columns = [*map(popcount, counted), zeros]
        for number, cut in enumerate(self._ranges):
            self.groups[number] += torch.stack([column[cut].sum() for column in columns])

    def taken(self) -> list[Any]:
        """What was counted, and is again from 0 on now: steps, votes (2, ranks), and of each group
        (number, columns). Waits for the device."""
        groups = zip(self.numbers, self.groups.tolist(), strict=True)
        counts = [self._n_steps, self.votes.tolist(), [*map(list, groups)]]
        self._n_steps = 0
        self.votes.zero_()
        self.groups.zero_()
        return counts


def counts_of(n_ranks: int, n_groups: int) -> Form:
    """The form of what a rank has taken, of each of its elections."""
    count = below(2**63)
    votes = list_of(list_of(count, n_ranks), 2)
    return list_of(row_of(count, votes, list_of(row_of(below(n_groups), list_of(count, _COLUMNS)))))


def summed(everyones: Sequence[Any], n_ranks: int, n_groups: int) -> VoteStatistics:
    """What every rank has taken, of each of its elections, of the form of counts_of."""
    votes = torch.zeros(2, n_ranks, dtype=torch.int64)
    groups = torch.zeros(n_groups, _COLUMNS, dtype=torch.int64)
    n_steps = 0
    for steps, of_ranks, of_groups in (each for mine in everyones for each in mine):
        n_steps = max(n_steps, steps)
        votes += torch.tensor(of_ranks)
        for number, columns in of_groups:
            groups[number] += torch.tensor(columns)
    agreed, had = votes.tolist()
    agreement = tuple(a / h if h else 1.0 for a, h in zip(agreed, had, strict=True))
    found = []
    for n, unanimous, tied, turned, could, zeros in groups.tolist():
        of = max(n, 1)
        found.append(
            GroupStatistics(
                unanimous / of, tied / of, zeros / (of * n_ranks), turned / max(could, 1)
            )
        )
    suspects = tuple(
        rank
        for rank, (share, of) in enumerate(zip(agreement, had, strict=True))
        if of >= _FEWEST and share < _CLEARLY_LESS_THAN_HALF
    )
    return VoteStatistics(n_steps, agreement, tuple(found), suspects)
