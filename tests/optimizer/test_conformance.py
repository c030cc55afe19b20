"""The conformance suite: this Lion passes, and every check notices the fault that it is for."""

import gc
import weakref

import pytest
import torch

from lion_kernels import Lion, conformance
from lion_kernels.int8 import dequantize, quantize

pytestmark = pytest.mark.slow


def failed(make):
    return {name for name, (ok, _) in conformance.judge(make, "cpu").items() if ok is False}


def make_of(cls, **kwargs):
    return lambda params, **options: cls(params, **options, **kwargs)


def outcome(check, make):
    return conformance.judge(make, "cpu", {check: conformance.CHECKS[check]})[check]


SMALL = {"bfloat16: small decay acts", "bfloat16: small updates act"}


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_this_lion_passes(rounding, nonfinite):
    assert failed(make_of(Lion, rounding=rounding, nonfinite=nonfinite)) == set()


def test_to_nearest_small_steps_are_lost():
    assert failed(make_of(Lion)) == SMALL


def local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def real(t):
    return torch.view_as_real(t) if t.is_complex() else t


def overlaps(t):
    places = torch.arange(t.untyped_storage().nbytes() // t.element_size())
    places = places.as_strided(t.shape, t.stride(), t.storage_offset())
    return places.unique().numel() < t.numel()


class Eager(torch.optim.Optimizer):
    """Lion in PyTorch, with one fault."""

    _step_supports_amp_scaling = True

    def __init__(
        self, params, lr, betas, weight_decay, *, maximize=False, rounding="nearest",
        momentum_dtype=None, cautious=False, cautious_weight_decay=False, fault="",
    ):  # fmt: skip
        if fault != "arguments" and not (
            lr >= 0 and weight_decay >= 0 and len(betas) == 2 and all(0 <= b < 1 for b in betas)
        ):
            raise ValueError("an argument is out of range")
        if cautious not in (False, True, "rescaled"):
            raise ValueError("cautious must be False, True or rescaled")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, {**defaults, "momentum_dtype": momentum_dtype, "rounding": rounding}
        )
        self.fault, self.first_lr, self.n_steps = fault, float(lr), 0
        self.rounding, self.momentum_dtype = rounding, momentum_dtype
        self.cautious, self.cautious_weight_decay = cautious, cautious_weight_decay
        self.generator, self.kept = torch.Generator().manual_seed(0), {}
        trained = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        if fault != "windows" and any(overlaps(local(p)) for p in trained):
            raise ValueError("a parameter overlaps itself")
        if fault == "foreign" and not all(
            p.is_floating_point() for group in self.param_groups for p in group["params"]
        ):
            raise ValueError("parameters must be floats")

    def __getstate__(self):
        mine = {k: v for k, v in self.__dict__.items() if k != "generator"}
        return super().__getstate__() if self.fault == "copies" else mine

    def load_state_dict(self, state_dict):
        for number, state in state_dict["state"].items():
            if isinstance(number, str) or self.fault == "format":
                continue
            if "strides" in state and state["exp_avg"].stride() != state["strides"]:
                raise ValueError("the scales are of another memory format")
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if self.fault == "unknown" and isinstance(p, torch.Tensor):
                self.state[p] = {"exp_avg": state["exp_avg"]}
            if self.fault == "storage order" and isinstance(p, torch.Tensor):
                state["exp_avg"] = state["exp_avg"].as_strided(p.shape, p.stride())

    def momentum(self, state, p, group):
        """The momentum as floats."""
        dtype = group["momentum_dtype"] if self.fault == "loaded dtype" else self.momentum_dtype
        if self.fault == "half":
            dtype = "bfloat16"
        state.setdefault("exp_avg", torch.zeros_like(p))
        if self.fault == "cached":
            state["exp_avg"] = self.kept.setdefault(p.data_ptr(), state["exp_avg"])
        if dtype == "int8":
            if "scales" not in state:
                state["exp_avg"], state["scales"] = quantize(state["exp_avg"].float())
            state["exp_avg"] = state["exp_avg"].to(torch.int8)
            return dequantize(state["exp_avg"], state["scales"])
        if dtype is not None:
            state["exp_avg"] = state["exp_avg"].to(getattr(torch, dtype))
        return state["exp_avg"]

    def keep_momentum(self, state, m):
        if "scales" not in state:
            return (state["exp_avg"].data if self.fault == "version" else state["exp_avg"]).copy_(m)
        if self.fault == "block of a NaN" and m.isnan().any():
            m = torch.full_like(m, torch.nan)
        q, scales = quantize(m)
        if self.fault == "one scale":
            scales = scales[:1].expand_as(scales).clone()
        if self.fault == "threads, int8" and torch.get_num_threads() > 1:
            q, scales = quantize(m / 3)
        state["exp_avg"], state["strides"] = q, q.stride()
        if self.fault != "scales not kept":
            state["scales"] = scales

    def store(self, p, low, new, number, group):
        """Round and store what a 16-bit parameter becomes."""
        rounding = group["rounding"] if self.fault == "loaded rounding" else self.rounding
        if self.fault == "truncate" and p.dtype != torch.float32:
            new = (new.view(torch.int32) & -65536).view(torch.float32)
        is_half = p.dtype == torch.bfloat16
        if rounding == "stochastic" and is_half:
            generator = self.generator if self.fault == "generator" else None
            if self.fault == "noise of one step":
                generator = torch.Generator().manual_seed(number)
            if self.fault == "noise of one tensor":
                generator = torch.Generator().manual_seed(self.n_steps)
            noise = torch.randint(0, 65536, p.shape, dtype=torch.int32, generator=generator)
            noise = 0x8000 if self.fault == "no noise" else noise
            new = ((new.view(torch.int32) + noise) & -65536).view(torch.float32)
        if self.fault == "double":
            new = new.float()
        (p.data if self.fault == "version" else p).copy_(new)
        if low is not None and self.fault != "dropped":
            low.copy_(new - p.to(new.dtype))

    def low_of(self, state, p):
        if self.rounding != "compensated" or p.dtype != torch.bfloat16:
            return None
        place = self.kept if self.fault == "low not saved" else state
        return place.setdefault("low", torch.zeros_like(p))

    def step_one(self, p, g, state, group, number):
        p, g = real(local(p)), real(local(g))
        if self.fault == "layout" and p.stride() != g.stride() and g.is_contiguous():
            g = g.as_strided(p.shape, p.stride())
        wide = torch.promote_types(p.dtype, torch.float32)
        wide = torch.float32 if self.fault == "float" else wide
        betas = self.param_groups[0]["betas"] if self.fault == "groups" else group["betas"]
        if self.fault == "in place":
            first = (float(group["lr"]), float(group["weight_decay"]), *map(float, betas))
            lr, decay, *betas = self.kept.setdefault("options", first)
            group = {**group, "lr": lr, "weight_decay": decay}
        lr = self.first_lr if self.fault == "lr" else group["lr"]
        decay, (beta1, beta2) = group["weight_decay"], betas
        up = -1 if group["maximize"] and self.fault != "maximize" else 1
        g = g.to(wide) * up
        if self.fault == "threads" and torch.get_num_threads() > 1:
            g = g + 1e-3
        m = self.momentum(state, p, group).to(wide)
        c = m * beta1 + g * (1 - beta1)
        if self.fault == "sign":
            c = torch.where(c == 0, 1.0, c)
        # torch.sign(NaN) is 0: the weight of a NaN momentum stands still, unseen.
        sign = c.sign() if self.fault == "nan" else torch.where(c.isnan(), c, c.sign())
        if self.cautious:
            agrees = (c < 0) | (g > 0) if self.fault == "half cautious" else c * g > 0
            sign = sign * agrees
        rate = lr
        if self.cautious == "rescaled" and self.fault != "unscaled":
            rate = lr * sign.numel() / (1 + int(sign.abs().sum()))
        low = self.low_of(state, p)
        whole = p.to(wide) if low is None else p.to(wide) + low.to(wide)
        kept = torch.full_like(whole, 1 - (1 if self.fault == "decay" else lr) * decay)
        if self.cautious_weight_decay and self.fault != "incautious":
            kept = torch.where(sign * whole < 0, 1.0, kept)
        if self.fault == "double":  # a fused multiply-add that rounds twice
            whole = whole.double()
            rate = torch.tensor(rate, dtype=torch.float32).double()
        self.store(p, low, whole * kept - rate * sign, number, group)
        self.keep_momentum(state, m * beta2 + g * (1 - (beta1 if self.fault == "beta" else beta2)))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if found_inf and self.fault != "overflow":
            return loss
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        if self.fault != "sparse" and any(
            p.grad is not None and p.grad.layout != torch.strided for _, p in pairs
        ):
            raise RuntimeError("no sparse gradients")
        self.n_steps += 1
        for number, (group, p) in enumerate(pairs):
            if p.grad is None and self.fault == "none":
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if p.grad is None or (self.fault == "shards" and hasattr(p, "to_local")):
                continue
            g = p.grad
            if g.layout != torch.strided:
                raise RuntimeError("no sparse gradients")
            if scale is not None:
                g = g / scale
            if scale is not None and self.fault != "scaled":
                p.grad = g
            if self.fault == "complex" and p.is_complex():
                p.add_(g.sgn(), alpha=-group["lr"])
                continue
            self.step_one(p, g, self.state[p], group, number)
            if self.fault == "gradient":
                p.grad.zero_()
            if self.fault == "storage":
                torch.empty(0).set_(p.untyped_storage())[:1] = 0.0
        return None if self.fault == "loss" else loss


