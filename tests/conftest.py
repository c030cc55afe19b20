"""Fixtures: the op back ends, and worlds of real Gloo processes."""

import pytest
import torch

from lion_kernels import _C, build_info, reference
from ranks import World

SIMD_LEVELS = build_info()["simd_levels"]


@pytest.fixture(params=["reference", *SIMD_LEVELS])
def backend(request):
    """Something with encode, tally, elect, apply and lion_step: the specification or the kernels
    of one SIMD level."""
    if request.param == "reference":
        yield reference
        return
    before = build_info()["simd"]
    _C.set_simd_level(request.param)
    yield torch.ops.lion_kernels
    _C.set_simd_level(before)


@pytest.fixture(scope="session")
def worlds():
    """worlds(n): n Gloo processes, started once a session."""
    running = {}

    def get(n):
        if n not in running or not running[n].alive:
            running[n] = World(n)
        return running[n]

    yield get
    for world in running.values():
        world.close()
