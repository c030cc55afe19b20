"""What the optimizers' param groups mean: the rule of every option, however it is given, what of
the options the ops take, and who decides when a state is loaded. Knows no state and no steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops

CHOICES: dict[str, tuple[Any, ...]] = {
    "rounding": _ops.ROUNDINGS,
    "nonfinite": ("propagate", "skip"),
    "cautious": (False, True, "rescaled"),
}
FLAGS = ("maximize", "independent_weight_decay", "cautious_weight_decay")
MOMENTUM_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _ops.MOMENTUM_DTYPES}
# How this optimizer stores and repairs, which is its constructor's to say. Every other option of a
# loaded state replaces the constructor's, as in torch.optim.
KEPT_AT_LOAD = ("momentum_dtype", "rounding", "nonfinite")


def plain(value: Any) -> Any:
    """A NumPy scalar, or a tensor of one element that lies on the CPU, as a Python number;
    anything else itself."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and value.device.type == "cpu" else value
    is_scalar = hasattr(value, "item") and getattr(value, "size", 1) == 1
    return value.item() if is_scalar else value


def check_number(name: str, value: Any, low: float = 0.0, below: float = math.inf) -> float:
    """``value`` as a float of [low, below); raises ValueError."""
    number = plain(value)
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    if not (is_number and low <= number < below):
        rule = f"at least {low:g} and finite" if below == math.inf else f"in [{low:g}, {below:g})"
        kind = "" if is_number else "a number, "
        raise ValueError(f"{name} must be {kind}{rule}, got {value!r}")
    return float(number)


def check_integer(name: str, value: Any, rule: str, below: int | None = None) -> int:
    """``value`` as an int that is at least 0, and below ``below``; raises ValueError."""
    number = plain(value)
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    if not is_integer or number < 0 or (below is not None and number >= below):
        raise ValueError(f"{name} must be an integer {rule}, got {value!r}")
    return int(number)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    given = plain(value)
    if not (isinstance(given, int | str) and given in choices):
        words = [repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


def _momentum_name(value: Any) -> str | None:
    """The name of a momentum dtype, which every kind of checkpoint can hold."""
    name = value if isinstance(value, str) else str(value).removeprefix("torch.")
    if value is not None and name not in MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype must be None or one of {', '.join(MOMENTUM_DTYPES)}, got {value!r}"
        )
    return None if value is None else name


def momentum_dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    """The storage of the group's momenta; None: its parameters' own."""
    name = _momentum_name(group["momentum_dtype"])
    return None if name is None else MOMENTUM_DTYPES[name]


def betas(group: Mapping[str, Any]) -> tuple[float, float]:
    """beta1 and beta2 of a group; raises ValueError where they are no pair in [0, 1)."""
    pair = group["betas"]
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {pair!r}")
    beta1, beta2 = pair
    return check_number("beta1", beta1, below=1.0), check_number("beta2", beta2, below=1.0)


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is out of its range; write momentum_dtype as its
    name, and the first lr that independent_weight_decay needs. A tensor lr on a device is not read:
    that would wait for the device."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        check_number("lr", lr)
    betas(group)
    check_number("weight_decay", group["weight_decay"])
    group["momentum_dtype"] = _momentum_name(group["momentum_dtype"])
    for name, choices in CHOICES.items():
        check_choice(name, group[name], choices)
    for name in FLAGS:
        check_choice(name, group[name], (False, True))
    if group["independent_weight_decay"]:
        # Not "initial_lr": that key belongs to torch's schedulers.
        if "reference_lr" not in group:  # read once: a tensor may lie on a device
            group["reference_lr"] = lr.item() if isinstance(lr, Tensor) else plain(lr)
        first = group["reference_lr"]
        if not first > 0.0:
            raise ValueError(f"independent_weight_decay needs an initial lr above 0, got {first}")


@dataclass(frozen=True)
class Settings:
    """A group's options as the ops take them."""

    lr: Tensor  # of one element
    betas: tuple[float, float]
    weight_decay: float
    maximize: bool
    momentum_dtype: torch.dtype | None
    rounding: str
    skips: bool  # elements whose c is not finite
    cautious: bool
    rescales: bool
    cautious_decay: bool


# What Settings are read from.
SETTINGS = (
    "lr", "betas", "weight_decay", "maximize", "momentum_dtype", "rounding", "nonfinite",
    "independent_weight_decay", "reference_lr", "cautious", "cautious_weight_decay",
)  # fmt: skip


def settings_of(group: dict[str, Any]) -> Settings:
    """Read and check a group's options; raises as check_options."""
    check_options(group)
    return Settings(
        lr=lr_tensor(group),
        betas=betas(group),
        weight_decay=weight_decay(group),
        maximize=bool(group["maximize"]),
        momentum_dtype=momentum_dtype(group),
        rounding=group["rounding"],
        skips=group["nonfinite"] == "skip",
        cautious=bool(group["cautious"]),
        rescales=group["cautious"] == "rescaled",
        cautious_decay=bool(group["cautious_weight_decay"]),
    )


def can_change_unseen(group: Mapping[str, Any]) -> bool:
    """Whether a number of a group is in something that can be written in place."""
    numbers = group["lr"], group["weight_decay"], *group["betas"]
    return type(group["betas"]) is not tuple or not all(type(x) in (float, int) for x in numbers)


def weight_decay(group: Mapping[str, Any]) -> float:
    """What the ops multiply with lr."""
    decay = float(plain(group["weight_decay"]))
    return decay / group["reference_lr"] if group["independent_weight_decay"] else decay


def lr_tensor(group: Mapping[str, Any]) -> Tensor:
    """The group's lr as the 0-d tensor that the ops take."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def merged_at_load(
    saved: Mapping[str, Any], present: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A group's options after a load: the saved ones, but for those of KEPT_AT_LOAD, which stay,
    and those that the saved state lacks. With a sentence for each saved one that is not taken."""
    merged = {**present, **saved}
    refused = []
    for name in KEPT_AT_LOAD:
        merged[name] = present[name]
        if name in saved and saved[name] != present[name]:
            refused.append(f"{name} stays {present[name]!r}, the saved state has {saved[name]!r}")
    return merged, refused
