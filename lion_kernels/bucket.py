"""The tensors of a parameter group, or of a part of it, as the ops take them: local, real,
dense, and with gradients and states in their memory layout. Knows no process groups.
"""

from dataclasses import dataclass, field
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import native, states
from .dense import is_dense
from .options import Settings
from .shards import is_distributed, local, local_like

DOUBLES = (torch.float64, torch.complex128)
# What a gradient is, unless it stands for other tensors.
_PLAIN = {Tensor, type(None)}


def _needs_a_stand_in(p: Tensor) -> bool:
    return not is_dense(p) or p.is_neg()


@dataclass
class Bucket:
    """Lists of equal lengths; gradients are there for a step only. None abstains from a vote."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] | None = None  # compensated rounding only
    block_scales: list[Tensor] | None = None  # int8 momenta only
    is_double: bool = False  # float64, for which there are no kernels: double.py
    is_uniform: bool = False  # parameters are of one dtype, and momenta of one
    # DTensors, whose shards the ops write.
    wrappers: list[Tensor] = field(default_factory=list)
    # (place, parameter with gaps or a sign that its storage lacks), for which a dense one stands in
    # during a step.
    gapped: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def begin(self) -> None:
        """Before the ops: dense tensors stand in for parameters with gaps."""
        for i, p in self.gapped:
            self.params[i] = torch.empty_like(p).copy_(p)

    def write_back(self) -> None:
        """After the ops: what stands for a written tensor shows it."""
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)
        for i, p in self.gapped:
            p.copy_(self.params[i])
            self.params[i] = p

    def let_go(self) -> None:
        """Of gradients and states: nothing here keeps what their owners replace."""
        self.grads, self.exp_avgs = [], []
        self.lows = None if self.lows is None else []
        self.block_scales = None if self.block_scales is None else []

    def append(
        self, param: Tensor, state: dict[str, Any], momentum_dtype: torch.dtype | None
    ) -> None:
        """Add a parameter with its state, which is made where it is missing."""
        p, m = local(param), states.momentum(state, param, momentum_dtype)
        if self.lows is not None:
            self.lows.append(states.compensation(state, param))
        if self.block_scales is not None:
            self.block_scales.append(states.block_scales_of(state))
        if p.is_complex():
            p, m = torch.view_as_real(p), torch.view_as_real(m)
        if not self.is_double and _needs_a_stand_in(p):
            self.gapped.append((len(self.params), p))
        self.params.append(p)
        self.exp_avgs.append(m)

    def with_gradients(self) -> "Bucket":
        """The part of it that has gradients, itself where that is all."""
        if not any(map(is_, self.grads, repeat(None))):
            return self
        kept = [i for i, g in enumerate(self.grads) if g is not None]
        place = {i: k for k, i in enumerate(kept)}
        part = Bucket(
            params=[self.params[i] for i in kept],
            grads=[self.grads[i] for i in kept],
            exp_avgs=[self.exp_avgs[i] for i in kept],
            lows=None if self.lows is None else [self.lows[i] for i in kept],
            block_scales=None
            if self.block_scales is None
            else [self.block_scales[i] for i in kept],
            is_double=self.is_double,
            is_uniform=self.is_uniform,
            wrappers=self.wrappers,
            gapped=[(place[i], p) for i, p in self.gapped if i in place],
        )
        self.let_go()
        return part


@dataclass
class Move:
    """A bucket of group ``number`` in a step. step, int64 (1,): the counter of coins and of
    stochastic rounding; nonfinite, int64 (1,): counts elements that are skipped. None where there
    is no need of one; a vote needs both."""

    number: int
    bucket: Bucket
    settings: Settings
    step: Any
    nonfinite: Any


def _gradient(g: Tensor, param: Tensor, p: Tensor) -> Tensor:
    """A gradient of ``param`` as the ops take it beside ``p``, which is what they take of it."""
    g = local_like(g, param)
    if g.is_complex():
        g = torch.view_as_real(g.resolve_conj())
    strides = p.stride() if is_dense(p) else torch.empty_like(p, device="meta").stride()
    if g.stride() != strides or g.is_neg():
        g = torch.empty_like(p).copy_(g)
    return g


class Plan:
    """The buckets of parameters of a group, asked once: ``serves`` says in a few C loops whether
    they still hold. With ``may_presume`` it asks for dtypes alone, which an op takes as they come:
    whatever else has changed the op refuses, which looks at all of its tensors before it writes
    one."""

    def __init__(
        self,
        group: dict[str, Any],
        indices: list[int],
        state: dict[Tensor, Any],
        settings: Settings,
    ) -> None:
        self.indices = indices
        self._group_params = list(group["params"])
        chosen = set(indices)
        self.others = [i for i in range(len(self._group_params)) if i not in chosen]
        self._stored = (settings.momentum_dtype, settings.rounding)
        double, rest = Bucket(is_double=True), Bucket()
        rest.lows = [] if settings.rounding == "compensated" else None
        double.block_scales = [] if settings.momentum_dtype == torch.int8 else None
        rest.block_scales = [] if settings.momentum_dtype == torch.int8 else None
        members = [self._group_params[i] for i in indices]
        doubles = [p for p in members if p.dtype in DOUBLES]
        # In the order of the buckets.
        self._members = [*doubles, *(p for p in members if p.dtype not in DOUBLES)]
        self._states = [state[p] for p in self._members]
        for k, (p, s) in enumerate(zip(self._members, self._states, strict=True)):
            (double if k < len(doubles) else rest).append(p, s, settings.momentum_dtype)
        self._buckets = [bucket for bucket in (double, rest) if bucket.params]
        # Of each key: the states that have it.
        self._kept = {key: [s for s in self._states if key in s] for key in states.KEYS}
        # Beside pairs of reals, and beside dense stand-ins.
        self._always_odd = [
            i for i, p in enumerate(self._members) if p.is_complex() or _needs_a_stand_in(local(p))
        ]
        self._grads: list[Tensor | None] = []
        self._odd: list[int] = []
        self._are_complex = any(p.is_complex() for p in self._members)
        self._are_sharded = any(map(is_distributed, self._members))
        pairs = zip(self._members, self._states, strict=True)
        self._dtypes = {(p.dtype, s["exp_avg"].dtype) for p, s in pairs}
        rest.is_uniform = len(self._dtypes) == 1
        # Whether one launch sees all that could have changed; cleared when one has refused. What
        # compensates is made and moved before an op is asked.
        self.may_presume = (
            rest.is_uniform
            and rest.lows is None
            and not (doubles or self._always_odd or self._are_sharded)
        )
        self._identity = native.identity(self._everything(), [])[1]

    def _everything(self) -> list[Tensor]:
        """The members and what is kept for them, of DTensors what lies here."""
        found = list(self._members)
        for key, kept in self._kept.items():
            found += map(itemgetter(key), kept)
        return [local(t) for t in found] if self._are_sharded else found

    def serves(self, group: dict[str, Any], settings: Settings, presume: bool) -> bool:
        """Whether the buckets are those of the group's present parameters and states, and present
        gradients fit them; keeps those for ``buckets``. ``presume`` leaves out what an op sees."""
        params = group["params"]
        if (
            self._stored != (settings.momentum_dtype, settings.rounding)
            or len(params) != len(self._group_params)
            or not all(map(is_, params, self._group_params))
        ):
            return False
        self._grads = [p.grad for p in self._members]
        if presume and self._has_its_dtypes():
            self._odd = []
            return True
        if self._are_sharded:
            pairs = list(zip(self._grads, self._members, strict=True))
            if any(g is not None and is_distributed(g) != is_distributed(p) for g, p in pairs):
                return False
            self._grads = [None if g is None else local_like(g, p) for g, p in pairs]
        try:
            self._odd = native.odd_gradients(self._identity, self._everything(), self._grads)
        except (KeyError, RuntimeError, TypeError):  # what is kept is gone, or is no tensor
            return False
        return self._odd != [-1]

    def _has_its_dtypes(self) -> bool:
        """Whether the first member with a gradient has the dtypes of before, as the op then finds
        all others have, and gradients are tensors of no other kind."""
        try:
            pairs = zip(self._members, self._states, self._grads, strict=True)
            found = next(((p, s) for p, s, g in pairs if g is not None), None)
            is_same = found is None or (found[0].dtype, found[1]["exp_avg"].dtype) in self._dtypes
            return is_same and {*map(type, self._grads)} <= _PLAIN
        except (AttributeError, KeyError):
            return False

    def buckets(self, may_abstain: bool) -> list[Bucket]:
        """The step's buckets with their gradients; without one, a parameter abstains or is left
        out."""
        if not self._grads:  # asked just now
            self._grads, self._odd = [p.grad for p in self._members], [*range(len(self._members))]
        found, first = [], 0
        for bucket in self._buckets:
            n = len(bucket.params)
            bucket.grads = self._grads[first : first + n]
            self._fill(bucket, self._members[first : first + n], self._states[first : first + n])
            for i in {*self._odd, *self._always_odd}:
                if first <= i < first + n and (g := self._grads[i]) is not None:
                    p = bucket.params[i - first]
                    bucket.grads[i - first] = _gradient(g, self._members[i], p)
            first += n
            bucket = bucket if may_abstain else bucket.with_gradients()
            if bucket.params:
                if bucket.gapped:
                    bucket.begin()
                found.append(bucket)
        self._grads = []
        return found

    def _fill(self, bucket: Bucket, members: list[Tensor], kept: list[dict[str, Any]]) -> None:
        """Bring in what is kept, as it is now."""
        bucket.exp_avgs = list(map(itemgetter("exp_avg"), kept))
        if self._are_sharded:
            bucket.exp_avgs = list(map(local, bucket.exp_avgs))
            bucket.wrappers = [
                t
                for p, s, g in zip(members, kept, bucket.grads, strict=True)
                if g is not None and is_distributed(p)
                for t in (p, *(s[key] for key in states.KEYS if key in s))
            ]
        if self._are_complex:
            bucket.exp_avgs = [
                torch.view_as_real(m) if m.is_complex() else m for m in bucket.exp_avgs
            ]
        if bucket.lows is not None:
            pairs = zip(kept, members, strict=True)
            bucket.lows = [states.compensation(s, p) for s, p in pairs]
        if bucket.block_scales is not None:
            bucket.block_scales = list(map(states.block_scales_of, kept))
