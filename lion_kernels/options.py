"""Every option of the optimizers, in one table: its default, its rule, whose it is, whether ranks
agree on it, and who decides when a state is loaded; and what of a group's options the ops take.
Knows no state and no steps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from . import ops

MOMENTUM_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.MOMENTUM_DTYPES}
# How ballots and verdicts travel: vote/exchange.py.
EXCHANGES = ("allgather", "sharded")


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


def check_integer(name: str, value: Any, rule: str, low: int = 0, below: float = math.inf) -> int:
    """``value`` as an int of [low, below), which ``rule`` says in words; raises ValueError."""
    number = plain(value)
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    if not (is_integer and low <= number < below):
        raise ValueError(f"{name} must be an integer {rule}, got {value!r}")
    return int(number)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """The one of ``choices`` that ``value`` equals; raises ValueError."""
    given = plain(value)
    if not (isinstance(given, int | str) and given in choices):
        raise ValueError(f"{name} must be {_in_words(choices)}, got {value!r}")
    return choices[choices.index(given)]


def _in_words(choices: tuple[Any, ...]) -> str:
    words = [repr(choice) for choice in choices]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _momentum_name(_: str, value: Any) -> str | None:
    """The name of a momentum dtype, which every kind of checkpoint can hold."""
    name = value if isinstance(value, str) else str(value).removeprefix("torch.")
    if value is not None and name not in MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype must be None or one of {', '.join(MOMENTUM_DTYPES)}, got {value!r}"
        )
    return None if value is None else name


def _pair(name: str, pair: Any) -> Any:
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise ValueError(f"{name} must be a pair of numbers in [0, 1), got {pair!r}")
    for which, beta in zip(("beta1", "beta2"), pair, strict=True):
        check_number(which, beta, below=1.0)
    return pair


def _size(name: str, value: Any) -> Any:
    check_number(name, value)
    return value


def _rate(name: str, lr: Any) -> Any:
    """A tensor on a device is not read: that would wait for the device."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        check_number(name, lr)
    return lr


def _skips(name: str, value: Any) -> Any:
    if value != "skip":
        raise ValueError(
            f"{name} is not for DistributedLion, where a vote that is not finite abstains: "
            f"got {value!r}"
        )
    return value


def _cautious_vote(name: str, value: Any) -> Any:
    if plain(value) == "rescaled":
        raise ValueError(f'{name}="rescaled" changes the size of updates: votes have none')
    return check_choice(name, value, (False, True))


LION, DISTRIBUTED_LION = "Lion", "DistributedLion"
BOTH = (LION, DISTRIBUTED_LION)


@dataclass(frozen=True)
class Option:
    """``check(name, value)`` gives the value as it is kept, or raises ValueError."""

    name: str
    default: Any
    rule: str
    means: str
    check: Callable[[str, Any], Any]
    of: tuple[str, ...] = BOTH  # whose constructors take it
    in_group: bool = False  # of each group of parameters; else of the optimizer
    agreed: bool = True  # the same on every rank
    kept_at_load: bool = False  # what a saved group says does not replace it
    is_fixed: bool = False  # not to be given: every group has the default


def _choice(name: str, default: Any, choices: tuple[Any, ...], means: str, **more: Any) -> Option:
    check = partial(check_choice, choices=choices)
    return Option(name, default, _in_words(choices), means, check, **more)


def _flag(name: str, default: bool, means: str, **more: Any) -> Option:
    return _choice(name, default, (False, True), means, **more)


# The order is that of the constructors.
TABLE = (
    Option(
        "lr", 1e-4, "a number of at least 0, or a tensor of one element",
        "the learning rate; read in every step", _rate, in_group=True,
    ),
    Option(
        "betas", (0.9, 0.99), "a pair of numbers in [0, 1)",
        "how much of the momentum the update takes, and how much of it is kept",
        _pair, in_group=True,
    ),
    Option(
        "weight_decay", 0.0, "a number of at least 0", "decoupled, and multiplied by lr",
        _size, in_group=True,
    ),
    _choice(
        "aggregation", "majority", ("majority", "average"),
        "whether the verdict is the sign of the votes' sum or their mean", of=(DISTRIBUTED_LION,),
    ),
    _choice(
        "ballots", "binary", ("binary", "ternary"),
        "one bit, where words of zeros abstain and other zeros are coins, or two bits",
        of=(DISTRIBUTED_LION,),
    ),
    _choice(
        "ties", "zero", ("zero", "coin"), "what a tied majority decides: no move, or a coin",
        of=(DISTRIBUTED_LION,),
    ),
    _choice(
        "exchange", "auto", ("auto", *EXCHANGES), "how ballots and verdicts travel",
        of=(DISTRIBUTED_LION,),
    ),
    _flag("maximize", False, "up instead of down", in_group=True),
    Option(
        "momentum_dtype", None, f"None or one of {', '.join(MOMENTUM_DTYPES)}",
        "storage of the momentum; None: the parameter's own", _momentum_name,
        in_group=True, kept_at_load=True,
    ),
    _choice(
        "rounding", "nearest", ops.ROUNDINGS, "of 16-bit parameters", in_group=True,
        kept_at_load=True,
    ),
    _choice(
        "nonfinite", "propagate", ("propagate", "skip"),
        "what an update that is not finite does to its element", of=(LION,), in_group=True,
        kept_at_load=True,
    ),
    Option(
        "nonfinite", "skip", "'skip'", "a vote that is not finite abstains", _skips,
        of=(DISTRIBUTED_LION,), in_group=True, kept_at_load=True, is_fixed=True,
    ),
    _flag(
        "independent_weight_decay", False, "decay by weight_decay * lr / initial lr",
        in_group=True,
    ),
    _choice(
        "cautious", False, (False, True, "rescaled"),
        "leave weights whose update has not the sign of their gradient", of=(LION,),
        in_group=True,
    ),
    Option(
        "cautious", False, "False or True", "a vote that has not the sign of its gradient is zero",
        _cautious_vote, of=(DISTRIBUTED_LION,), in_group=True,
    ),
    _flag(
        "cautious_weight_decay", False, "decay only in the direction of the update",
        in_group=True,
    ),
    _flag("fused_backward", False, "step during backward, and free gradients", of=(LION,)),
    Option(
        "seed", 0, "an integer in [0, 2**63)", "of coins and of stochastic rounding",
        partial(check_integer, rule="in [0, 2**63)", below=2**63),
    ),
    Option(
        "weight", 1, "an integer in [1, 255]", "as how many votes a rank's counts",
        partial(check_integer, rule="in [1, 255]", low=1, below=256), of=(DISTRIBUTED_LION,),
        agreed=False,
    ),
    _flag("broadcast", True, "start with the parameters of rank 0", of=(DISTRIBUTED_LION,)),
    Option(
        "check_every", 0, "an integer of at least 0", "compare the replicas after so many steps",
        partial(check_integer, rule="at least 0"), of=(DISTRIBUTED_LION,),
    ),
    Option(
        "statistics_every", 0, "an integer of at least 0", "count votes after so many steps",
        partial(check_integer, rule="at least 0"), of=(DISTRIBUTED_LION,),
    ),
    Option(
        "audit_every", 0, "an integer of at least 0", "count a slice again after so many steps",
        partial(check_integer, rule="at least 0"), of=(DISTRIBUTED_LION,),
    ),
)  # fmt: skip

