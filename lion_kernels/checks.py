"""What parameters, gradients and learning rates an optimizer takes: each rule, and an error that
names the parameter, raised before anything is written. A parameter without a gradient is asked
nothing. Knows no ranges of options (options.py).
"""

from typing import Any

import torch
from torch import Tensor

from . import native, ops
from .bucket import DOUBLES
from .dense import overlaps
from .shards import has_storage, is_distributed, is_wrapper
from .states import check_fits

_PARAMETER_DTYPES = (*ops.STORAGE_DTYPES, torch.complex64, *DOUBLES)

# What keeps parameters of its own under a vote, and how to vote all the same.
_VOTES_ON = (
    "DistributedLion votes on whole, plain parameters, of a bare module or under DDP with a no-op "
    "communication hook: {where} is {what}"
)


def label(group: dict[str, Any], number: int, index: int) -> str:
    """How errors name a parameter of group ``number``."""
    names = group.get("param_names")
    name = f" ({names[index]!r})" if names and index < len(names) else ""
    return f"parameter {index} of group {number}{name}"


def check_parameter(group: dict[str, Any], number: int, index: int, device: torch.device) -> None:
    """The rules of a parameter that has a gradient, beside others on ``device``."""
    p = group["params"][index]
    if p.dtype not in _PARAMETER_DTYPES or p.layout != torch.strided or is_wrapper(p):
        raise ValueError(
            f"{label(group, number, index)} must be a dense tensor of float32, bfloat16, float16, "
            f"float64, complex64 or complex128, got {p.dtype} with layout {p.layout} of type "
            f"{type(p).__name__}"
        )
    if p.is_complex() and group["momentum_dtype"] is not None:
        raise ValueError(
            f"momentum_dtype must be None for complex parameters: {label(group, number, index)}"
        )
    if overlaps(p):
        raise ValueError(
            f"parameters must not overlap themselves: {label(group, number, index)} has shape "
            f"{tuple(p.shape)} with strides {p.stride()}"
        )
    if p.device != device:
        raise ValueError(
            f"parameters of a group that have gradients must be on one device: "
            f"{label(group, number, index)} is on {p.device}, the first on {device}"
        )
    if p.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"parameters must be on the CPU or a CUDA device: {label(group, number, index)} is "
            f"on {p.device}"
        )


def is_flat_shard(p: Tensor) -> bool:
    """Whether FSDP1 owns ``p``: a flat parameter, or a view of one (use_orig_params)."""
    return getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)


def is_whole(p: Tensor) -> bool:
    """Whether every rank has all of ``p``, in a storage of its own."""
    return has_storage(p) and not is_flat_shard(p) and not overlaps(p)


def check_voter(group: dict[str, Any], number: int, index: int) -> None:
    """Raise ValueError where a rank holds a part of the parameter only."""
    p = group["params"][index]
    where = label(group, number, index)
    if is_distributed(p):
        what = "a DTensor, as fully_shard and replicate make them"
        raise ValueError(_VOTES_ON.format(where=where, what=what))
    if is_flat_shard(p):
        raise ValueError(_VOTES_ON.format(where=where, what="a flat shard of FSDP1"))


def check_storage(group: dict[str, Any], number: int, index: int) -> None:
    """Raise ValueError where what wraps a parameter could not save its state."""
    if group["momentum_dtype"] == "int8" and is_flat_shard(group["params"][index]):
        raise ValueError(
            "int8 momenta have scales, for which FSDP1's optimizer states have no place: use "
            f"fully_shard, or another momentum_dtype; {label(group, number, index)} is a flat shard"
        )


def check_rescale(group: dict[str, Any], number: int, cautious: bool | str) -> None:
    """Raise ValueError where a rescaled update would have to count a part of a tensor."""
    for i, p in enumerate(group["params"] if cautious == "rescaled" else ()):
        if is_distributed(p):
            raise ValueError(
                f'cautious="rescaled" counts whole tensors: {label(group, number, i)} is a DTensor'
            )


def check_gradient(group: dict[str, Any], number: int, index: int, who: str) -> None:
    p = group["params"][index]
    g = p.grad
    if g.layout != torch.strided:
        raise RuntimeError(
            f"{who} does not support sparse gradients: {label(group, number, index)} has layout "
            f"{g.layout}; use sparse=False in its embedding"
        )
    if g.dtype != p.dtype or g.device != p.device or g.shape != p.shape:
        raise ValueError(
            f"the gradient of {label(group, number, index)} must be {p.dtype} of shape "
            f"{tuple(p.shape)} on {p.device}, got {g.dtype} of shape {tuple(g.shape)} on "
            f"{g.device}"
        )
    if is_distributed(p) != is_distributed(g):
        raise ValueError(
            f"the gradient of {label(group, number, index)} must be a DTensor where it is one, "
            f"got {type(g).__name__} for {type(p.data).__name__}"
        )


def check_lr(group: dict[str, Any], number: int, device: torch.device) -> None:
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return
    if lr.device != device or lr.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a tensor lr must be on the CPU, or float32 or float64 on {device}: "
            f"group {number} has {lr.dtype} on {lr.device}"
        )


def check_members(
    group: dict[str, Any],
    number: int,
    indices: list[int],
    state: dict[Tensor, Any],
    device: torch.device,
    who: str,
    is_whole: bool,
) -> None:
    """Every rule of the parameters that a step of the group will move on ``device``, and of what is
    kept for them; ``who``: the optimizer's name; ``is_whole``: whether every rank must have all of
    them."""
    params = group["params"]
    for i in indices:
        check_parameter(group, number, i, device)
        check_storage(group, number, i)
        if is_whole:
            check_voter(group, number, i)
        if params[i].grad is not None:
            check_gradient(group, number, i, who)
        if params[i] in state:
            check_fits(state[params[i]], params[i], label(group, number, i))


def require_kernels(group: dict[str, Any], vote: bool) -> None:
    """Raise RuntimeError where a group has CUDA parameters to move and no kernels for them."""
    if any(p.is_cuda and p.requires_grad for p in group["params"]):
        native.require_kernels("cuda", vote=vote)
