"""Saved states of other Lions: read, whoever wrote them, and written for each of them.

lion-pytorch, google's and timm's keep "exp_avg"; optimi too, beside a Kahan compensation;
bitsandbytes "state1", in 8 bits with "qmap1" and "absmax1". Knows groups and states, no steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..options import Settings, plain, settings_of
from ..shards import cut_as, is_distributed
from .tensors import KEYS, exact_momentum

LIBRARIES = ("lion-pytorch", "google", "timm", "optimi", "bitsandbytes", "bitsandbytes-8bit")
# Elements of a block of bitsandbytes' 8-bit states, newest first.
_BLOCKS = (256, 2048)
_QUANTIZED = "__bnb_optimizer_quant_state__"
# Its keys of a state.
_BITSANDBYTES = (_QUANTIZED, "state1", "qmap1", "absmax1", "max1", "new_max1", "gnorm_vec")
# It keeps smaller tensors in float32.
_SMALLEST_8_BIT = 4096


def _momentum_of_bitsandbytes(state: dict[str, Any], where: str) -> Tensor:
    """``state1`` as floats: 8-bit values index ``qmap1``, scaled by their block's maximum."""
    m = state["state1"]
    if m.dtype != torch.uint8:
        return m
    if "absmax1" not in state:
        raise ValueError(f"the 8-bit state1 of {where} must have qmap1 and absmax1")
    scales = state["absmax1"]
    block = next((b for b in _BLOCKS if -(-m.numel() // b) == scales.numel()), None)
    if block is None:
        raise ValueError(
            f"absmax1 of {where} must have an element for every {' or '.join(map(str, _BLOCKS))} "
            f"of {m.numel()}, got {scales.numel()}"
        )
    values = state["qmap1"][m.flatten().long()]
    return (values * scales.repeat_interleave(block)[: m.numel()]).view(m.shape)


def translated(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group with betas, which optimi keeps as two options."""
    if "betas" not in group and "beta1" in group and "beta2" in group:
        return {**group, "betas": (group["beta1"], group["beta2"])}
    return group


def split_state(state: dict[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A parameter's saved state as what this library keeps, by its keys, and what it does not know:
    a wrapper's own, which torch loads. What another Lion keeps and this one does not need is in
    neither."""
    flat = {**state, **state.get(_QUANTIZED, {})}
    ours = {key: flat[key] for key in KEYS if flat.get(key) is not None}
    if flat.get("state1") is not None:
        ours["exp_avg"] = _momentum_of_bitsandbytes(flat, where)
    theirs = {"step", *_BITSANDBYTES} if "state1" in flat else {"kahan_comp"}
    return ours, {key: value for key, value in state.items() if key not in {*KEYS, *theirs}}


def _in_8_bits(m: Tensor) -> dict[str, Tensor]:
    """A float32 momentum in bitsandbytes' blocks of 256, each value the nearest of their map."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        raise RuntimeError(
            "a state for bitsandbytes-8bit needs its map of values: `pip install bitsandbytes`"
        ) from error
    qmap, flat = create_dynamic_map(signed=True).to(m.device), m.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCKS[0])).view(-1, _BLOCKS[0])
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)
    nearest = torch.bucketize(scaled, (qmap[1:] + qmap[:-1]) / 2)
    codes = nearest.flatten()[: flat.numel()].view(m.shape).to(torch.uint8)
    return {"state1": codes, "qmap1": qmap, "absmax1": absmax}


def exported(optimizer: Optimizer, library: str, kind: str) -> dict[str, Any]:
    """An optimizer's state as ``library`` loads it; see Lion.export_state_dict."""
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    packed = optimizer.state_dict()["param_groups"]
    out: dict[str, Any] = {"state": {}, "param_groups": []}
    for group, ids in zip(optimizer.param_groups, packed, strict=True):
        theirs = _exported_group(library, group, settings_of(group, kind))
        out["param_groups"].append({**theirs, "params": ids["params"]})
        steps = int(group.get("step", 1))
        for p, number in zip(group["params"], ids["params"], strict=True):
            if "exp_avg" in optimizer.state.get(p, {}):
                m = cut_as(p, exact_momentum(optimizer.state[p]))
                out["state"][number] = _exported_state(library, m, p, steps)
    return out


def _exported_state(library: str, m: Tensor, p: Tensor, steps: int) -> dict[str, Any]:
    """A parameter's state in the layout of ``library``, from its momentum in float32."""
    if library == "bitsandbytes-8bit" and m.numel() >= _SMALLEST_8_BIT:
        if is_distributed(m):
            raise ValueError("bitsandbytes-8bit has no state for DTensors: export for bitsandbytes")
        return {"step": steps, **_in_8_bits(m)}
    if library.startswith("bitsandbytes"):
        return {"step": steps, "state1": m.contiguous()}
    if library == "optimi":
        # Where this is missing, its next step clears the momentum.
        is_half = p.dtype in (torch.bfloat16, torch.float16)
        return {"exp_avg": m, "kahan_comp": torch.zeros_like(p) if is_half else None}
    return {"exp_avg": m}


def _exported_group(library: str, group: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The options of a group that ``library`` has, under its names."""
    lr, (beta1, beta2) = group["lr"], settings.betas
    if group["maximize"] and library != "timm":
        raise ValueError(f"{library} cannot maximize, and a group does")
    out: dict[str, Any] = {"lr": lr.item() if isinstance(lr, Tensor) else plain(lr)}
    out["weight_decay"] = settings.weight_decay
    if library == "optimi":
        is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in group["params"])
        return out | {
            "beta1": beta1, "beta2": beta2, "decouple_lr": False, "max_lr": None,
            "kahan_sum": is_half or None, "foreach": None, "triton": None,
            "gradient_release": False, "setup": False,
        }  # fmt: skip
    out["betas"] = (beta1, beta2)
    if library.startswith("bitsandbytes"):
        return out | {"eps": 0.0}
    if library == "timm":
        is_cautious = group["cautious"] == "rescaled"
        return out | {"maximize": group["maximize"], "caution": is_cautious, "foreach": None}
    return out
