"""The optimizers that the GPU bench compares with: ours, and every peer at hand.

Owns how each is made; a peer that is missing or fails is a line, not an end. Knows no clocks.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cpu import SETTINGS
from lion_kernels.int8 import MOMENTUM_BLOCK

OURS = "lion_kernels Lion"
# Types of parameters and gradients, and of momenta.
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "bf16, fp32 momentum": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32, int8 momentum": (torch.float32, torch.int8),
    "bf16, int8 momentum": (torch.bfloat16, torch.int8),
}


def momentum_bytes(kind: str) -> float:
    """Of one element; int8 has a float32 scale a block."""
    dtype = KINDS[kind][1]
    return 1 + 4 / MOMENTUM_BLOCK if dtype == torch.int8 else dtype.itemsize


def parameters(shapes: list[list[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    drawn = (0.02 * torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    params = [torch.nn.Parameter(p) for p in drawn]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def foreach_lion(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]) -> None:
    """Lion as one would write it for torch.compile."""
    lr, (beta1, beta2) = SETTINGS["lr"], SETTINGS["betas"]
    update = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(update, grads, alpha=1 - beta1)
    torch._foreach_sign_(update)
    torch._foreach_mul_(params, 1 - lr * SETTINGS["weight_decay"])
    torch._foreach_add_(params, update, alpha=-lr)
    torch._foreach_mul_(exp_avgs, beta2)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta2)


def compiled_lion(params: list[Tensor], m_dtype: torch.dtype, dry: bool) -> Callable[[], object]:
    torch._dynamo.reset()
    backend = "eager" if dry else "inductor"
    update = torch.compile(foreach_lion, fullgraph=True, dynamic=False, backend=backend)
    plain = [p.detach() for p in params]
    exp_avgs = [torch.zeros_like(p, dtype=m_dtype) for p in plain]
    return partial(update, plain, [p.grad for p in params], exp_avgs)


def makers(
    params: list[Tensor], kind: str, dry: bool, compiled: bool
) -> Iterator[tuple[str, Callable]]:
    """(name, what makes its step) of ours and of every optimizer that can have this kind of
    momentum; or of ours and what Inductor makes of Lion."""

    def of(module: str, name: str = "Lion", **options: object) -> Callable[[], Callable]:
        return lambda: (
            getattr(importlib.import_module(module), name)(params, **SETTINGS, **options).step
        )

    m_dtype = KINDS[kind][1]
    yield OURS, of("lion_kernels", momentum_dtype=m_dtype)
    if compiled:
        yield "foreach Lion, torch.compile", lambda: compiled_lion(params, m_dtype, dry)
        return
    if m_dtype == params[0].dtype:
        fused = partial(torch.optim.AdamW, params, **SETTINGS, fused=True)
        yield "torch AdamW, fused", lambda: fused().step
        yield "lion-pytorch, triton", of("lion_pytorch", use_triton=True)
        yield "optimi, triton", of("optimi", triton=True, kahan_sum=False)
    if m_dtype == torch.int8:
        yield "bitsandbytes Lion8bit", of("bitsandbytes.optim", "Lion8bit")
    if m_dtype == torch.float32:  # the type of its momenta, whatever the parameters
        yield "bitsandbytes Lion", of("bitsandbytes.optim")


def steps(
    params: list[Tensor], kind: str, dry: bool, compiled: bool = False
) -> tuple[dict[str, Callable], list[str]]:
    """The step of every optimizer at hand, run once, and a line for each of the others."""
    found, notes = {}, []
    for name, make in makers(params, kind, dry, compiled):
        try:
            step = make()
            step()
            if not dry:
                torch.cuda.synchronize()
            found[name] = step
        except ImportError as error:
            notes.append(f"{name}: left out, {error}")
        except Exception as error:  # a peer's: whatever it is, the others go on
            if name == OURS:
                raise
            message = str(error).strip().splitlines() or [""]
            notes.append(f"{name}, {kind}: failed, {type(error).__name__}: {message[0][:160]}")
    return found, notes
