"""CUDA graphs that are being captured, and what must not be made meanwhile.

A leaf: asks torch, and knows no back end and no optimizer.
"""

import torch

_WARM_UP = "a step must run once, with these parameters, before one is captured into a CUDA graph"


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Raise RuntimeError where a zero would be made while a graph is captured: every replay would
    make it again."""
    if is_capturing(device):
        raise RuntimeError(_WARM_UP)
