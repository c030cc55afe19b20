"""Every header of csrc compiles alone, and twice: none needs what its includer had before it.

About 50 s on two cores, half of it for the five that include torch's tensors.
"""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from on_host import compiler

CSRC = Path(__file__).parents[2] / "csrc"
# Those of cuda/ need the CUDA runtime: test_cuda_source.py compiles them.
HEADERS = {str(path.relative_to(CSRC)) for path in CSRC.rglob("*.h")} - {"cuda/tally.h"}
# The only one whose text differs, and the one that includes all others.
OF_A_LEVEL = ("simd/vec.h", "simd/kernels.h")
CASES = [(name, "") for name in sorted(HEADERS)]
CASES += [(name, f"LION_SIMD_{level}") for name in OF_A_LEVEL for level in ("AVX2", "AVX512")]


@pytest.mark.parametrize("header, level", CASES)
def test_alone(header, level):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    command = [*compiler(), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-psabi", f"-I{CSRC}"]
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command += [f"-isystem{folder}" for folder in folders]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-D{level}"] if level else []
    text = f'#include "{header}"\n' * 2
    done = subprocess.run([*command, "-xc++", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
