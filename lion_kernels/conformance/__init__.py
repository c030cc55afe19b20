"""What users expect of a Lion, as a suite that runs against any implementation of it:

    python -m lion_kernels.conformance lion_kernels:Lion lion_pytorch:Lion --device cpu

Each check builds the optimizer on small tensors, steps it, and compares with Lion's formula
(arXiv:2302.06675, Algorithm 2) in float64, written out here: it uses no part of lion_kernels, so
that it can judge it too. Exit status 1 where a check fails.
"""

from .checks import CHECKS, judge
from .command import main, maker

__all__ = ["CHECKS", "judge", "main", "maker"]
