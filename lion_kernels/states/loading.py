"""Saved states brought into an optimizer: this library's and other Lions', checked whole before
anything is written. What a load replaces is options.py's to say.
"""

import logging
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..checks import check_rescale, label
from ..options import check_options, merged_at_load, settings_of
from . import interchange, tensors

logger = logging.getLogger(__name__)


class Loading:
    """One call of load_state_dict: ``read`` before torch's own, ``write`` after it. torch loads
    what no Lion knows, such as the weights that wrappers keep in a parameter's state."""

    def __init__(self, optimizer: Optimizer, kind: str) -> None:
        self.present = [dict(group) for group in optimizer.param_groups]
        self.kind = kind
        self.loaded: dict[Tensor, dict[str, Tensor]] = {}
        self.stays: list[str] = []

    def read(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [interchange.translated(group) for group in state_dict["param_groups"]]
        where = {
            p: label(group, number, i)
            for number, group in enumerate(self.present)
            for i, p in enumerate(group["params"])
        }
        ids = chain.from_iterable(group["params"] for group in groups)
        unknown = dict(state_dict["state"])
        for key, p in zip(ids, where, strict=False):
            if key in unknown:
                ours, theirs = interchange.split_state(unknown[key], where[p])
                tensors.check_fits(ours, p, where[p])
                if "exp_avg_scale" in ours:
                    tensors.check_scales(ours["exp_avg"], ours["exp_avg_scale"], where[p])
                self.loaded[p], unknown[key] = ours, theirs
                if not theirs:
                    del unknown[key]
        for number, (group, before) in enumerate(zip(groups, self.present, strict=False)):
            merged, refused = merged_at_load(group, before, self.kind)
            check_options(merged, self.kind)
            check_rescale(before, number, merged["cautious"])
            self.stays += refused
        return {**state_dict, "state": unknown, "param_groups": groups}

    def write(self, optimizer: Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self.present, strict=True):
            group.update(merged_at_load(group, before, self.kind)[0], params=group["params"])
            dtype = settings_of(group, self.kind).momentum_dtype
            for p in group["params"]:
                saved = self.loaded.get(p, {})
                if "exp_avg" in saved:
                    tensors.load_momentum(optimizer.state[p], p, dtype, saved)
                if "compensation" in saved and group["rounding"] == "compensated":
                    tensors.load_compensation(optimizer.state[p], p, saved)
        for sentence in dict.fromkeys(self.stays):
            logger.warning("load_state_dict: %s", sentence)
