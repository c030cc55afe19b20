"""setup.py finds the CUDA toolkit. The build itself is `make built`'s."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What setup.py does, but for building: the toolkit that torch would build with, and what it says.
PROGRAM = """
import runpy, os, setuptools
setuptools.setup = lambda **options: None
runpy.run_path("setup.py")
print(os.environ.get("CUDA_HOME"))
"""


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)


def home_found(nvcc, **more):
    """CUDA_HOME as setup.py leaves it, where this nvcc is the one on PATH."""
    said = ("CUDA_HOME", "CUDA_PATH", "LION_KERNELS_CUDA")
    env = {k: v for k, v in os.environ.items() if k not in said}
    env |= {"PATH": f"{nvcc.parent}{os.pathsep}{env['PATH']}"} | more
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_wrapper_script_is_asked_for_the_toolkit_behind_it(tmp_path):
    toolkit, wrapper = tmp_path / "cuda-13", tmp_path / "bin" / "nvcc"
    script(toolkit / "bin" / "nvcc", f'echo "#$ TOP={toolkit}/bin/.." >&2')
    script(wrapper, f'exec {toolkit}/bin/nvcc "$@"')
    assert home_found(wrapper) == str(toolkit)
    assert home_found(wrapper, CUDA_HOME="/elsewhere") == "/elsewhere"  # the user's word counts


def test_a_wrapper_of_the_nvcc_that_is_here(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in /usr/local/cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {nvcc} "$@"')
    home = home_found(tmp_path / "bin" / "nvcc")
    assert (Path(home) / "include" / "cuda_runtime.h").is_file()
