"""Builds lion_kernels._C, the ops of CPU tensors, and with a CUDA toolkit lion_kernels/_cuda.so,
the count of votes on GPUs. Both stand on torch's stable ABI: built once, against the headers of
any torch since 2.11, they serve all of them. Torch is looked up, not imported; no GPU is needed.

LION_KERNELS_CUDA=1 wants the CUDA part, also beside a torch without CUDA; =0 leaves it out; without
either it is built where torch has CUDA and nvcc is there. TORCH_CUDA_ARCH_LIST names the GPUs.
CXX is the C++ compiler, of one word or of several ("ccache g++"); MAX_JOBS says how many run.
"""

import io
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 10):  # noqa: UP036  (pip reads requires-python, this file's user may not)
    sys.exit(f"lion_kernels needs Python 3.10 or newer, got {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "lion_kernels"
# The C functions of torch 2.11, and none that came later.
OLDEST_TORCH, TARGET = (2, 11), "-DTORCH_TARGET_VERSION=0x020b000000000000"
# -ffp-contract=off: the kernels say themselves where a multiply and an add are fused.
CXXFLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
    "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
CXXFLAGS += shlex.split(os.environ.get("LION_KERNELS_CXXFLAGS", ""))  # the last word, as -O1 -g
# -lineinfo names source lines in profiles and changes no instruction.
NVCCFLAGS = [
    "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    "-Wno-deprecated-gpu-targets", "-Werror=all-warnings",
]  # fmt: skip


def torch_folder() -> Path:
    # Pip isolates a build from what is installed, and torch is not to be downloaded for it: the
    # folders where torch mostly is are searched all the same.
    places = [*sys.path, sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:  # a virtual environment has no use of the user's own
        places.append(site.getusersitepackages())
    found = PathFinder.find_spec("torch", places)
    if found is None or found.origin is None:
        sys.exit(
            f"lion_kernels needs torch >= 2.11, and none was found for {sys.executable}. If there "
            "is none: pip install torch==2.13.0 first. Else it was not found from pip's isolated "
            "build: `pip install --no-build-isolation .` takes the torch that `import torch` finds"
        )
    folder = Path(found.origin).parent
    about = folder / "version.py"
    text = about.read_text() if about.is_file() else ""
    version = re.search(r"""^__version__ = ["']((\d+)\.(\d+).*?)["']""", text, re.M)
    if version is None:
        sys.exit(f"lion_kernels needs torch >= 2.11, and {about} names no version of what is there")
    if (int(version[2]), int(version[3])) < OLDEST_TORCH:
        sys.exit(f"lion_kernels needs torch >= 2.11, got {version[1]}")
    return folder


def torch_has_cuda(torch: Path) -> bool:
    return any((torch / "lib").glob("libtorch_cuda.so"))


def toolkit() -> Path:
    """The folder of the CUDA toolkit: CUDA_HOME, or as nvcc says, which may be a wrapper script."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    command = [shutil.which("nvcc") or "true", "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    top = re.search(r"^#\$ TOP=(.+?)\s*$", said.stdout, re.M)
    return Path(os.path.realpath(top.group(1))) if top else Path("none")


def wants_cuda(torch: Path) -> bool:
    wanted = os.environ.get("LION_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"LION_KERNELS_CUDA must be 0 or 1, got {wanted!r}")
    possible = (toolkit() / "include" / "cuda_runtime.h").is_file()
    if wanted == "1" and not possible:
        sys.exit(
            "LION_KERNELS_CUDA=1, but CUDA cannot be built: no include/cuda_runtime.h in the "
            f"toolkit, {toolkit()} (CUDA_HOME, or where nvcc says)"
        )
    return wanted == "1" or (wanted == "auto" and possible and torch_has_cuda(torch))


def architectures() -> str:
    """As TORCH_CUDA_ARCH_LIST has them; PTX serves what comes after the last."""
    header = (toolkit() / "include" / "cuda.h").read_text()
    # CUDA 12.8 is the first that knows sm_100.
    knows_blackwell = int(re.search(r"define CUDA_VERSION (\d+)", header).group(1)) >= 12080
    default = "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or default


def gencode(archs: str) -> list[str]:
    flags = []
    for arch in filter(None, archs.replace(" ", ";").split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def host_compiler() -> list[str]:
    """What nvcc is told of CXX or CC: a compiler alone, as the g++ of "ccache g++"."""
    words = shlex.split(os.environ.get("CXX") or os.environ.get("CC") or "")
    programs = [program for program in map(shutil.which, words) if program is not None]
    return ["-ccbin", programs[-1]] if programs else []


CUDA = "lion_kernels._cuda"


class Ninja(build_ext):
    """Compiles what has changed, in parallel."""

    def run(self) -> None:
        super().run()
        if all(each.name != CUDA for each in self.extensions):  # nor what is left of a build before
            for library in (self.get_ext_fullpath(CUDA), f"{self.build_lib}/lion_kernels/_cuda.so"):
                Path(library).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
        if missing:
            sys.exit(
                f"lion_kernels is built with ninja and pybind11, and {sys.executable} lacks "
                f"{' and '.join(missing)}: pip install {' '.join(missing)}"
            )
        import ninja

        cxx = shlex.split(os.environ.get("CXX") or "c++")
        if shutil.which(cxx[0]) is None:
            sys.exit(
                f"lion_kernels needs a C++ compiler, and {cxx[0]!r} is not there: install g++ or "
                "set CXX"
            )
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.rules(cxx, folder))
        command = [Path(ninja.BIN_DIR) / "ninja", "--quiet", "-C", folder]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            sys.exit("lion_kernels was not built: the compiler's messages stand above")

    def rules(self, cxx: list[str], folder: Path) -> str:
        import pybind11
        from ninja.ninja_syntax import Writer

        torch, cuda = torch_folder(), toolkit()
        archs = architectures() if len(self.extensions) > 1 else ""
        about = folder / "about.cpp"
        text = runpy.run_path(str(PACKAGE / "_about.py"))["definitions"](PACKAGE, archs)
        if not about.exists() or about.read_text() != text:
            about.write_text(text)
        # Torch last: its folder has a pybind11 that it keeps for itself.
        folders = sysconfig.get_paths()["include"], pybind11.get_include(), cuda / "include"
        includes = [f"-I{CSRC}", *(f"-isystem{path}" for path in (*folders, torch / "include"))]
        # USE_CUDA: with what only a torch with CUDA has.
        compile_cxx = [*cxx, *CXXFLAGS, TARGET, "-DUSE_CUDA", *includes]
        nvcc = [f"{cuda}/bin/nvcc", *host_compiler()]
        compile_cu = [*nvcc, *NVCCFLAGS, f"-I{CSRC}", *gencode(archs)]
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        link = [*cxx, "-shared", *ldflags, f"-L{torch / 'lib'}", "-Wl,--no-as-needed"]
        text = io.StringIO()
        writer = Writer(text, width=10_000)
        for rule, command in (("cxx", compile_cxx), ("nvcc", compile_cu)):
            line = f"{shlex.join(command)} -MD -MF $out.d -c $in -o $out"
            writer.rule(rule, line, f"{rule} $in", "$out.d", deps="gcc")
        writer.rule("link", f"{shlex.join(link)} $in -o $out $libraries", "link $out")
        for source in sorted({source for each in self.extensions for source in each.sources}):
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            writer.build(str(folder / f"{source}.o"), rule, str(ROOT / source))
        writer.build(f"{about}.o", "cxx", str(about))
        for extension in self.extensions:
            objects = [str(folder / f"{source}.o") for source in extension.sources]
            objects.append(f"{about}.o")
            libraries = [f"-l{name}" for name in extension.libraries]
            if extension.name == CUDA:  # of a machine's CUDA, only the driver is asked for
                libraries += [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            given = {"libraries": shlex.join(libraries)}
            writer.build(str(library), "link", objects, variables=given)
        return text.getvalue()

    def get_ext_filename(self, name: str) -> str:
        """No suffix of a Python for what knows none."""
        is_cuda = CUDA.endswith(name)  # which comes with and without the package
        return name.replace(".", "/") + ".so" if is_cuda else super().get_ext_filename(name)


def extension(name: str, sources: set[Path], libraries: list[str]) -> Extension:
    paths = sorted(str(path.relative_to(ROOT)) for path in sources)
    return Extension(name, paths, libraries=libraries)


on_cuda = {*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")}
shared = {CSRC / "planes.cpp", CSRC / "stable" / "tensor.cpp"}
on_cpu = {*CSRC.rglob("*.cpp")} - on_cuda - {*CSRC.glob("hub/*.cpp")}
extensions = [extension("lion_kernels._C", on_cpu, ["torch_cpu", "dl"])]
if wants_cuda(torch_folder()):
    # libtorch.so leads to libtorch_cuda.so where torch has CUDA, and is there where it has none.
    extensions.append(extension(CUDA, on_cuda | shared, ["torch", "torch_cpu"]))
setup(ext_modules=extensions, cmdclass={"build_ext": Ninja})
