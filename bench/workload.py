"""What the GPU bench runs: tensors of some shapes and one kind, all that the ops take along with
them, and whether the ops are right on them. Knows no clock.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cpu
import peers
from cpu import BETAS, RATES, random_ballots, trailers_of
from lion_kernels.int8 import quantize
from lion_kernels.layout import BallotLayout
from peers import KINDS

# (op, planes) that are timed on lists.
PLAIN = (("lion_step", 0), ("encode", 1), ("apply", 1))
VARIANTS = (*PLAIN, ("encode", 2), ("apply", 2), ("apply", 4), ("apply", 8))
SCALES = {1: 1, 2: 2, 4: 8, 8: 128}  # of a verdict of so many planes
# What calls touch before they touch the same bytes again: many times what an L2 cache holds.
LARGE = 1_200_000_000


class Workload:
    """Tensors of some shapes and one kind, and what the ops take along with them. ``options``: the
    ops are cautious, and lion_step skips and counts what is not finite. ``offset``: elements that
    lie before each tensor in its memory."""

    def __init__(
        self,
        shapes: list[list[int]],
        kind: str,
        device: str | torch.device,
        options: bool = False,
        offset: int = 0,
    ) -> None:
        p_dtype, m_dtype = KINDS[kind]
        self.device, self.options = device, options

        def placed(t: Tensor) -> Tensor:
            room = torch.empty(offset + t.numel(), dtype=t.dtype, device=device)
            return room[offset:].view(t.shape).copy_(t) if offset else t

        self.params = [placed(torch.randn(shape, dtype=p_dtype, device=device)) for shape in shapes]
        self.grads = [placed(torch.randn_like(p)) for p in self.params]
        momenta = [torch.randn(shape, device=device) for shape in shapes]
        self.block_scales = None
        if m_dtype == torch.int8:
            pairs = [quantize(m) for m in momenta]
            self.exp_avgs, self.block_scales = (
                [placed(q) for q, _ in pairs],
                [scale for _, scale in pairs],
            )
        else:
            self.exp_avgs = [placed(m.to(m_dtype)) for m in momenta]
        self.layout = BallotLayout(tuple(p.numel() for p in self.params), planes=1, shards=1)
        # Of one rank that is ready; and what encode sends.
        self.trailers, self.sent = (trailers_of(self.layout, device=device) for _ in range(2))
        blank_words = self.layout.blank_words
        self.blanks = torch.zeros(1, blank_words, dtype=torch.int32, device=device)
        self.step, self.counter = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.sizes = p_dtype.itemsize, peers.momentum_bytes(kind)
        self._words: dict[int, Tensor] = {}

    def words(self, planes: int) -> Tensor:
        """A ballot or a verdict of so many planes."""
        if planes not in self._words:
            room = self.layout.words_per_shard
            self._words[planes] = random_ballots(1, planes, room, self.device)
        return self._words[planes]

    def arguments(self, op: str, planes: int) -> tuple[dict[str, Any], list[Tensor]]:
        """What the op takes, by name, and those of it that it writes."""
        if op == "lion_step":
            args = {"params": self.params, "grads": self.grads, "exp_avgs": self.exp_avgs}
            args |= {**RATES, **BETAS, "maximize": False, "block_scales": self.block_scales}
            args |= {"cautious": self.options, "cautious_decay": self.options}
            args["nonfinite"] = self.counter if self.options else None
            return args, [*self.params, *self.exp_avgs, *(self.block_scales or ()), self.counter]
        words, blanks = self.words(planes), self.blanks if planes == 1 else None
        if op == "encode":
            args = {
                "grads": self.grads,
                "exp_avgs": self.exp_avgs,
                "block_scales": self.block_scales,
            }
            args |= {"ballot": words, "blanks": blanks, **BETAS, "maximize": False}
            args |= {"seed": 0, "rank": 0, "step": self.step, "nonfinite": self.counter}
            args |= {"trailers": self.sent, "trailer": self.trailers[0], "shared": self.step}
            args["cautious"] = self.options
            written = [*self.exp_avgs, words, self.blanks, self.sent, self.counter]
            return args, [*written, *(self.block_scales or ())]
        args = {"params": self.params, "verdict": words, "blanks": blanks, **RATES}
        args["trailers"] = self.trailers
        args |= {"scale": SCALES[planes], "step": self.step, "cautious_decay": self.options}
        return args, [*self.params, self.step]

    def call(self, ops: Any, op: str, planes: int) -> Callable[[], object]:
        return partial(getattr(ops, op), **self.arguments(op, planes)[0])

    def traffic(self, op: str, planes: int) -> tuple[int, int]:
        """Bytes read and written; a plane of bits is one eighth of a byte an element, and beside
        one plane there is a blank bit a word."""
        (p, m), bits = self.sizes, planes / 8 + (planes == 1) / 256
        read, written = {
            "lion_step": (2 * p + m, p + m),
            "encode": (p + m, m + bits),
            "apply": (p + bits, p),
        }[op]
        n = sum(self.layout.numels)
        return int(read * n), int(written * n)


def name_of(op: str, planes: int) -> str:
    if op == "apply":
        return f"apply, {planes} plane{'s' * (planes > 1)}"
    return op + {0: "", 1: ", binary", 2: ", ternary"}[planes]


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Each time the next of them. All ran once: a first call compiles, and builds tables."""
    for call in calls:
        call()
    turns = itertools.cycle(calls)
    return calls[0] if len(calls) == 1 else lambda: next(turns)()


def cold(
    shapes: list[list[int]], kind: str, device: torch.device, options: bool = False
) -> list[Workload]:
    """As many workloads of these shapes as it takes for calls in turn to find nothing in a cache;
    one in a dry run. apply touches least: the parameters alone."""
    n_bytes = KINDS[kind][0].itemsize * sum(math.prod(shape) for shape in shapes)
    copies = math.ceil(LARGE / n_bytes) if device.type == "cuda" else 1
    return [Workload(shapes, kind, device, options) for _ in range(copies)]


# Correct first: a kernel that differs from the reference has no time.


def wrong_ops(ops: Any, sizes: tuple[int, ...], variants: Any, kind: str) -> list[str]:
    """Those of the (op, planes) that are wrong on tensors of these sizes: plain where tensors start
    at 16 bytes, with options where they do not."""
    wrong = []
    for options, offset in ((False, 0), (True, 1)):
        small = Workload([[n] for n in sizes], kind, "cpu", options, offset)
        for op, planes in variants:
            if cpu.differs(op, *small.arguments(op, planes), ops):
                wrong.append(f"{name_of(op, planes)}, {kind}" + ", options, unaligned" * offset)
    return wrong


def wrong(ops: Any, sizes: tuple[int, ...], device: torch.device) -> list[str]:
    """Everything that is timed and differs from the reference."""
    found = [name for kind in KINDS for name in wrong_ops(ops, sizes, VARIANTS, kind)]
    return found + cpu.check_counts(ops) + cpu.check_optimizer(device)
