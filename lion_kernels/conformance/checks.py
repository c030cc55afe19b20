"""The list of checks, by what they are called in tables, and how a class is judged by them."""

from collections.abc import Mapping
from functools import partial

import torch

from . import contract, formula, options, release, state
from .common import Check, Make, Outcome, with_option

half = torch.bfloat16

CHECKS: dict[str, Check] = {
    "the formula, float32": formula.formula,
    "sign(0) is 0": formula.zero_gradient,
    "weight decay, float32": partial(formula.decay, torch.float32),
    "weight decay, bfloat16": partial(formula.decay, torch.bfloat16),
    "weight decay, float16": partial(formula.decay, torch.float16),
    "bfloat16: small decay acts": formula.small_decay,
    "bfloat16: small updates act": formula.small_update,
    "16 bits: no bias": formula.rounding_bias,
    "float64": formula.float64,
    "complex64, complex128": formula.complex_numbers,
    "momentum as exact as float32": formula.momentum_precision,
    "maximize": formula.maximize,
    "lr read in every step": formula.live_lr,
    "lr as a tensor": formula.tensor_lr,
    "options written in place": formula.written_in_place,
    "groups, one added later": formula.groups,
    "threads": formula.threads,
    "rounded once, everywhere": formula.fused,
    "memory layouts": contract.memory_layouts,
    "gradient and storage untouched": contract.surroundings,
    "None, empty, 0-d, odd sizes": contract.odd_tensors,
    "frozen foreign parameters": contract.foreign,
    "overlapping parameters": contract.overlapping,
    "one NaN gradient": contract.not_a_number,
    "a sparse gradient": contract.sparse_gradient,
    "version counters": contract.version_counters,
    "closure": contract.closures,
    "hooks of a step": contract.hooks,
    "wrong arguments": contract.arguments,
    "GradScaler: the path": contract.scaled_path,
    "GradScaler: gradient unscaled": contract.scaled_gradient,
    "CUDA graph": contract.graph,
    "resume": partial(state.resume, torch.float32),
    "resume with unknown keys": state.unknown_keys,
    "resume in another memory format": state.memory_format,
    "an earlier state": state.rolled_back,
    "a state changed by hand": state.by_hand,
    "own momentum_dtype after a load": state.own_storage,
    "own rounding after a load": state.own_rounding,
    "deep copies": state.copies,
    "states for other libraries": state.exports,
    "DTensor shards": state.shards,
    "fused backward: the path": release.path,
    "fused backward: ends": release.end,
    "fused backward: GradScaler": release.scaler,
    "stochastic rounding": with_option("stochastic", options.stochastic),
    "stochastic rounding: resume": with_option("stochastic", partial(state.resume, half)),
    "compensated rounding": with_option("compensated", options.compensated),
    "compensated rounding: resume": with_option("compensated", partial(state.resume, half)),
    "8-bit momentum: close": with_option("8-bit", options.eight_bits),
    "8-bit momentum: one NaN": with_option("8-bit", contract.not_a_number),
    "8-bit momentum: threads": with_option("8-bit", formula.threads),
    "8-bit momentum: resume": with_option("8-bit", partial(state.resume, torch.float32)),
    "8-bit momentum: memory format": with_option("8-bit", state.memory_format),
    "8-bit momentum: DTensor shards": with_option("8-bit", state.shards),
    "cautious": with_option("cautious", options.cautious),
    "cautious, rescaled": options.cautious_rescaled,
    "cautious weight decay": with_option("cautious decay", options.cautious_decay),
}


def judge(make: Make, device: str, checks: Mapping[str, Check] = CHECKS) -> dict[str, Outcome]:
    """Every check's outcome; one that raises failed."""
    outcomes: dict[str, Outcome] = {}
    for name, check in checks.items():
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # for those that round with torch's generator
                outcomes[name] = check(make, device)
        except Exception as error:  # whatever an implementation raises is a result
            lines = str(error).strip().splitlines() or [""]
            outcomes[name] = False, f"{type(error).__name__}: {lines[0][:60]}"
    return outcomes
