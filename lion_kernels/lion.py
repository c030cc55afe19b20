"""Lion on one device: parameter groups, state and checks around one fused pass over memory.

Owns what both optimizers share: gradients brought into the parameters' memory layout, the step,
loading and saving. Imports no kernel; calls torch.ops.lion_kernels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lion_kernels import _ops, interchange, kernels, states
from lion_kernels.checks import (
    check_gradient,
    check_lr,
    check_parameters,
    check_plain,
    check_rescale,
)
from lion_kernels.options import check_options, lr_tensor, momentum_dtype, weight_decay
from lion_kernels.release import Release
from lion_kernels.states import local


@dataclass
class Batch:
    """The tensors of one group as the ops take them: dense, real, in equal memory layouts."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] | None = None  # compensated rounding only
    scales: list[Tensor] | None = None  # int8 momenta only
    # (parameter with gaps, its dense stand-in): copied back after the step.
    stand_ins: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def write_back(self) -> None:
        for p, dense in self.stand_ins:
            p.copy_(dense)


class Lion(Optimizer):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675, Algorithm 2), one fused pass over memory.

    Equivalent PyTorch, in float32 arithmetic whatever the storage types::

        c = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)   # one rounding to p's dtype
        m = beta2 * m + (1 - beta2) * g                  # state key "exp_avg"

    sign(0) is 0; sign(NaN) is NaN, so that a NaN shows in the parameter as in torch.optim.

    Every update has the size of lr: in bfloat16, rounding to nearest loses it in weights above
    about 256 lr, and loses decays below 2**-9 a step. ``rounding`` repairs both.

    Works with torch.amp.GradScaler, which hands it grad_scale and found_inf: gradients are unscaled
    in the same pass, and a step that found an infinity changes nothing. On CUDA devices a step
    waits for nothing; with static gradients and a tensor lr on the device it can be captured into
    a CUDA graph, after one step outside.

    Args:
        params: parameters, (name, parameter) pairs or group dicts; float32, bfloat16, float16 or
            complex64, any shape and strides without overlaps; one device a group, a CPU or CUDA.
            DTensors, as fully_shard makes them, step their local shards, and their states are
            DTensors too.
        lr: learning rate, a float or a tensor of one element, on the CPU or on the parameters'
            device; read in every step. Good values are 3 to 10 times below AdamW's.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: decoupled, multiplied by lr; good values are 3 to 10 times above AdamW's.
        maximize: go up instead of down.
        momentum_dtype: storage of the momentum, a torch dtype or its name; None means the
            parameter's own. "int8": 127 * sqrt(|m| / scale) with the sign of m, and as state
            "exp_avg_scale" the float32 scale of every 128 elements, their largest magnitude: 1.03
            bytes a parameter. A momentum that is not finite reads as NaN.
        rounding: of bfloat16 and float16 parameters: "nearest"; "stochastic", up or down at random
            with the exact mean, no state, bits hashed from (seed, step, element); "compensated",
            what a parameter drops is kept in its state "compensation", two bytes: for bfloat16 the
            pair is exactly a float32 weight (see float32_parameter).
        nonfinite: where c is infinite or NaN: "propagate" it to the parameter, as torch.optim does,
            or "skip" the element, weight and momentum, and count it (see nonfinite_count).
        independent_weight_decay: decay by weight_decay * lr / initial lr instead of
            weight_decay * lr, as MosaicML's DecoupledLionW does; weight_decay=w then equals
            w / initial lr without it. The initial lr is the group's at construction, kept as its
            "reference_lr".
        cautious: leave weights whose update has not the sign of their gradient: sign(c) is 0
            where sign(c) != sign(g) (Liang et al. 2024, arXiv:2411.16085). True: the others move
            by lr as always; "rescaled": by lr times n / (1 + those that move) of each tensor's n,
            as in the paper, which takes another pass over gradients and momenta.
        cautious_weight_decay: decay only where sign(c) * p >= 0, so that decay never works
            against the update (Chen et al. 2025, arXiv:2510.12402).
        fused_backward: step each parameter from a hook, as soon as backward has its gradient, and
            free the gradient: their peak falls from the whole model to one parameter. step() then
            ends the step. Accumulating gradients needs ``accumulate()``; a GradScaler is refused,
            and clipping by global norm finds no gradients to clip, which nothing here can see.
        seed: of stochastic rounding.

    Raises:
        ValueError: an option out of range, an unsupported dtype, mixed devices in a group, a
            sparse gradient or one of another dtype, shape or device, a loaded state of another
            shape. Nothing is written before it is raised.
        RuntimeError: the compiled library is missing; CUDA parameters without triton.
    """

    # torch.amp.GradScaler leaves unscaling and skipping to optimizers that say so.
    _step_supports_amp_scaling = True
    _votes = False
    _rescales = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        rounding: str = "nearest",
        nonfinite: str = "propagate",
        independent_weight_decay: bool = False,
        cautious: bool | str = False,
        cautious_weight_decay: bool = False,
        fused_backward: bool = False,
        seed: int = 0,
    ) -> None:
        _ops.require_native()
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        self.seed = seed
        self._release = Release(self._step_one) if fused_backward else None
        self._places: dict[Tensor, tuple[int, int]] = {}  # group and index, fused_backward only
        self._found_inf: Tensor | None = None
        self._nonfinite: dict[torch.device, Tensor] = {}
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
            "rounding": rounding,
            "nonfinite": nonfinite,
            "independent_weight_decay": independent_weight_decay,
            "cautious": cautious,
            "cautious_weight_decay": cautious_weight_decay,
        }
        check_options(defaults)
        defaults.pop("reference_lr", None)  # each group's own
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        if self._release is not None:
            raise TypeError("Lion with fused_backward has hooks in its parameters, and no copies")
        ours = ("seed", "_nonfinite", "_release", "_found_inf", "_places")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in ours}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch.optim.Optimizer.add_param_group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            self._check_params(group, len(self.param_groups) - 1)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        if group["rounding"] == "stochastic":
            device = group["params"][0].device if group["params"] else None
            group.setdefault("step", torch.zeros((), dtype=torch.int64, device=device))
        if self._release is not None:
            number = len(self.param_groups) - 1
            self._places |= {p: (number, i) for i, p in enumerate(group["params"])}
            self._release.attach(group["params"])

    def accumulate(self) -> AbstractContextManager[None]:
        """With fused_backward: backward passes within it add up gradients, and step nothing."""
        return nullcontext() if self._release is None else self._release.accumulate()

    def _check_params(self, group: dict[str, Any], number: int) -> None:
        check_parameters(group, number)
        check_rescale(group, number, group["cautious"], self._rescales)
        if self._votes:
            check_plain(group, number, "DistributedLion votes on plain tensors")
        if any(p.is_cuda for p in group["params"]):
            kernels.require(vote=self._votes)

    def _check(self) -> None:
        """Raise before anything is written: options may have changed since construction."""
        for number, group in enumerate(self.param_groups):
            check_options(group)
            check_lr(group, number)
            check_rescale(group, number, group["cautious"], self._rescales)
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    check_gradient(group, number, i)

    def float32_parameter(self, p: Tensor) -> Tensor:
        """A parameter's value as float32, with what compensated rounding keeps beside it: a new
        tensor of the parameter's shape."""
        low, whole = self.state.get(p, {}).get("compensation"), local(p.detach()).float()
        if low is not None and low.dtype == torch.int16:
            whole = (whole.view(torch.int32) + local(low).int()).view(torch.float32)
        elif low is not None:
            whole = whole + local(low).float()
        return states.cut_as(p, whole)

    def nonfinite_count(self) -> int:
        """Elements skipped because c was not finite; waits for the device."""
        return sum(int(count.item()) for count in self._nonfinite.values())

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._nonfinite:
            states.check_not_capturing(device)
            self._nonfinite[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._nonfinite[device]

    def _batch(self, group: dict[str, Any], abstain: bool = False) -> Batch:
        """The group's tensors for the ops: those with a gradient, or, with ``abstain``, all that
        require one, with None for a missing gradient."""
        batch = Batch()
        batch.lows = [] if group["rounding"] == "compensated" else None
        dtype = momentum_dtype(group)
        batch.scales = [] if dtype == torch.int8 else None
        for param in group["params"]:
            if not (param.requires_grad if abstain else param.grad is not None):
                continue
            state = self.state[param]
            p, m = local(param), states.momentum(state, param, dtype)
            g = None if param.grad is None else states.local_like(param.grad, param)
            if batch.lows is not None:
                batch.lows.append(states.compensation(state, param))
            if batch.scales is not None:
                batch.scales.append(states.scales_of(state))
            if p.is_complex():
                p, m = torch.view_as_real(p), torch.view_as_real(m)
                g = None if g is None else torch.view_as_real(g.resolve_conj())
            if not states.is_dense(p):
                batch.stand_ins.append((p, torch.empty_like(p).copy_(p)))
                p = batch.stand_ins[-1][1]
            if g is not None and (g.stride() != p.stride() or g.is_neg()):
                g = torch.empty_like(p).copy_(g)
            batch.params.append(p)
            batch.grads.append(g)
            batch.exp_avgs.append(m)
        return batch

    # torch declares step as two overloads; one signature that serves both is no override to mypy.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # One op a group leaves nothing to compile; traced, every parameter would be a recompile.
    # torch.compiler.disable would import the compiler with this file.
    @torch._disable_dynamo
    def _update(self) -> None:
        self._check()
        if self._release is not None:
            if getattr(self, "found_inf", None) is not None:
                raise RuntimeError(
                    "fused_backward steps during backward, before a GradScaler has looked at the "
                    "gradients: use one or the other"
                )
            self._release.end_step()
        self._found_inf = self._agreed(getattr(self, "found_inf", None))
        for group in self.param_groups:
            self._step_group(group)
        self._after_step()

    def _agreed(self, found_inf: Tensor | None) -> Tensor | None:
        """Whether to skip this step: what GradScaler found in the gradients, on any rank."""
        return found_inf

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """grad_scale and found_inf as the ops take them, where GradScaler set them."""
        scale, found_inf = getattr(self, "grad_scale", None), self._found_inf
        return (
            None if scale is None else scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
        )

    def _after_step(self) -> None:
        """What a subclass does at the end of a step. It must not override step itself: torch wraps
        step once a class, and hooks would run once for each wrapped one."""

    @torch.no_grad()
    def _step_one(self, p: Tensor) -> None:
        """What fused_backward does with a parameter that has its gradient."""
        number, index = self._places[p]
        group = self.param_groups[number]
        check_options(group)
        check_lr(group, number)
        check_gradient(group, number, index)
        self._step_group({**group, "params": [p]})

    def _agreeing(
        self, group: dict[str, Any], batch: Batch, grad_scale: Tensor | None
    ) -> Tensor | None:
        """Of each tensor, the elements that a rescaled cautious update moves."""
        if group["cautious"] != "rescaled":
            return None
        device = batch.params[0].device
        counts = torch.zeros(len(batch.params), dtype=torch.int64, device=device)
        torch.ops.lion_kernels.count_agreeing(
            batch.grads, batch.exp_avgs, counts, group["betas"][0], group["maximize"],
            grad_scale, batch.scales,
        )  # fmt: skip
        return counts

    def _step_group(self, group: dict[str, Any]) -> None:
        batch = self._batch(group)
        if batch.params:
            device = batch.params[0].device
            grad_scale, found_inf = self._amp(device)
            torch.ops.lion_kernels.lion_step(
                batch.params,
                batch.grads,
                batch.exp_avgs,
                lr_tensor(group),
                *group["betas"],
                weight_decay(group),
                group["maximize"],
                self._counter(device) if group["nonfinite"] == "skip" else None,
                grad_scale,
                found_inf,
                group["rounding"],
                batch.lows,
                self.seed,
                group.get("step"),
                bool(group["cautious"]),
                group["cautious_weight_decay"],
                batch.scales,
                self._agreeing(group, batch, grad_scale),
            )
            batch.write_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of another Lion: lion-pytorch's, google's, timm's, optimi's
        and bitsandbytes', 8-bit too. Options that the state lacks keep their present values;
        momenta take this optimizer's momentum dtype and their parameters' memory layout."""
        present = [dict(group) for group in self.param_groups]
        loaded: dict[Tensor, dict[str, Tensor]] = {}

        def read(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = [interchange.translated(group) for group in state_dict["param_groups"]]
            ids = list(chain.from_iterable(g["params"] for g in groups))
            params = list(chain.from_iterable(g["params"] for g in self.param_groups))
            for i, (number, p) in enumerate(zip(ids, params, strict=False)):
                state = state_dict["state"].get(number, {})
                loaded[p] = interchange.saved_tensors(state, p, f"parameter {i}")
            for i, (group, before) in enumerate(zip(groups, present, strict=False)):
                # How a momentum is stored is this optimizer's own choice, not the saved one's.
                groups[i] = {**group, "momentum_dtype": before["momentum_dtype"]}
                check_options({**before, **groups[i]})
                cautious = group.get("cautious", before["cautious"])
                check_rescale(before, i, cautious, self._rescales)
            # torch would cast every state to its parameter's dtype.
            return {**state_dict, "state": {}, "param_groups": groups}

        def write(_: Optimizer) -> None:
            for group, before in zip(self.param_groups, present, strict=True):
                for key, value in before.items():
                    group.setdefault(key, value)
                check_options(group)
                for p in group["params"]:
                    saved = loaded.get(p, {})
                    if "exp_avg" in saved:
                        states.load_momentum(self.state[p], p, momentum_dtype(group), saved)
                    if "compensation" in saved and group["rounding"] == "compensated":
                        states.load_compensation(self.state[p], p, saved)
                if "step" in group and group["params"]:
                    group["step"] = group["step"].to(group["params"][0].device)

        # Behind the hooks that users registered to change the state, before those that look at it.
        handles = [
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(write, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def export_state_dict(self, library: str) -> dict[str, Any]:
        """The state as ``library`` loads it: "lion-pytorch", "google", "timm", "optimi",
        "bitsandbytes" or "bitsandbytes-8bit". Momenta are float32 copies, of every momentum dtype
        and memory format; options are those that the library has."""
        if library not in interchange.LIBRARIES:
            raise ValueError(
                f"library must be one of {', '.join(interchange.LIBRARIES)}, got {library!r}"
            )
        packed = self.state_dict()["param_groups"]
        exported: dict[str, Any] = {"state": {}, "param_groups": []}
        for group, ids in zip(self.param_groups, packed, strict=True):
            options = interchange.exported_group(library, group, weight_decay(group))
            exported["param_groups"].append({**options, "params": ids["params"]})
            steps = int(group.get("step", 1))
            for p, number in zip(group["params"], ids["params"], strict=True):
                if "exp_avg" in self.state.get(p, {}):
                    m = states.cut_as(p, states.float32_momentum(self.state[p]))
                    state = interchange.exported_state(library, m, p, steps)
                    exported["state"][number] = state
        return exported
