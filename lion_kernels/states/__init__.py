"""What optimizers keep beside their parameters, what of it is saved, and how it comes back.

tensors.py makes and moves it, interchange.py reads and writes the saved states of other Lions, and
loading.py brings a saved state in. A plain step needs the names below alone.
"""

from .tensors import (
    KEYS,
    block_scales_of,
    check_fits,
    compensation,
    momentum,
    step_counter,
    whole_parameter,
)

__all__ = [
    "KEYS",
    "block_scales_of",
    "check_fits",
    "compensation",
    "momentum",
    "step_counter",
    "whole_parameter",
]
