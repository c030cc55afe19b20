"""lion_kernels: the Lion optimizer and Distributed Lion for PyTorch, fused and exact.

``Lion`` is a drop-in optimizer; ``DistributedLion`` votes over a process group with one bit a
parameter. Importing compiles nothing and starts no device.
"""

from lion_kernels import kernels as kernels
from lion_kernels._version import __version__
from lion_kernels.distributed import DistributedLion
from lion_kernels.lion import Lion
from lion_kernels.native import build_info

__all__ = ["DistributedLion", "Lion", "__version__", "build_info"]
