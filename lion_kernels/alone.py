"""How one device, or one rank, moves the buckets of an optimizer: each in one pass.

What an optimizer is handed is this or an electorate (vote/election.py), which has the same methods.
Their work are generators, which yield what they wait for.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import double, ops
from .bucket import Bucket, Move
from .options import Settings
from .scaling import Scaling


@dataclass(frozen=True)
class Alone:
    """A step waits for nothing."""

    # Whether every rank must have all of a parameter.
    is_whole: bool = False
    # Whether a parameter without a gradient abstains; else it is left out.
    votes = False

    def drive(self, work: Iterator[Any]) -> None:
        """Run work to its end."""
        for transfer in work:
            transfer.wait()

    def is_member(self, p: Tensor) -> bool:
        """Whether a step has to do with a parameter, as far as this rank knows."""
        return p.grad is not None

    def open(self) -> Iterator[Any]:
        """What comes first where all ranks come together."""
        yield from ()

    def refuse(self, error: Exception) -> Iterator[Any]:
        """Tells every rank of an error of this one."""
        yield from ()

    def members(
        self, groups: list[list[Tensor]], mine: list[list[int]], asked: list[bool]
    ) -> Generator[Any, None, list[list[int]]]:
        """Of each group, the indices of what a step has to do with; ``mine``: as far as this rank
        knows; ``asked``: whether they may have changed."""
        yield from ()
        return mine

    def agreed(self, scaling: Scaling) -> Generator[Any, None, Scaling]:
        """What a GradScaler found, on any rank; not asked where there is none."""
        yield from ()
        return scaling

    def move(self, moves: list[Move], scaling: Scaling, seed: int) -> Iterator[Any]:
        """Step buckets, one after the other. The counter of stochastic rounding advances by one,
        but for float64."""
        yield from ()
        for move in moves:
            _step(move, scaling.to(move.bucket.device), seed)


def _step(move: Move, scaling: Scaling, seed: int) -> None:
    bucket, settings = move.bucket, move.settings
    if bucket.is_double:
        double.step(bucket, settings, scaling, move.nonfinite)
        return
    grads = cast(list[Tensor], bucket.grads)  # none is missing: none abstains
    ops.lion_step(
        bucket.params, grads, bucket.exp_avgs,
        lr=settings.lr, beta1=settings.betas[0], beta2=settings.betas[1],
        weight_decay=settings.weight_decay, maximize=settings.maximize, nonfinite=move.nonfinite,
        grad_scale=scaling.grad_scale, found_inf=scaling.found_inf,
        rounding=settings.rounding, lows=bucket.lows, seed=seed, step=move.step,
        cautious=settings.cautious, cautious_decay=settings.cautious_decay,
        block_scales=bucket.block_scales,
        agreeing=_agreeing(bucket, settings, scaling) if settings.rescales else None,
        uniform=bucket.is_uniform,
    )  # fmt: skip


def _agreeing(bucket: Bucket, settings: Settings, scaling: Scaling) -> Tensor:
    """Of each tensor, the elements that a rescaled cautious update moves."""
    counts = torch.zeros(len(bucket.params), dtype=torch.int64, device=bucket.device)
    ops.count_agreeing(
        cast(list[Tensor], bucket.grads), bucket.exp_avgs, counts, beta1=settings.betas[0],
        maximize=settings.maximize, grad_scale=scaling.grad_scale, block_scales=bucket.block_scales,
    )  # fmt: skip
    return counts
