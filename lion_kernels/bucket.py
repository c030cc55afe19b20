"""The tensors of a parameter group, or of a part of it, as the ops take them: local, real,
dense, and with gradients and states in their memory layout. Knows no process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from lion_kernels import states
from lion_kernels.dense import is_dense, local, local_like
from lion_kernels.options import Settings

DOUBLES = (torch.float64, torch.complex128)


@dataclass
class Bucket:
    """Lists of equal lengths; gradients are there for a step only. None abstains from a vote."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] | None = None  # compensated rounding only
    scales: list[Tensor] | None = None  # int8 momenta only
    is_double: bool = False  # float64, for which there are no kernels: double.py
    # DTensors, whose shards the ops write.
    wrappers: list[Tensor] = field(default_factory=list)
    # (parameter with gaps, its dense stand-in): copied back after the step.
    stand_ins: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def write_back(self) -> None:
        """After the ops: what stands for a written tensor shows it; gradients are let go."""
        self.grads = []
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)
        for p, dense in self.stand_ins:
            p.copy_(dense)

    def append(
        self, param: Tensor, state: dict[str, Any], momentum_dtype: torch.dtype | None
    ) -> None:
        """Add a parameter with its gradient and its state, which is made where it is missing."""
        p, m = local(param), states.momentum(state, param, momentum_dtype)
        if self.lows is not None:
            self.lows.append(states.compensation(state, param))
        if self.scales is not None:
            self.scales.append(states.scales_of(state))
        if p is not param:
            self.wrappers += [param, *(state[key] for key in states.KEYS if key in state)]
        if p.is_complex():
            p, m = torch.view_as_real(p), torch.view_as_real(m)
        if not self.is_double and not is_dense(p):
            self.stand_ins.append((p, torch.empty_like(p).copy_(p)))
            p = self.stand_ins[-1][1]
        self.params.append(p)
        self.grads.append(None if param.grad is None else _gradient(param.grad, param, p))
        self.exp_avgs.append(m)


def _gradient(g: Tensor, param: Tensor, p: Tensor) -> Tensor:
    """A gradient of ``param`` as the ops take it beside ``p``, which is what they take of it."""
    g = local_like(g, param)
    if g.is_complex():
        g = torch.view_as_real(g.resolve_conj())
    if g.stride() != p.stride() or g.is_neg():
        g = torch.empty_like(p).copy_(g)
    return g


def buckets_of(
    params: Sequence[Tensor], state: dict[Tensor, Any], settings: Settings
) -> list[Bucket]:
    """The buckets of ``params``, the float64 ones first, empty ones left out."""
    buckets = [
        Bucket(is_double=True),
        Bucket(lows=[] if settings.rounding == "compensated" else None),
    ]
    for bucket in buckets:
        bucket.scales = [] if settings.momentum_dtype == torch.int8 else None
    for p in params:
        buckets[p.dtype not in DOUBLES].append(p, state[p], settings.momentum_dtype)
    return [bucket for bucket in buckets if bucket.params]


class Plan:
    """The buckets of a group, asked once: ``serves`` says in a few C loops whether they still hold,
    and takes the step's gradients. Where a parameter has gaps or is a DTensor they never do: what
    the ops write is a copy, or hidden from the loops."""

    def __init__(
        self,
        group: dict[str, Any],
        indices: list[int],
        state: dict[Tensor, Any],
        settings: Settings,
    ) -> None:
        self._group_params = list(group["params"])
        chosen = set(indices)
        self.others = [p for i, p in enumerate(group["params"]) if i not in chosen]
        self._stored = (settings.momentum_dtype, settings.rounding)
        members = [group["params"][i] for i in indices]
        self.buckets = buckets_of(members, state, settings)
        self._lasts = not any(b.stand_ins or b.wrappers for b in self.buckets)
        # In the order of the buckets: the float64 members come first.
        self._members = sorted(members, key=lambda p: p.dtype not in DOUBLES)
        self._states = [state[p] for p in self._members]
        keys = [key for key in states.KEYS if any(key in s for s in self._states)]
        self._kept = {key: [s[key] for s in self._states if key in s] for key in keys}
        self._has_all = all(len(kept) == len(members) for kept in self._kept.values())
        self._always_odd = [i for i, p in enumerate(self._members) if p.is_complex()]
        if self._lasts:
            self._identity = torch.ops.lion_kernels._identity(self._members, [])

    def serves(self, group: dict[str, Any], settings: Settings, may_be_missing: bool) -> bool:
        """Whether the buckets are those of the group's present parameters and states, each with a
        gradient unless that may be missing; if so, they have its present gradients."""
        params = group["params"]
        if (
            not self._lasts
            or not self._has_all
            or self._stored != (settings.momentum_dtype, settings.rounding)
            or len(params) != len(self._group_params)
            or not all(map(is_, params, self._group_params))
        ):
            return False
        for key, kept in self._kept.items():
            try:
                if not all(map(is_, map(itemgetter(key), self._states), kept)):
                    return False
            except KeyError:
                return False
        grads: list[Tensor | None] = [p.grad for p in self._members]
        odd = torch.ops.lion_kernels._odd_gradients(
            self._identity, self._members, grads, may_be_missing
        )
        if odd == [-1]:
            return False
        self._take(grads, sorted({*odd, *self._always_odd}))
        return True

    def _take(self, grads: list[Tensor | None], odd: list[int]) -> None:
        first = 0
        for bucket in self.buckets:
            n = len(bucket.params)
            bucket.grads = grads[first : first + n]
            for i in odd:
                if first <= i < first + n and (g := grads[i]) is not None:
                    p = bucket.params[i - first]
                    bucket.grads[i - first] = _gradient(g, self._members[i], p)
            first += n