def test_plain_pytorch_passes():
    assert failed(make_of(Eager)) == SMALL


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("beta", "the formula, float32"),
        ("sign", "sign(0) is 0"),
        ("decay", "weight decay, float32"),
        ("decay", "weight decay, bfloat16"),
        ("decay", "weight decay, float16"),
        ("truncate", "16 bits: no bias"),
        ("float", "float64"),
        ("complex", "complex64, complex128"),
        ("half", "momentum as exact as float32"),
        ("maximize", "maximize"),
        ("lr", "lr read in every step"),
        ("lr", "lr as a tensor"),
        ("in place", "options written in place"),
        ("groups", "groups, one added later"),
        ("threads", "threads"),
        ("double", "rounded once, everywhere"),
        ("layout", "memory layouts"),
        ("gradient", "gradient and storage untouched"),
        ("storage", "gradient and storage untouched"),
        ("none", "None, empty, 0-d, odd sizes"),
        ("foreign", "frozen foreign parameters"),
        ("windows", "overlapping parameters"),
        ("nan", "one NaN gradient"),
        ("sparse", "a sparse gradient"),
        ("version", "version counters"),
        ("loss", "closure"),
        ("none", "hooks of a step"),
        ("arguments", "wrong arguments"),
        ("overflow", "GradScaler: the path"),
        ("scaled", "GradScaler: gradient unscaled"),
        ("unknown", "resume with unknown keys"),
        ("storage order", "resume in another memory format"),
        ("cached", "an earlier state"),
        ("cached", "a state changed by hand"),
        ("loaded rounding", "own rounding after a load"),
        ("loaded dtype", "own momentum_dtype after a load"),
        ("copies", "deep copies"),
        ("shards", "DTensor shards"),
        ("no noise", "stochastic rounding"),
        ("noise of one step", "stochastic rounding"),
        ("noise of one tensor", "stochastic rounding"),
        ("generator", "stochastic rounding: resume"),
        ("dropped", "compensated rounding"),
        ("low not saved", "compensated rounding: resume"),
        ("one scale", "8-bit momentum: close"),
        ("block of a NaN", "8-bit momentum: one NaN"),
        ("threads, int8", "8-bit momentum: threads"),
        ("unknown", "8-bit momentum: resume"),
        ("format", "8-bit momentum: memory format"),
        ("scales not kept", "8-bit momentum: DTensor shards"),
        ("half cautious", "cautious"),
        ("unscaled", "cautious, rescaled"),
        ("incautious", "cautious weight decay"),
    ],
)
def test_each_check_notices_its_fault(fault, check):
    assert outcome(check, make_of(Eager))[0] is not False
    assert outcome(check, make_of(Eager, fault=fault))[0] is False


