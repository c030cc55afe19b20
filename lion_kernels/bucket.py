"""The tensors of a parameter group, or of a part of it, as the ops take them: local, real,
dense, and with gradients and states in their memory layout. Knows no options and no process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lion_kernels import states
from lion_kernels.dense import is_dense, local, local_like

DOUBLES = (torch.float64, torch.complex128)


@dataclass
class Bucket:
    """Lists of equal lengths. A None gradient abstains from a vote."""

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
        """After the ops: what stands for a written tensor shows it."""
        torch.autograd.graph.increment_version(self.wrappers)
        for p, dense in self.stand_ins:
            p.copy_(dense)

    def append(
        self, param: Tensor, state: dict[str, Any], momentum_dtype: torch.dtype | None
    ) -> None:
        """Add a parameter with its gradient and its state, which is made where it is missing."""
        p, m = local(param), states.momentum(state, param, momentum_dtype)
        g = None if param.grad is None else local_like(param.grad, param)
        if self.lows is not None:
            self.lows.append(states.compensation(state, param))
        if self.scales is not None:
            self.scales.append(states.scales_of(state))
        if p is not param:
            self.wrappers += [param, *(state[key] for key in states.KEYS if key in state)]
        if p.is_complex():
            p, m = torch.view_as_real(p), torch.view_as_real(m)
            g = None if g is None else torch.view_as_real(g.resolve_conj())
        if not self.is_double:
            if not is_dense(p):
                self.stand_ins.append((p, torch.empty_like(p).copy_(p)))
                p = self.stand_ins[-1][1]
            if g is not None and (g.stride() != p.stride() or g.is_neg()):
                g = torch.empty_like(p).copy_(g)
        self.params.append(p)
        self.grads.append(g)
        self.exp_avgs.append(m)


def buckets_of(
    params: Sequence[Tensor],
    state: dict[Tensor, Any],
    momentum_dtype: torch.dtype | None,
    compensated: bool,
) -> list[Bucket]:
    """The buckets of ``params``, a list without its float64 ones last, empty ones left out."""
    buckets = [Bucket(is_double=True), Bucket(lows=[] if compensated else None)]
    for bucket in buckets:
        bucket.scales = [] if momentum_dtype == torch.int8 else None
    for p in params:
        buckets[p.dtype not in DOUBLES].append(p, state[p], momentum_dtype)
    return [bucket for bucket in buckets if bucket.params]
