"""Assembles what the kernel-builder of the Hugging Face hub takes, in build/hub: a build.toml, the
package in torch-ext, and csrc with a module in Python's limited API. Compiles nothing.

    python tools/hub.py

The builder compiles all into one module with a name of its own, which is also the namespace of the
ops, and writes both into a file _ops.py beside the package's modules.
"""

import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# By the hub's convention, version 0 is not yet for production. Without -ffp-contract=off the CPU's
# bits would be others. GPUs are those of the builder's own list.
BUILD = """\
[general]
name = "lion-kernels"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch]
stable-abi = "2.11"
include = ["csrc"]
cxx-flags = ["-O3", "-fvisibility=hidden", "-ffp-contract=off"]
src = {shared}

[kernel.tally]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
src = {cuda}
"""

FLAKE = """\
{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

NAMESPACE = '''\
"""Where this copy of the package stands: as the hub's builder says in _ops.py."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
MODULE = f".{NAMESPACE}"  # relative to the package
'''


def listed(paths: list[str]) -> str:
    return "[\n" + "".join(f'  "{path}",\n' for path in paths) + "]"


def assemble(folder: Path) -> None:
    """Writes the builder's input into ``folder``, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    package, csrc = folder / "torch-ext" / "lion_kernels", folder / "csrc"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyi", "py.typed")
    shutil.copytree(ROOT / "lion_kernels", package, ignore=ignored)
    (package / "_namespace.py").write_text(NAMESPACE)
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("bindings.cpp"))
    # Architectures stand in the metadata.json of the hub's build.
    about = runpy.run_path(str(package / "_about.py"))["definitions"](package, cuda_archs="")
    (csrc / "hub" / "about.cpp").write_text(about)
    # Headers too: the builder sees no file that is not named.
    sources = sorted(str(p.relative_to(folder)) for p in csrc.rglob("*.*"))
    cuda = [path for path in sources if path.startswith("csrc/cuda/")]
    shared = [path for path in sources if path not in cuda]
    (folder / "build.toml").write_text(BUILD.format(shared=listed(shared), cuda=listed(cuda)))
    (folder / "flake.nix").write_text(FLAKE)


if __name__ == "__main__":
    assemble(ROOT / "build" / "hub")
    print("build/hub is what kernel-builder takes: see docs/compatibility.md")
