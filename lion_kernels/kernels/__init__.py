"""The rooms on the GPU: Triton kernels that register into the op table of ops.py for CUDA tensors.

The tally of CUDA tensors is C++/CUDA (csrc/cuda/tally.cu) and registers itself where it was built.
What is missing raises, and says what to install; Triton is imported at the first call.
"""

import importlib
from typing import Any

import torch

from .. import native
from .. import ops as ops  # declares the ops that are implemented here
from .._namespace import NAMESPACE

TRITON_OPS = ("lion_step", "count_agreeing", "encode", "apply")
CUDA_OPS = ("tally", "elect")


def _launch() -> Any:
    try:
        return importlib.import_module(".launch", __package__)
    except ImportError as error:
        raise RuntimeError(
            "CUDA tensors need triton >= 3.6, which CUDA builds of torch bring along: "
            f"`pip install triton` ({error})"
        ) from error


def require(vote: bool) -> None:
    """Raise RuntimeError where the kernels for CUDA tensors are missing: Triton's, and, to count a
    vote, those of the CUDA build."""
    _launch()
    if vote and not native.has_cuda:
        _not_built()


_NOT_BUILT = (
    "lion_kernels was built without CUDA, which counting votes on CUDA tensors needs: run "
    "`LION_KERNELS_CUDA=1 pip install .` in its source, with a CUDA build of "
    "torch and nvcc"
)


def _triton(name: str) -> Any:
    def implementation(*args: Any) -> None:
        getattr(_launch(), name)(*args)

    return implementation


def _not_built(*_: Any) -> None:
    raise RuntimeError(native.cuda_error or _NOT_BUILT)


native.REQUIRED["cuda"] = require
for _name in TRITON_OPS:
    torch.library.impl(f"{NAMESPACE}::{_name}", "CUDA")(_triton(_name))
if not native.has_cuda:
    for _name in CUDA_OPS:
        torch.library.impl(f"{NAMESPACE}::{_name}", "CUDA")(_not_built)
