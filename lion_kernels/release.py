"""Gradient release: parameters step during backward, in buckets, as soon as their gradients are
there, which are freed at once: the gradients of a model never exist together.

Owns the hooks and what they have seen since the last step; the step itself is the optimizer's,
which hooks do not keep alive. Refuses what would make a hook see a gradient that is not final.
"""

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from .checks import is_flat_shard

logger = logging.getLogger(__name__)

# One launch for many parameters, of gradients that may exist together.
BUCKET_BYTES = 25 * 2**20

# The release that has hooks in a parameter.
_owners: Any = WeakIdKeyDictionary()


def _living(kind: type) -> list[Any]:
    """The objects of a class that exist: for what leaves no mark on the parameters that it uses."""
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def check_final(params: list[Tensor]) -> None:
    """Raise RuntimeError where hooks would see gradients that are still to be reduced."""
    # One whose construction failed has no module.
    parts = (ddp.__dict__.get("_modules", {}) for ddp in _living(DistributedDataParallel))
    modules = [part["module"] for part in parts if part.get("module") is not None]
    wrapped = {id(p) for module in modules for p in module.parameters()}
    for p in params:
        owner = "FSDP1" if is_flat_shard(p) else "DistributedDataParallel"
        if owner == "FSDP1" or id(p) in wrapped:
            raise RuntimeError(
                f"fused_backward steps as soon as a gradient is there, and under {owner} it is not "
                "final then: build the optimizer without fused_backward, or shard with fully_shard"
            )


def _check_unscaled() -> None:
    """Raise RuntimeError where a GradScaler has scaled a loss."""
    if any(s.is_enabled() and s._scale is not None for s in _living(torch.amp.GradScaler)):
        raise RuntimeError(
            "fused_backward steps during backward, before a GradScaler has looked at the "
            "gradients, and a GradScaler that scaled a loss exists: use one or the other, and "
            "delete a scaler that is not used any more"
        )


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()


def take_over(params: list[Tensor]) -> None:
    """End the hooks that earlier optimizers have in ``params``."""
    n_taken = 0
    for p in params if len(_owners) > 0 else []:
        owner = _owners.pop(p, None)
        release = None if owner is None else owner()
        n_taken += release is not None and release.leave(p)
    if n_taken > 0:
        logger.warning(
            "%d parameters leave an earlier optimizer with fused_backward for a new one", n_taken
        )


class Releasing(Protocol):
    """What an optimizer does for its release."""

    def _place(self, p: Tensor) -> tuple[int, int] | None:
        """The group and the index of a parameter; None where it is in no group any more."""

    def _make_states(self) -> None:
        """Make what is kept beside every parameter."""

    def _step_released(self, number: int, indices: list[int]) -> None:
        """Step parameters of a group that have their gradients."""


class Release:
    """The hooks of one optimizer."""

    def __init__(self, optimizer: Releasing) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles)
        # Of each group: the index of a parameter, itself, and the stream that its gradient is from.
        self._waiting: dict[int, list[tuple[int, Tensor, Any]]] = {}
        self._bytes: dict[int, int] = {}
        self._stepped: set[int] = set()
        self._accumulating = self._begun = False
        self._task = -1  # the backward pass of what waits

    def attach(self, params: list[Tensor]) -> None:
        """Hooks into ``params``, which must have final gradients when backward gives them."""
        this = weakref.ref(self)

        def on_gradient(p: Tensor) -> None:
            if (release := this()) is not None:
                release._on_gradient(p)

        for p in params:
            if p.requires_grad:
                self._handles[id(p)] = p.register_post_accumulate_grad_hook(on_gradient)
                _owners[p] = this

    def leave(self, p: Tensor) -> bool:
        """Remove the hook of a parameter; whether there was one."""
        handle = self._handles.pop(id(p), None)
        if handle is not None:
            handle.remove()
        return handle is not None

    def close(self) -> None:
        """Remove all hooks."""
        _remove(self._handles)
        self._handles.clear()

    def _on_gradient(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._accumulating or (place := optimizer._place(p)) is None:
            return
        if id(p) in self._stepped and not self._is_stale():
            raise RuntimeError(
                "with fused_backward a parameter got a second gradient before step(): run every "
                "backward pass of a step but the last within `with optimizer.accumulate():`"
            )
        if not self._begun:
            optimizer._make_states()  # of their full size before the first gradient is freed
            check_final([q for q, owner in _owners.items() if owner() is self])
            _check_unscaled()
            self._begun = True
        number, index = place
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):
            self._forget()
            self._task = task
        if not self._waiting:
            # What does not fill a bucket steps when backward ends.
            Variable._execution_engine.queue_callback(self.flush)
        stream = torch.cuda.current_stream(p.device) if p.is_cuda else None
        self._waiting.setdefault(number, []).append((index, p, stream))
        self._stepped.add(id(p))
        assert p.grad is not None
        self._bytes[number] = self._bytes.get(number, 0) + p.grad.numel() * p.grad.element_size()
        if self._bytes[number] >= BUCKET_BYTES:
            self._flush(number)

    def _is_stale(self) -> bool:
        """Whether what waits is of a backward pass that ended in an error."""
        return bool(self._waiting) and torch._C._current_graph_task_id() not in (-1, self._task)

    def _forget(self) -> None:
        """Let go what an earlier backward pass left waiting."""
        for waiting in self._waiting.values():
            self._stepped.difference_update(id(p) for _, p, _ in waiting)
        self._waiting.clear()
        self._bytes.clear()

    def _flush(self, number: int) -> None:
        waiting = self._waiting.pop(number, [])
        self._bytes.pop(number, None)
        optimizer = self._optimizer()
        # A gradient may have been taken away since its hook ran.
        waiting = [each for each in waiting if each[1].grad is not None]
        if optimizer is None or not waiting:
            return
        for _, p, stream in waiting:
            if stream is not None and stream != (here := torch.cuda.current_stream(p.device)):
                here.wait_stream(stream)
                p.grad.record_stream(here)  # type: ignore[union-attr]
        optimizer._step_released(number, [index for index, _, _ in waiting])
        for _, p, _ in waiting:
            p.grad = None

    def flush(self) -> None:
        """Step what waits for its bucket to fill."""
        for number in list(self._waiting):
            self._flush(number)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def end_step(self) -> None:
        self.flush()
        self._stepped.clear()
