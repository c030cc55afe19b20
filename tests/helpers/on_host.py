"""The kernels of csrc/cuda/tally.cu, compiled for the host: a back end for tests without a GPU.

Owns the compilation and the calls; the kernels run unchanged under cuda_shim.h.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lion_kernels import ops

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror")
# Unrolling matters on a GPU only; newer Clang renames TRAP's second flag.
FLAGS += ("-Wno-unknown-pragmas", "-Wno-pass-failed", "-Wno-deprecated")
# A vector access that a GPU would refuse traps; without the run-time library of the sanitizer.
TRAP = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
POINTER, INT64, INT, UINT64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint64


def compiler():
    """The C++ compiler's path, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


class OnHost:
    """tally and elect with the signatures of the ops; compiled into ``directory`` once."""

    def __init__(self, directory):
        library = Path(directory) / "tally_on_host.so"
        if not library.exists():
            source = HERE / "tally_on_host.cpp"
            if compiler() is None:
                pytest.skip("no C++ compiler")
            command = [compiler(), *FLAGS, *TRAP, "-shared", f"-I{HERE.parents[1] / 'csrc'}"]
            subprocess.run([*command, "-o", str(library), str(source)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.lion_count.argtypes = (
            *(POINTER, INT64, INT64, INT64, INT, INT, ctypes.c_uint32, POINTER),
            *(INT64, INT64, INT, UINT64, INT64, POINTER),
        )

    @property
    def launches(self):
        """Kernels launched so far."""
        return self._library.lion_launches()

    def tally(self, ballots, tally, scale):
        ops.CHECKS["tally"](ballots, tally, scale)
        self._count(ballots, tally, scale)

    def elect(self, ballots, verdict, scale, first_word, seed, step):
        ops.CHECKS["elect"](ballots, verdict, scale, first_word, seed, step)
        self._count(ballots, verdict, scale, first_word, seed, step)

    def _count(self, ballots, out, scale, first_word=0, seed=0, step=None):
        for planes in (ballots, out):
            assert planes.shape[-1] <= 1 or planes.stride(-1) == 1
        status = self._library.lion_count(
            ballots.data_ptr(),
            *(ballots.stride(0), ballots.stride(1), ballots.shape[0], ballots.shape[1]),
            *(scale.bit_length(), scale, out.data_ptr(), out.stride(0), out.shape[1]),
            *(out.shape[0] == 1, first_word, seed),
            None if step is None else step.data_ptr(),
        )
        assert status == 0, f"launch failed: {status}"