class Forgetful(Eager):
    """Saves no momentum."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class Nested(Eager):
    """Overrides step, which torch wraps once a class: hooks run twice."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(("cls", "check"), [(Forgetful, "resume"), (Nested, "hooks of a step")])
def test_the_fault_of_a_subclass_is_noticed(cls, check):
    assert outcome(check, make_of(cls))[0] is False


class Released(Eager):
    """Steps during backward, with one fault."""

    owners: dict = {}  # noqa: RUF012

    def __init__(self, params, *, fused_backward=False, fault="", **options):
        super().__init__(params, **options)
        self.released, this = fault, weakref.ref(self)

        def hook(p):
            if (optimizer := this()) is not None:
                optimizer.on_gradient(p)

        for p in self.param_groups[0]["params"] if fused_backward else []:
            if p in self.owners and fault != "never leaves":
                self.owners[p].remove()
            self.owners[p] = handle = p.register_post_accumulate_grad_hook(hook)
            if fault in ("keeps itself", "never leaves"):
                p.optimizers = [*getattr(p, "optimizers", []), self]
            elif fault != "leaves its hooks":
                weakref.finalize(self, handle.remove)

    @torch.no_grad()
    def on_gradient(self, p):
        scalers = [s for s in gc.get_objects() if type(s) is torch.amp.GradScaler]
        if self.released != "scaled" and any(s._scale is not None for s in scalers):
            raise RuntimeError("fused_backward takes no GradScaler")
        self.step_one(p, p.grad, self.state[p], self.param_groups[0], 0)
        if self.released != "keeps gradients":
            p.grad = None


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("never leaves", "fused backward: the path"),
        ("keeps gradients", "fused backward: the path"),
        ("leaves its hooks", "fused backward: ends"),
        ("keeps itself", "fused backward: ends"),
        ("scaled", "fused backward: GradScaler"),
    ],
)
def test_the_fault_of_a_gradient_release_is_noticed(fault, check):
    assert outcome(check, make_of(Released))[0]
    assert outcome(check, make_of(Released, fault=fault))[0] is False
    Released.owners.clear()


