"""What was built: the compiled library, loaded, described, and missed by name; and the kernels of a
device, which are asked for without importing them.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_C: Any = None
_load_error: ImportError | None = None
try:
    _C = importlib.import_module("lion_kernels._C")
except ImportError as error:
    _load_error = error


def _hidden_package() -> Path | None:
    """Where another lion_kernels, with its compiled library, stands behind this one on the path."""
    for folder in map(Path, sys.path):
        package = folder / "lion_kernels"
        if package != Path(__file__).parent and any(package.glob("_C*.so")):
            return folder
    return None


def require() -> None:
    """Raise RuntimeError unless the compiled library is loaded and fits this torch."""
    if _C is None and (hidden := _hidden_package()) is not None:
        raise RuntimeError(
            f"the folder {Path(__file__).parent.parent} hides the lion_kernels that is installed "
            f"in {hidden}: run Python in another folder"
        )
    if _C is None:
        raise RuntimeError(
            "lion_kernels was not built for this Python: run "
            f"`pip install --no-build-isolation .` in its source ({_load_error})"
        )
    built, running = _C.build_info()["torch"], torch.__version__.split("+")[0]
    if built != running:
        raise RuntimeError(
            f"lion_kernels was built for torch {built}, got {running}: build it again"
        )


def build_info() -> dict[str, object]:
    """How the compiled library was built: version, torch, CUDA and its architectures, SIMD level
    in use, SIMD levels of this machine, bits per word."""
    require()
    return dict(_C.build_info())


# By device type: what raises, given ``vote``, where its back end lacks something. Back ends put it
# here when they register their ops, so that who asks imports none of them.
REQUIRED: dict[str, Callable[[bool], None]] = {}


def require_kernels(device_type: str, vote: bool) -> None:
    """Raise RuntimeError where the kernels of the ops, or those that count a ``vote``, are missing
    for a device type, and say what to install."""
    REQUIRED[device_type](vote)