# Of each optimizer: all of its options by name, and those of a group.
OPTIONS = {kind: {o.name: o for o in TABLE if kind in o.of} for kind in BOTH}
GROUP_OPTIONS = {kind: {n: o for n, o in OPTIONS[kind].items() if o.in_group} for kind in BOTH}
# Options that a group of an optimizer cannot have.
_LACKING = {kind: {o.name for o in TABLE} - GROUP_OPTIONS[kind].keys() for kind in BOTH}


def checked(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor was given, as it is kept; raises ValueError."""
    return {name: OPTIONS[kind][name].check(name, value) for name, value in given.items()}


def check_options(group: dict[str, Any], kind: str) -> None:
    """Raise ValueError where an option of a group is out of its range or is none of an optimizer of
    this kind; write options as they are kept, and the first lr, which independent_weight_decay
    needs."""
    for name in group.keys() & _LACKING[kind]:
        raise ValueError(f"{name} is no option of a group of {kind}, got {group[name]!r}")
    for name, option in GROUP_OPTIONS[kind].items():
        group[name] = option.check(name, group[name])
    if group["independent_weight_decay"]:
        # Not "initial_lr": that key belongs to torch's schedulers.
        if "reference_lr" not in group:  # read once: a tensor may lie on a device
            group["reference_lr"] = (
                group["lr"].item() if isinstance(group["lr"], Tensor) else plain(group["lr"])
            )
        first = group["reference_lr"]
        if not first > 0.0:
            raise ValueError(f"independent_weight_decay needs an initial lr above 0, got {first}")


@dataclass(frozen=True)
class Settings:
    """A group's options as the ops take them."""

    lr: Tensor  # of one element
    betas: tuple[float, float]
    weight_decay: float  # which the ops multiply with lr
    maximize: bool
    momentum_dtype: torch.dtype | None  # None: the parameter's own
    rounding: str
    skips: bool  # elements whose c is not finite
    cautious: bool
    rescales: bool
    cautious_decay: bool

    @cached_property
    def digest(self) -> str:
        """All of it but for a rate that lies on a device."""
        lr = self.lr.item() if self.lr.device.type == "cpu" else "on the device"
        return repr(replace(self, lr=lr))  # type: ignore[arg-type]


# What Settings are read from: the same names for both optimizers.
SETTINGS = (*GROUP_OPTIONS[LION], "reference_lr")


def settings_of(group: dict[str, Any], kind: str) -> Settings:
    """Read and check a group's options; raises as check_options."""
    check_options(group, kind)
    lr, decay = group["lr"], float(plain(group["weight_decay"]))
    beta1, beta2 = map(plain, group["betas"])
    dtype = group["momentum_dtype"]
    return Settings(
        lr=lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu"),
        betas=(float(beta1), float(beta2)),
        weight_decay=decay / group["reference_lr"] if group["independent_weight_decay"] else decay,
        maximize=bool(group["maximize"]),
        momentum_dtype=None if dtype is None else MOMENTUM_DTYPES[dtype],
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


def merged_at_load(
    saved: Mapping[str, Any], present: Mapping[str, Any], kind: str
) -> tuple[dict[str, Any], list[str]]:
    """A group's options after a load: the saved ones, but for those that are kept at a load,
    and those that the saved state lacks. With a sentence for each saved one that is not taken."""
    merged = {**present, **saved}
    refused = []
    for name in (option.name for option in GROUP_OPTIONS[kind].values() if option.kept_at_load):
        merged[name] = present[name]
        if name in saved and saved[name] != present[name]:
            refused.append(f"{name} stays {present[name]!r}, the saved state has {saved[name]!r}")
    return merged, refused
