"""Gradient release: parameters step as soon as backward has their gradient, which is freed at once.

Owns the hooks and what they have seen since the last step; the step itself is handed in. With it,
the gradients of a model never exist together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class Release:
    """``step_one(p)`` steps a parameter that has its gradient."""

    def __init__(self, step_one: Callable[[Tensor], None]) -> None:
        self._step_one = step_one
        self._stepped: set[Tensor] = set()
        self._accumulating = False

    def attach(self, params: list[Tensor]) -> None:
        for p in params:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, p: Tensor) -> None:
        if self._accumulating:
            return
        if p in self._stepped:
            raise RuntimeError(
                "with fused_backward a parameter got a second gradient before step(): run every "
                "backward pass of a step but the last within `with optimizer.accumulate():`"
            )
        self._step_one(p)
        self._stepped.add(p)
        p.grad = None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def end_step(self) -> None:
        self._stepped.clear()
