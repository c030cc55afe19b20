"""setup.py finds torch and the CUDA toolkit. The build itself is `make built`'s."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What setup.py does, but for building: what it would build, and the toolkit.
PROGRAM = """
import runpy, setuptools
options = {}
setuptools.setup = options.update
found = runpy.run_path("setup.py")
print(*(extension.name for extension in options["ext_modules"]), found["toolkit"]())
"""


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)


def run(nvcc=None, **more):
    """setup.py where this nvcc is the one on PATH."""
    said = ("CUDA_HOME", "CUDA_PATH", "LION_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST")
    env = {k: v for k, v in os.environ.items() if k not in said} | more
    if nvcc is not None:
        env["PATH"] = f"{nvcc.parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def found(nvcc, **more):
    """The names of what is built, and the toolkit."""
    done = run(nvcc, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def toolkit_at(folder, version=13000):
    script(folder / "bin" / "nvcc", f'echo "#$ TOP={folder}/bin/.." >&2')
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}\n")
    return folder


def test_a_wrapper_script_is_asked_for_the_toolkit_behind_it(tmp_path):
    toolkit, wrapper = toolkit_at(tmp_path / "cuda-13"), tmp_path / "bin" / "nvcc"
    script(wrapper, f'exec {toolkit}/bin/nvcc "$@"')
    assert found(wrapper)[-1] == str(toolkit)
    assert found(wrapper, CUDA_HOME="/elsewhere")[-1] == "/elsewhere"  # the user's word counts


def test_a_wrapper_of_the_nvcc_that_is_here(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or shutil.which("c++") is None:
        pytest.skip("no nvcc on PATH or in /usr/local/cuda, or no compiler, which it needs")
    script(tmp_path / "bin" / "nvcc", f'exec {nvcc} "$@"')
    home = found(tmp_path / "bin" / "nvcc")[-1]
    assert (Path(home) / "include" / "cuda_runtime.h").is_file()


def test_cuda_is_built_where_it_is_wanted(tmp_path):
    """Beside any torch: no GPU is needed, and no CUDA in torch."""
    nvcc = toolkit_at(tmp_path / "cuda") / "bin" / "nvcc"
    both = ["lion_kernels._C", "lion_kernels._cuda"]
    assert found(nvcc, LION_KERNELS_CUDA="1")[:-1] == both
    assert found(nvcc, LION_KERNELS_CUDA="0")[:-1] == both[:1]
    assert found(nvcc)[:-1] == (both if torch.version.cuda else both[:1])


def test_what_is_missing_is_named(tmp_path):
    script(tmp_path / "nvcc", "exit 1")
    for more, message in (
        ({"LION_KERNELS_CUDA": "1"}, "LION_KERNELS_CUDA=1, but CUDA cannot be built"),
        ({"LION_KERNELS_CUDA": "yes"}, "LION_KERNELS_CUDA must be 0 or 1, got 'yes'"),
    ):
        done = run(tmp_path / "nvcc", **more)
        assert done.returncode != 0 and message in done.stderr
