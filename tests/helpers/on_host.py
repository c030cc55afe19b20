"""The kernels of csrc/cuda/tally.cu, compiled for the host: a back end for tests without a GPU.

Owns the compilation and the calls; the kernels run unchanged under cuda_shim.h.
"""

import ctypes
import os
import shlex
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


class TallyRun(ctypes.Structure):
    """csrc/tally_run.h."""

    _fields_ = (
        *(("ballots", POINTER), ("ballot_stride", INT64), ("plane_stride", INT64)),
        *(("n_ballots", INT64), ("planes_in", INT), ("planes_out", INT)),
        *(("scale", ctypes.c_uint32), ("out", POINTER), ("out_stride", INT64)),
        *(("toss_ties", ctypes.c_bool), ("coin_key", UINT64), ("first_word", UINT64)),
        *(("blanks", POINTER), ("blank_stride", INT64)),
        *(("out_blanks", POINTER), ("out_blank_bytes", INT64), ("weights", POINTER)),
    )


def compiler():
    """The C++ compiler, in one word or several ("ccache g++"), or None."""
    words = shlex.split(os.environ.get("CXX") or "c++")
    return words if shutil.which(words[0]) else None


class OnHost:
    """tally and elect with the signatures of the ops; compiled into ``directory`` once."""

    def __init__(self, directory):
        library = Path(directory) / "tally_on_host.so"
        if not library.exists():
            source = HERE / "tally_on_host.cpp"
            if compiler() is None:
                pytest.skip("no C++ compiler")
            command = [*compiler(), *FLAGS, *TRAP, "-shared", f"-I{HERE.parents[1] / 'csrc'}"]
            subprocess.run([*command, "-o", str(library), str(source)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.lion_count.argtypes = ctypes.POINTER(TallyRun), INT64, INT64, POINTER, INT

    @property
    def launches(self):
        """Kernels launched so far."""
        return self._library.lion_launches()

    def tally(self, ballots, tally, *options, **named):
        ops.CHECKS["tally"](ballots, tally, *options, **named)
        self._count(False, False, ballots, tally, *options, **named)

    def elect(self, ballots, verdict, *options, **named):
        ops.CHECKS["elect"](ballots, verdict, *options, **named)
        self._count(True, verdict.shape[0] == 1, ballots, verdict, *options, **named)

    def _count(
        self,
        is_elect,
        toss_ties,
        ballots,
        out,
        scale,
        first_word,
        seed,
        step,
        blanks=None,
        out_blanks=None,
        weights=None,
    ):
        for planes in (ballots, out):
            assert planes.shape[-1] <= 1 or planes.stride(-1) == 1
        run = TallyRun(
            ballots=ballots.data_ptr(),
            ballot_stride=ballots.stride(0),
            plane_stride=ballots.stride(1),
            n_ballots=ballots.shape[0],
            planes_in=ballots.shape[1],
            planes_out=scale.bit_length(),
            scale=scale,
            out=out.data_ptr(),
            out_stride=out.stride(0),
            toss_ties=toss_ties,
            first_word=first_word,
        )
        if blanks is not None:
            run.blanks, run.blank_stride = blanks.data_ptr(), 4 * blanks.stride(0)
        if out_blanks is not None:
            run.out_blanks, run.out_blank_bytes = out_blanks.data_ptr(), 4 * out_blanks.shape[1]
        if weights is not None:
            run.weights = weights.data_ptr()
        status = self._library.lion_count(
            ctypes.byref(run), out.shape[1], seed, step.data_ptr(), is_elect
        )
        assert status == 0, f"launch failed: {status}"
