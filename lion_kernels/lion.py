"""Lion on one device: parameter groups, state and checks around one fused pass over memory.

Owns what both optimizers share: gradients brought into the parameters' memory layout, the step,
loading and saving. Imports no kernel; calls torch.ops.lion_kernels.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import native, release, states
from .alone import Alone
from .bucket import Bucket, Move, Plan
from .capture import check_not_capturing
from .checks import check_lr, check_members, check_rescale, label, require_kernels
from .options import (
    GROUP_OPTIONS,
    LION,
    SETTINGS,
    Settings,
    can_change_unseen,
    check_options,
    checked,
    settings_of,
)
from .scaling import Scaling, is_asked_by_a_scaler
from .shards import cut_as
from .states import interchange
from .states.loading import Loading

if TYPE_CHECKING:
    from .vote.election import Electorate

# Bits of stochastic rounding that differ from bucket to bucket of one step: the golden ratio's.
_BUCKET_SEED = 0x1E3779B97F4A7C15


class Lion(Optimizer):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675, Algorithm 2), one fused pass over memory.

    Equivalent PyTorch, in float32 arithmetic whatever the storage types::

        c = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)   # one rounding to p's dtype
        m = beta2 * m + (1 - beta2) * g                  # state key "exp_avg"

    sign(0) is 0; sign(NaN) is NaN, so that a NaN shows in the parameter as in torch.optim.

    Every update has the size of lr: in bfloat16, rounding to nearest loses it in weights above
    about 256 lr, and loses decays below 2**-9 a step. ``rounding`` repairs both.

    Works with torch.amp.GradScaler, which hands it grad_scale and found_inf: the step reads scaled
    gradients and leaves them unscaled, as torch's fused optimizers do; one that found an infinity
    changes nothing. On CUDA devices a step waits for nothing; with static gradients and a tensor lr
    on the device it can be captured into a CUDA graph, after one step outside.

    What is kept follows a parameter to another device or dtype, at the next step. A parameter
    without a gradient is asked nothing: frozen ones may be of any dtype, layout, device and class.

    Args:
        params: parameters, (name, parameter) pairs or group dicts; those with gradients float32,
            bfloat16, float16 or complex64, or float64 and complex128 (in float64 arithmetic and
            plain PyTorch), any shape and strides without overlaps; one device a group, a CPU or
            CUDA. DTensors, as fully_shard makes them, step their local shards, and their states are
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
        fused_backward: step parameters from hooks, as soon as backward has 25 MB of gradients, and
            free those: their peak falls from the whole model to a bucket. step() then ends the
            step. Accumulating gradients needs ``accumulate()``; ``close()``, the end of the
            optimizer, or another one on the same parameters ends the hooks. A GradScaler, DDP and
            FSDP1 are refused; clipping by global norm finds no gradients to clip, which nothing
            here can see.
        seed: of stochastic rounding.

    Raises:
        ValueError: an option out of range, at construction, in a new group, in a loaded state or
            in a step; a gradient or a state that does not fit its parameter; a parameter with a
            gradient and an unsupported dtype, layout or device. It names the parameter, and nothing
            was written, in any group.
        RuntimeError: a sparse gradient; the compiled library is missing; CUDA parameters without
            triton; fused_backward where gradients are not final.
    """

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
        self._construct(
            LION, params, Alone(), lr=lr, betas=betas, weight_decay=weight_decay,
            maximize=maximize, momentum_dtype=momentum_dtype, rounding=rounding,
            nonfinite=nonfinite, independent_weight_decay=independent_weight_decay,
            cautious=cautious, cautious_weight_decay=cautious_weight_decay,
            fused_backward=fused_backward, seed=seed,
        )  # fmt: skip

    def _construct(
        self, kind: str, params: ParamsT, mover: "Alone | Electorate", **given: Any
    ) -> None:
        """An optimizer with the options of ``kind`` (options.py), whose buckets ``mover`` moves."""
        native.require()
        options = checked(kind, given)
        self._kind, self._mover = kind, mover
        self.seed: int = options["seed"]
        self._release = release.Release(self) if options.get("fused_backward") else None
        self._places: dict[Tensor, tuple[int, int]] = {}  # group and index, fused_backward only
        # Of each group: what was read and asked, and still holds.
        self._settings: dict[int, tuple[list[Any], Settings]] = {}
        self._plans: dict[int, Plan] = {}
        self._known_states: list[Any] = []
        self._nonfinite: dict[torch.device, Tensor] = {}
        of_groups = GROUP_OPTIONS[kind].items()
        defaults = {name: options.get(name, option.default) for name, option in of_groups}
        check_options(defaults, kind)
        defaults.pop("reference_lr", None)  # each group's own
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks: whether unscaling and skipping are left to step()."""
        return is_asked_by_a_scaler()

    def __getstate__(self) -> dict[str, Any]:
        if self._release is not None:
            raise TypeError("Lion with fused_backward has hooks in its parameters, and no copies")
        ours = ("seed", "_kind", "_mover", "_nonfinite", "_release", "_places")
        kept = {key: getattr(self, key) for key in ours}
        asked: dict[str, Any] = {"_settings": {}, "_plans": {}, "_known_states": []}
        return {**super().__getstate__(), **kept, **asked}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch.optim.Optimizer.add_param_group."""
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group, params = self.param_groups[-1], self.param_groups[-1]["params"]
            check_options(group, self._kind)
            check_rescale(group, before, group["cautious"])
            require_kernels(group, vote=self._mover.votes)
            if group["rounding"] == "stochastic":
                states.step_counter(group, torch.device("cpu"))
            if self._release is not None:
                release.check_final(params)
            release.take_over(params)
            if self._release is not None:
                self._release.attach(params)
        except BaseException:
            del self.param_groups[before:]
            raise

    def accumulate(self) -> AbstractContextManager[None]:
        """With fused_backward: backward passes within it add up gradients, and step nothing."""
        return nullcontext() if self._release is None else self._release.accumulate()

    def close(self) -> None:
        """With fused_backward: remove the hooks; from now on step() moves parameters, as without.
        Also what happens when the optimizer is collected, or another is built on its parameters."""
        if self._release is not None:
            self._release.flush()
            self._release.close()
            self._release = None

    def float32_parameter(self, p: Tensor) -> Tensor:
        """A parameter's value as float32, with what compensated rounding keeps beside it: a new
        tensor of the parameter's shape."""
        return cut_as(p, states.whole_parameter(self.state.get(p, {}), p))

    def nonfinite_count(self) -> int:
        """Elements skipped because c was not finite; waits for the device."""
        return sum(int(count.item()) for count in self._nonfinite.values())

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._nonfinite:
            check_not_capturing(device)
            self._nonfinite[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._nonfinite[device]

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
        if self._release is not None:
            if getattr(self, "found_inf", None) is not None:
                raise RuntimeError(
                    "fused_backward steps during backward, before a GradScaler has looked at the "
                    "gradients: use one or the other"
                )
            self._release.end_step()
        self._mover.drive(self._work())

    def _work(self) -> Iterator[Any]:
        """A step, which stops where its mover waits for something."""
        self._forget_changed_states()
        # A group that is the only one is asked by the op alone: no other is written before it.
        is_asked = len(self.param_groups) > 1 or self._mover.votes
        only, scaling = None if is_asked else self._plans.get(0), Scaling.of(self)
        try:
            scaling = yield from self._step_groups(scaling, only is not None and only.may_presume)
        except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
            if only is None or not only.may_presume:
                raise
            only.may_presume = False
            scaling = yield from self._step_groups(scaling, presume=False)
        if scaling.grad_scale is not None:
            scaling.unscale([p for group in self.param_groups for p in group["params"]])
        for group in self.param_groups if self._release is not None else ():
            if "step" in group:
                group["step"] += 1

    def _step_groups(self, scaling: Scaling, presume: bool) -> Generator[Any, None, Scaling]:
        """All checks of all groups, then all states, then the first write; returns what GradScaler
        found, on any rank. ``presume``: that the plans still hold. What is wrong here is told to
        every rank, which all raise it."""
        mover, groups = self._mover, self.param_groups
        plans: list[tuple[Settings, list[Bucket]]] = []
        refusal = None
        try:
            # Before anything is waited for: users change options when they call the next rank.
            try:
                read = [self._settings_of(number) for number in range(len(groups))]
                asked = [self._ask(number, read[number], presume) for number in range(len(groups))]
            except Exception as error:
                refusal = error
            yield from mover.open()
            if scaling.found_inf is not None:
                scaling = yield from mover.agreed(scaling)
            if refusal is None:
                indices = yield from mover.members(
                    [group["params"] for group in groups],
                    mine=[indices for indices, _ in asked],
                    asked=[is_asked for _, is_asked in asked],
                )
                try:
                    for number, settings in enumerate(read):
                        plans.append((settings, self._buckets(number, settings, indices[number])))
                except Exception as error:
                    refusal = error
            if refusal is not None:
                yield from mover.refuse(refusal)
                raise refusal
        except BaseException:
            refusal = None  # which holds this frame
            self._plans.clear()  # which hold gradients from here to the end of the step
            raise
        if not presume:  # else there are no others
            self._known_states = list(self.state.values())
        moves = [
            move
            for number, (settings, buckets) in enumerate(plans)
            for move in self._moves(number, buckets, settings)
        ]
        yield from self._walk(moves, scaling, self.seed)
        return scaling

    def _walk(self, moves: list[Move], scaling: Scaling, seed: int) -> Iterator[Any]:
        """Move buckets, and let their gradients go."""
        try:
            yield from self._mover.move(moves, scaling, seed)
            for move in moves:
                move.bucket.write_back()
        finally:
            for move in moves:
                move.bucket.let_go()

    def _moves(self, number: int, buckets: list[Bucket], settings: Settings) -> list[Move]:
        """What becomes of buckets of a group."""
        group, moves = self.param_groups[number], []
        for bucket in buckets:
            is_counted = "step" in group or self._mover.votes
            step = states.step_counter(group, bucket.device) if is_counted else None
            # It advances once a step, which a bucket that is released does not end.
            if step is not None and (self._release is not None or bucket is not buckets[-1]):
                step = step.clone()
            nonfinite = self._counter(bucket.device) if settings.skips else None
            moves.append(Move(number, bucket, settings, step, nonfinite))
        return moves

    def _forget_changed_states(self) -> None:
        """Plans hold while every parameter's state is the one that they were made with."""
        now = self.state.values()
        if len(now) != len(self._known_states) or not all(map(is_, now, self._known_states)):
            self._plans.clear()

    def _settings_of(self, number: int) -> Settings:
        """The group's options, read again where one is another object than at the last step."""
        group = self.param_groups[number]
        now = list(map(group.get, SETTINGS))
        before, settings = self._settings.get(number, (None, None))
        if settings is None or before is None or not all(map(is_, now, before)):
            settings = settings_of(group, self._kind)
            check_rescale(group, number, group["cautious"])
            self._settings.pop(number, None)
            if not can_change_unseen(group):
                self._settings[number] = (list(map(group.get, SETTINGS)), settings)
        return settings

    def _ask(self, number: int, settings: Settings, presume: bool) -> tuple[list[int], bool]:
        """The indices of the parameters of a group that a step has to do with, as far as this rank
        knows, and whether they may be others than before. Who was asked and lacks a gradient
        stays."""
        group, is_member = self.param_groups[number], self._mover.is_member
        params, plan = group["params"], self._plans.get(number)
        if plan is not None and plan.serves(group, settings, presume):
            joining = [i for i in plan.others if is_member(params[i])]
            if not joining:
                return plan.indices, False
            if not presume or plan.serves(group, settings, False):
                return sorted({*plan.indices, *joining}), True
        self._plans.pop(number, None)
        return [i for i, p in enumerate(params) if is_member(p)], True

    def _buckets(self, number: int, settings: Settings, indices: list[int]) -> list[Bucket]:
        """The group's buckets; raises where a parameter, a gradient or a state is not as it must
        be."""
        group, plan = self.param_groups[number], self._plans.get(number)
        if plan is None or plan.indices != indices:
            known = [] if plan is None else plan.indices
            self._check(number, sorted(set(indices).difference(known)), [*known, *indices])
            plan = self._plans[number] = Plan(group, indices, self.state, settings)
        if indices and isinstance(group["lr"], Tensor):
            check_lr(group, number, group["params"][indices[0]].device)
        return plan.buckets(may_abstain=self._mover.votes)

    def _check(self, number: int, indices: list[int], beside: list[int]) -> None:
        """Check parameters of a group, which are on the device of those ``beside`` them."""
        if indices:
            group = self.param_groups[number]
            device = group["params"][beside[0]].device
            check_lr(group, number, device)
            check_members(
                group, number, indices, state=self.state, device=device, who=self._kind,
                is_whole=self._mover.is_whole,
            )  # fmt: skip

    def _place(self, p: Tensor) -> tuple[int, int] | None:
        """The group and the index of a parameter; None where it was taken out."""
        groups = self.param_groups
        number, i = self._places.get(p, (len(groups), 0))
        members = groups[number]["params"] if number < len(groups) else []
        if i < len(members) and members[i] is p:
            return number, i
        self._places = {
            q: (number, i) for number, g in enumerate(groups) for i, q in enumerate(g["params"])
        }
        return self._places.get(p)

    @torch.no_grad()
    def _make_states(self) -> None:
        for number, group in enumerate(self.param_groups):
            trained = [i for i, p in enumerate(group["params"]) if p.requires_grad]
            for i in trained:
                p = group["params"][i]
                states.check_fits(self.state.get(p, {}), p, label(group, number, i))
            Plan(group, trained, self.state, self._settings_of(number))

    @torch.no_grad()
    def _step_released(self, number: int, indices: list[int]) -> None:
        """What fused_backward does with parameters of a group that have their gradients. Each
        bucket rounds with bits of its own; the counter is the step's."""
        group, settings = self.param_groups[number], self._settings_of(number)
        self._check(number, indices, indices)
        seed = (self.seed + _BUCKET_SEED * (1 + indices[0])) % 2**63
        buckets = Plan(group, indices, self.state, settings).buckets(may_abstain=False)
        moves = self._moves(number, buckets, settings)
        self._mover.drive(self._walk(moves, Scaling(), seed))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of another Lion: lion-pytorch's, google's, timm's, optimi's
        and bitsandbytes', 8-bit too. Options that the state lacks keep their present values;
        momenta take this optimizer's momentum dtype and their parameters' memory layout."""
        loading = Loading(self, self._kind)
        # Behind the hooks that users registered to change the state, before those that look at it.
        handles = [
            self.register_load_state_dict_pre_hook(loading.read),
            self.register_load_state_dict_post_hook(loading.write, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
            self._plans.clear()  # they hold what the load replaced
            self._known_states = []

    def export_state_dict(self, library: str) -> dict[str, Any]:
        """The state as ``library`` loads it: "lion-pytorch", "google", "timm", "optimi",
        "bitsandbytes" or "bitsandbytes-8bit". Momenta are float32 copies, of every momentum dtype
        and memory format; options are those that the library has."""
        return interchange.exported(self, library, self._kind)
