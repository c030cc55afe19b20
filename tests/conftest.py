"""Fixtures: the op back ends, and worlds of real Gloo processes."""

import os

import pytest

# Read when torch is imported. Threads that spin for their next loop take the cores from each other
# where others run too: a test of small loops took 75 s on two busy cores, and 11 s without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import backends  # first: it says how Triton's kernels run
from ranks import World

# Triton's interpreter, or on a GPU its compiler.
_marks = {backends.GPU: pytest.mark.slow}


@pytest.fixture(params=[pytest.param(b, marks=_marks.get(b, ())) for b in backends.BACKENDS])
def backend(request):
    """Something with encode, tally, elect, apply and lion_step (backends.py)."""
    backend, restore = backends.select(request.param)
    yield backend
    restore()


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
