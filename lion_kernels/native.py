"""What was built: the compiled libraries, loaded, described, and missed by name; and the kernels of
a device, which are asked for without importing them.
"""

import ctypes
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import declare
from . import ops as ops  # what the libraries implement
from ._about import digest_of
from ._namespace import MODULE, NAMESPACE

OLDEST_TORCH = (2, 11)

# A library for other ops would take their arguments for what they are not.
_DIGEST = digest_of(ops.SCHEMAS)


def _of_another_source(library: str) -> str:
    return (
        f"{library} was built from another source than the ops beside it: build it again, by "
        "`python setup.py build_ext --inplace` in a source tree, or, where lion_kernels is "
        "installed, by `pip install --force-reinstall --no-deps .` in its source"
    )


_C: Any = None
_load_error: ImportError | None = None
_misfit = ""  # what there is of _C, where it does not fit
try:
    _C = importlib.import_module(MODULE, __package__)
except ImportError as error:
    _load_error = error
if _C is not None and getattr(_C, "schemas_digest", None) != _DIGEST:
    _C, _misfit = None, _of_another_source(_C.__file__)

# What counts votes on GPUs; another torch has no tensors that could reach it.
_CUDA = Path(__file__).parent / "_cuda.so"
has_cuda = False
cuda_error = ""  # why what was built of it is not used


def _register_cuda() -> str:
    """Or why not: what a machine without a GPU has no need of must not end an import."""
    try:
        library = ctypes.CDLL(str(_CUDA))
    except OSError as error:
        return f"{_CUDA} cannot be loaded: {error}"
    digest = getattr(library, "lion_kernels_schemas_digest", None)
    if digest is not None:
        digest.restype = ctypes.c_char_p
    if digest is None or digest().decode() != _DIGEST:
        return _of_another_source(str(_CUDA))
    register, take_refusal = library.lion_kernels_register, library.lion_kernels_take_refusal
    register.restype = take_refusal.restype = ctypes.c_char_p
    if refused := register(NAMESPACE.encode()):
        raise RuntimeError(refused.decode())
    declare.REFUSALS.append(lambda: take_refusal().decode())
    return ""


if _C is not None:
    has_cuda = _C.register_ops(NAMESPACE)
    declare.REFUSALS.append(_C.take_refusal)
    if torch.version.cuda is not None and _CUDA.is_file():
        cuda_error = _register_cuda()
        has_cuda = not cuda_error


def _hidden_package() -> Path | None:
    """Where another lion_kernels, with its compiled library, stands behind this one on the path."""
    for folder in map(Path, sys.path):
        package = folder / "lion_kernels"
        if package != Path(__file__).parent and any(package.glob("_C*.so")):
            return folder
    return None


def require() -> None:
    """Raise RuntimeError unless the compiled library is loaded."""
    version = torch.__version__.split("+")[0]
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        raise RuntimeError(f"lion_kernels needs torch >= 2.11, got {version}")
    if _misfit:
        raise RuntimeError(_misfit)
    if _C is None and (hidden := _hidden_package()) is not None:
        raise RuntimeError(
            f"the folder {Path(__file__).parent.parent} hides the lion_kernels that is installed "
            f"in {hidden}: run Python in another folder"
        )
    if _C is None:
        raise RuntimeError(
            "lion_kernels was not built for this Python: run "
            f"`pip install .` in its source ({_load_error})"
        )


def build_info() -> dict[str, object]:
    """How the compiled library was built: version, whether with CUDA and for which architectures,
    SIMD level in use, SIMD levels of this machine, bits per word."""
    require()
    return {**_C.build_info(), "cuda": has_cuda}


def identity(fixed: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[bytes, bytes]:
    """The addresses of ``grads`` as int64, 0 for None; and what tells these tensors from others,
    wherever the gradients lie: see csrc/identity.h. Raises RuntimeError where one has no data."""
    addresses, numbers = _C.identity(fixed, grads)
    return addresses, numbers


def odd_gradients(
    identity: bytes, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[int]:
    """Which gradients are not in the layout of their parameters, the first of ``tensors``; [-1]
    where these are no longer what ``identity`` says, or a gradient does not fit."""
    found: list[int] = _C.odd_gradients(identity, tensors, grads)
    return found


# By device type: what raises, given ``vote``, where its back end lacks something. Back ends put it
# here when they register their ops, so that who asks imports none of them.
REQUIRED: dict[str, Callable[[bool], None]] = {}


def require_kernels(device_type: str, vote: bool) -> None:
    """Raise RuntimeError where the kernels of the ops, or those that count a ``vote``, are missing
    for a device type, and say what to install."""
    REQUIRED[device_type](vote)
