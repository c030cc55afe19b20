"""Gradients that a wrapper averaged before the vote: every rank then votes the same, and one bit a
parameter travels beside the whole gradient. Notices it, and says what the wrapper needs.
"""

import gc
import logging
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .vote.agreement import hash_parameters

logger = logging.getLogger(__name__)

# Elements that are compared: more of them, equal to the last bit, would say the same.
_ENOUGH = 2**20
_HOOK = "with noop_hook of torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks"


def hash_of(grads: Sequence[Tensor | None]) -> int:
    """A hash of the first gradients; 0 where all are zero or there is none."""
    some: list[Tensor] = []
    n = 0
    for g in grads:
        if g is not None and n < _ENOUGH:
            some.append(g.detach().flatten()[: _ENOUGH - n])
            n += some[-1].numel()
    return int(hash_parameters(some).sum()) if some and any(bool(g.any()) for g in some) else 0


def warn(params: Sequence[Tensor]) -> None:
    logger.warning(
        "every rank has the same gradients, to the last bit: they were averaged before the vote, "
        "or all ranks read the same data, and nothing is saved; %s",
        _remedy(params),
    )


def _remedy(params: Sequence[Tensor]) -> str:
    ids = {*map(id, params)}
    for each in gc.get_objects():
        if not issubclass(type(each), DistributedDataParallel) or "_modules" not in vars(each):
            continue
        module = each._modules.get("module")
        if module is None or ids.isdisjoint(map(id, module.parameters())):
            continue
        if isinstance(module, torch.nn.ParameterList):
            return (
                "call register_comm_hook(None, noop_hook) on the module that replicate returned, "
                f"before its first pass, {_HOOK}"
            )
        if "transformers" in sys.modules:
            return (
                "under Hugging Face's Trainer, call trainer.model_wrapped.register_comm_hook(None, "
                f"noop_hook) in a callback's on_train_begin, {_HOOK}"
            )
        if "accelerate" in sys.modules:
            return (
                "call register_comm_hook(None, noop_hook) on the model that accelerator.prepare "
                f"returned, {_HOOK}"
            )
        return (
            "call register_comm_hook(None, noop_hook) on the DistributedDataParallel model, "
            f"{_HOOK}"
        )
    return "leave the all-reduce of gradients out"
