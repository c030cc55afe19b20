"""lion_kernels: the Lion optimizer and Distributed Lion for PyTorch, fused and exact.

``Lion`` is a drop-in optimizer; ``DistributedLion`` votes over a process group with one bit a
parameter. Importing compiles nothing and starts no device.
"""

from . import kernels as kernels
from ._version import __version__
from .distributed import DistributedLion
from .lion import Lion
from .native import build_info

__all__ = ["DistributedLion", "Lion", "__version__", "build_info"]
