"""What is voted: planes and scales of ballots, tallies and verdicts, and how they are counted.

Everything that travels is a vector of small integers held as bit planes; the integer v under a
scale s stands for 2 * v / s - 1. An odd scale cannot say zero: beside its planes travels a bit a
word, which tells that the word is blank, all of it zero. Knows no wire and no buffers.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..layout import MAX_SCALE


@dataclass(frozen=True)
class Poll:
    """A vote of ``voters`` ranks; raises ValueError where there are more than can be counted.

    =================================  ======================  ==============================
    what                               planes                  scale
    =================================  ======================  ==============================
    binary ballot                      1                       1
    ternary ballot                     2                       2
    tally                              bit length of scale     weights * scale of a ballot
    verdict, majority that can tie     2                       2
    verdict, majority that cannot      1                       1
    verdict, average                   the tally's             the tally's
    =================================  ======================  ==============================

    A majority cannot tie where the tally's scale is odd or ``ties`` is "coin". Where ballots are
    binary, blank words may leave a tie or a half under an odd scale, too: those fall to a coin.
    ``weights``: as how many ballots each rank's counts, at least 1; None: as one.
    """

    voters: int
    aggregation: str = "majority"  # or "average"
    ballots: str = "binary"  # or "ternary"
    ties: str = "zero"  # or "coin"
    weights: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.scale > MAX_SCALE:
            raise ValueError(f"at most {MAX_SCALE} votes can be counted, got {self.scale}")

    @cached_property
    def ballot_planes(self) -> int:
        return 2 if self.ballots == "ternary" else 1

    @cached_property
    def scale(self) -> int:
        """Of the tally. A ballot's scale is its number of planes."""
        return self.ballot_planes * (sum(self.weights) if self.weights else self.voters)

    @cached_property
    def tally_planes(self) -> int:
        return self.scale.bit_length()

    @cached_property
    def verdict_planes(self) -> int:
        if self.aggregation == "average":
            return self.tally_planes
        return 2 if self.ties == "zero" and self.scale % 2 == 0 else 1

    @cached_property
    def verdict_scale(self) -> int:
        return self.scale if self.aggregation == "average" else self.verdict_planes

    @cached_property
    def verdict_has_blanks(self) -> bool:
        return self.ballots == "binary" and self.verdict_scale % 2 == 1

    def weights_on(self, device: torch.device) -> Tensor | None:
        """The weights as the ops take them, int32 (voters,); None where each is 1."""
        if self.weights is None or set(self.weights) == {1}:
            return None
        return torch.tensor(self.weights, dtype=torch.int32).to(device)

    def count(
        self,
        ballots: Tensor,
        blanks: Tensor | None,
        verdict: Tensor,
        out_blanks: Tensor | None,
        weights: Tensor | None,
        first_word: int,
        seed: int,
        step: Tensor,
    ) -> None:
        """The verdict (planes, words) of ballots (voters, planes, words), each int32. The words are
        those from ``first_word`` of word space on: coins are hashed from (seed, step, element)."""
        op = ops.tally if self.aggregation == "average" else ops.elect
        op(
            ballots, verdict, self.scale, first_word=first_word, seed=seed, step=step,
            blanks=blanks, out_blanks=out_blanks, weights=weights,
        )  # fmt: skip