class Exporting(Lion):
    """Leaves out what optimi needs, and rounds bitsandbytes' codes to the next one."""

    def export_state_dict(self, library):
        exported = super().export_state_dict(library)
        for state in exported["state"].values():
            state.pop("kahan_comp", None)
            if "qmap1" in state:
                state["state1"] = (state["state1"].int() + 1).clamp(max=255).to(torch.uint8)
        return exported


@pytest.mark.parametrize(
    ("module", "library"), [("optimi", "optimi"), ("bitsandbytes", "bitsandbytes-8bit")]
)
def test_a_state_that_another_library_reads_wrongly_is_noticed(module, library):
    pytest.importorskip(module)
    ok, figure = outcome("states for other libraries", make_of(Exporting))
    assert ok is False and library in figure
    assert outcome("states for other libraries", make_of(Lion))[0]


def test_an_option_that_a_class_does_not_have_is_not_asked():
    def plain(params, lr, betas, weight_decay):
        return Eager(params, lr, betas, weight_decay)

    found = conformance.judge(plain, "cpu")
    options = ("maximize", "own", "fused", "stochastic", "compensated", "8-bit", "cautious")
    assert {name for name, (_, figure) in found.items() if figure == "no such option"} == {
        name for name in conformance.CHECKS if name.startswith(options)
    }


def test_command_line(capsys):
    names = ["lion_kernels:Lion", "test_conformance:Eager"]
    assert conformance.main([*names, "--kwargs", "fault="]) == 1  # unknown to Lion: fails there
    out = capsys.readouterr().out
    n_asked = sum(ok is not None for ok, _ in conformance.judge(make_of(Eager), "cpu").values())
    assert "TypeError" in out and f"{n_asked - 2} of {n_asked}" in out
    assert conformance.main(["lion_kernels:Lion", "--kwargs", "rounding=stochastic"]) == 0
    for arguments, message in (
        (["lion_kernels"], "named as module:Class, got 'lion_kernels'"),
        (["lion_kernels:Tiger"], "cannot be imported"),
        (["lion_kernels:Lion", "--kwargs", "rounding"], "KEY=VALUE, got 'rounding'"),
    ):
        with pytest.raises(SystemExit, match=message):
            conformance.main(arguments)
