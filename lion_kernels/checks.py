"""What parameters, gradients and learning rates an optimizer takes: each rule, and an error that
names the parameter, raised before anything is written. Knows no ranges of options (options.py).
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels import _ops
from lion_kernels.states import is_distributed


def label(group: dict[str, Any], number: int, index: int) -> str:
    """How errors name a parameter of group ``number``."""
    names = group.get("param_names")
    name = f" ({names[index]!r})" if names else ""
    return f"parameter {index} of group {number}{name}"


def check_parameters(group: dict[str, Any], number: int) -> None:
    for i, p in enumerate(group["params"]):
        real = p.dtype.to_real() if p.is_complex() else p.dtype
        if real not in _ops.STORAGE_DTYPES:
            raise ValueError(
                f"{label(group, number, i)} must be float32, bfloat16, float16 or complex64, "
                f"got {p.dtype}"
            )
        if p.is_complex() and group["momentum_dtype"] is not None:
            raise ValueError(
                f"momentum_dtype must be None for complex parameters: {label(group, number, i)}"
            )
        if any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(
                f"parameters must not overlap themselves: {label(group, number, i)} has shape "
                f"{tuple(p.shape)} with strides {p.stride()}"
            )
        if p.device != group["params"][0].device:
            raise ValueError(
                f"all parameters of a group must be on one device: {label(group, number, i)} is "
                f"on {p.device}, the first on {group['params'][0].device}"
            )
        if p.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"parameters must be on the CPU or a CUDA device: {label(group, number, i)} is "
                f"on {p.device}"
            )


def check_plain(group: dict[str, Any], number: int, rule: str) -> None:
    for i, p in enumerate(group["params"]):
        if is_distributed(p):
            raise ValueError(f"{rule}: {label(group, number, i)} is a DTensor")


def check_rescale(
    group: dict[str, Any], number: int, cautious: bool | str, is_possible: bool
) -> None:
    if cautious == "rescaled":
        if not is_possible:
            raise ValueError('cautious="rescaled" changes the size of updates: votes have none')
        check_plain(group, number, 'cautious="rescaled" counts whole tensors')


def check_gradient(group: dict[str, Any], number: int, index: int) -> None:
    p = group["params"][index]
    g = p.grad
    if g.layout != torch.strided:
        raise ValueError(
            f"sparse gradients are not supported: {label(group, number, index)} has layout "
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


def check_lr(group: dict[str, Any], number: int) -> None:
    lr, params = group["lr"], group["params"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu" or not params:
        return
    if lr.device != params[0].device or lr.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a tensor lr must be on the CPU, or float32 or float64 on {params[0].device}: "
            f"group {number} has {lr.dtype} on {lr.device}"
        )
