"""Where the buckets of an election vote: their buffers, and what is kept beside them from step to
step. Knows nobody at the other end.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..bucket import Bucket, Move
from ..layout import WIRE_VERSION, pack_flags, room_of, to_int32
from .buffers import Buffers
from .poll import Poll
from .statistics import Statistics


@dataclass(eq=False)
class Booth:
    """Where buckets vote: their buffers, and the place of each in word space and among flags."""

    voters: list[weakref.ref[Bucket]]
    buffers: Buffers
    first_words: list[int]
    first_flags: list[int]
    weights: Tensor | None
    statistics: Statistics | None = None
    trailer: tuple[list[int], Tensor] | None = None  # of the last step
    flags: tuple[list[bool], list[int]] | None = None

    @classmethod
    def of(cls, moves: Sequence[Move], buffers: Buffers, weights: Tensor | None) -> "Booth":
        sizes = [[p.numel() for p in move.bucket.params] for move in moves]
        words = accumulate((sum(map(room_of, each)) for each in sizes), initial=0)
        flags = accumulate(map(len, sizes), initial=0)
        buckets = [weakref.ref(move.bucket) for move in moves]
        return cls(buckets, buffers, [*words], [*flags], weights)

    @classmethod
    def for_moves(
        cls, moves: Sequence[Move], before: "Booth | None", poll: Poll, is_sharded: bool, rank: int
    ) -> "Booth":
        """That of ``before``, if it serves, or another, with its buffers where they fit."""
        if before is not None and before.serves(moves):
            return before
        device = moves[0].bucket.device
        numels = tuple(p.numel() for move in moves for p in move.bucket.params)
        buffers = None if before is None else before.buffers
        if buffers is None or buffers.layout.numels != numels:
            buffers = Buffers.allocate(numels, poll, is_sharded, rank, device)
        return cls.of(moves, buffers, poll.weights_on(device))

    def serves(self, moves: Sequence[Move]) -> bool:
        pairs = zip(self.voters, moves, strict=False)
        return len(self.voters) == len(moves) and all(v() is m.bucket for v, m in pairs)

    def trailer_of(self, present: list[bool], status: int, digest: int) -> Tensor:
        """Presence and seal, int32 (trailer words,), on the device."""
        if self.flags is None or self.flags[0] != present:
            self.flags = present, pack_flags(present, self.buffers.layout.flag_words)
        low, high = to_int32([digest & 0xFFFFFFFF, digest >> 32])
        values = [*self.flags[1], status, WIRE_VERSION, low, high]
        if self.trailer is None or self.trailer[0] != values:
            sent = torch.tensor(values, dtype=torch.int32)
            if self.buffers.device.type == "cuda":
                sent = sent.pin_memory().to(self.buffers.device, non_blocking=True)
            self.trailer = values, sent
        return self.trailer[1]
