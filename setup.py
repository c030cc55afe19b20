"""Builds lion_kernels._C: the C++ sources always, CUDA's where torch has CUDA and nvcc exists.

LION_KERNELS_CUDA=1 makes a missing CUDA toolchain an error, =0 leaves CUDA out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
VERSION = re.search('= "(.+)"', (ROOT / "lion_kernels" / "_version.py").read_text()).group(1)
# -ffp-contract=off: the kernels say themselves where a multiply and an add are fused.
FLAGS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", "-Wno-maybe-uninitialized"]
FLAGS += os.environ.get("LION_KERNELS_CXXFLAGS", "").split()  # the last word, as -O1 -g


def toolkit() -> str:
    """The folder of the CUDA toolkit, asked of nvcc, or "": torch takes the folder above the nvcc
    on PATH, which has no headers where that nvcc is a wrapper script."""
    command = [shutil.which("nvcc") or "true", "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    top = re.search(r"^#\$ TOP=(.+?)\s*$", said.stdout, re.M)
    return os.path.realpath(top.group(1)) if top else ""


if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and toolkit():
    os.environ["CUDA_HOME"] = toolkit()  # before torch's cpp_extension, which reads it on import
if sys.version_info < (3, 10):  # noqa: UP036  (pip reads requires-python, this file's user may not)
    sys.exit(f"lion_kernels needs Python 3.10 or newer, got {sys.version.split()[0]}")
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        f"lion_kernels needs torch >= 2.11, and {sys.executable} has none: "
        "pip install torch==2.13.0 (then install lion_kernels with --no-build-isolation)"
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"lion_kernels needs torch >= 2.11, got {torch.__version__}")
cxx = cpp_extension.get_cxx_compiler()
if shutil.which(cxx) is None:
    sys.exit(f"lion_kernels needs a C++ compiler, and {cxx!r} is not there: install g++ or set CXX")


def sources() -> tuple[list[str], list[str]]:
    """C++ sources, and CUDA's: none unless torch has CUDA and nvcc is there; no GPU is needed."""
    wanted = os.environ.get("LION_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"LION_KERNELS_CUDA must be 0 or 1, got {wanted!r}")
    cuda = sorted([*CSRC.glob("cuda/**/*.cu"), *CSRC.glob("cuda/**/*.cpp")])
    cpp = sorted(set(CSRC.rglob("*.cpp")) - set(cuda))
    home = Path(cpp_extension.CUDA_HOME or "none")
    possible = torch.version.cuda and (home / "include" / "cuda_runtime.h").is_file()
    if wanted == "1" and not possible:
        sys.exit(
            f"LION_KERNELS_CUDA=1, but CUDA cannot be built: CUDA of torch: {torch.version.cuda}, "
            f"CUDA_HOME (needs include/cuda_runtime.h): {cpp_extension.CUDA_HOME}"
        )
    if not possible or wanted == "0":
        cuda = []
    return [str(p.relative_to(ROOT)) for p in cpp], [str(p.relative_to(ROOT)) for p in cuda]


cpp, cu = sources()
archs = ""
if cu:
    # CUDA 12.8 is the first that knows sm_100; PTX serves what comes after.
    knows_blackwell = tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8)
    default = "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", default)
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
Extension = cpp_extension.CUDAExtension if cu else cpp_extension.CppExtension

setup(
    ext_modules=[
        Extension(
            "lion_kernels._C",
            cpp + cu,
            include_dirs=[str(CSRC.resolve())],
            depends=sorted(str(path) for path in CSRC.rglob("*.h")),
            define_macros=[
                ("LION_KERNELS_VERSION", f'"{VERSION}"'),
                ("LION_KERNELS_CUDA_ARCHS", f'"{archs}"'),
            ],
            extra_compile_args={
                "cxx": FLAGS,
                # -lineinfo names source lines in profiles and changes no instruction.
                "nvcc": ["-O3", "-lineinfo", "-Wno-deprecated-gpu-targets", "-Werror=all-warnings"],
            },
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
