"""What the checks share: Lion's formula in float64, tensors with a seed, and the words by which
different classes know one option. Nothing here is of lion_kernels, which it judges too.
"""

import inspect
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Builds the optimizer of parameters; options are lr, betas and weight_decay.
Make = Callable[..., torch.optim.Optimizer]
# Whether it passed (None: not asked of this class or on this device), and a figure.
Outcome = tuple[bool | None, str]
Check = Callable[[Make, str], Outcome]

LR, BETAS, WD = 1e-2, (0.9, 0.99), 0.3
OPTIONS: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WD}

# How classes spell an option; the first that a class takes is used.
SPELLINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "stochastic": (
        {"rounding": "stochastic"},
        {"stochastic_rounding": True},
        {"use_stochastic_rounding": True},
    ),
    "compensated": ({"rounding": "compensated"}, {"kahan_sum": True}, {"use_kahan": True}),
    "8-bit": ({"momentum_dtype": "int8"}, {"optim_bits": 8, "min_8bit_size": 1}),
    "cautious": ({"cautious": True}, {"caution": True}, {"use_cautious": True}),
    "cautious decay": ({"cautious_weight_decay": True}, {"cautious_wd": True}),
}


def randn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.promote_types(dtype, torch.float32)).to(
        device, dtype
    )


def _builds(make: Make, **options: Any) -> bool:
    try:
        make([torch.nn.Parameter(torch.zeros(2))], **{**OPTIONS, **options})
    except Exception:  # whatever a class says no with
        return False
    return True


def takes(make: Make, **options: Any) -> bool:
    """Whether the constructor accepts these options, and not because it swallows any keyword."""
    named = inspect.signature(make).parameters
    if not all(name in named for name in options) and _builds(make, no_class_has_this_option=1):
        return False
    return _builds(make, **options)


def spelled(make: Make, option: str) -> Make | None:
    """``make`` with the option on; None where the class has no such option."""
    for words in SPELLINGS[option]:
        if takes(make, **words):
            return partial(make, **words)
    return None


def with_option(option: str, check: Check) -> Check:
    """A check that is asked of classes with an option, of their optimizers that use it."""

    def checked(make: Make, device: str) -> Outcome:
        with_it = spelled(make, option)
        return (None, "no such option") if with_it is None else check(with_it, device)

    return checked


class Twin:
    """Lion in float64, on flat copies."""

    def __init__(
        self,
        p: Tensor,
        lr: float = LR,
        wd: float = WD,
        betas: tuple[float, float] = BETAS,
    ) -> None:
        self.p, self.lr, self.wd, self.betas = _wide(p), lr, wd, betas
        self.m = torch.zeros_like(self.p)

    def step(self, g: Tensor) -> None:
        g, (beta1, beta2) = _wide(g), self.betas
        c = beta1 * self.m + (1 - beta1) * g
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * c.sign()
        self.m = beta2 * self.m + (1 - beta2) * g

    def error(self, p: Tensor) -> float:
        """The largest difference; infinite where one is not a number."""
        return (_wide(p) - self.p).abs().nan_to_num(nan=torch.inf).max().item()

    def signs_wrong(self, p: Tensor) -> float:
        """The share of elements that are off by more than half an update, or no numbers."""
        return (~((_wide(p) - self.p).abs() <= self.lr / 2)).double().mean().item()


def _wide(t: Tensor) -> Tensor:
    """A copy in float64 on the CPU; complex numbers as pairs."""
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).to("cpu", torch.float64, copy=True)


# Momenta in 8 bits turn 0.1 to 2 % of signs in the checks here; with a block's scale lost, over 10.
EIGHT_BIT_SLACK = 0.05


def slack(opt: torch.optim.Optimizer) -> float:
    """The share of signs that the optimizer's storage of momenta may turn."""
    states = [state for state in opt.state.values() if isinstance(state, dict)]
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    is_coarse = any(t.dtype in (torch.int8, torch.uint8) for t in tensors)
    return EIGHT_BIT_SLACK if is_coarse else 0.0


def walk(
    opt: torch.optim.Optimizer,
    params: Sequence[Tensor],
    twins: Sequence[Twin],
    gradient: Callable[[int, Tensor], Tensor],
    steps: range,
) -> float:
    """Step the optimizer and the twins with ``gradient(number, parameter)``; the largest share of
    wrong elements of a parameter at the end, 0 within the slack."""
    for i in steps:
        for k, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = gradient(100 * i + k, p)
            twin.step(p.grad)
        opt.step()
    wrong = max(twin.signs_wrong(p) for twin, p in zip(twins, params, strict=True))
    return wrong if wrong > slack(opt) else 0.0


def random_gradient(device: str) -> Callable[[int, Tensor], Tensor]:
    return lambda number, p: randn(*p.shape, seed=1 + number, device=device, dtype=p.dtype)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def percent(share: float) -> str:
    return f"{100 * share:.2g} % wrong"
