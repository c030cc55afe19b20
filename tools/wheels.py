"""Makes what a release consists of, in dist/: the source distribution, and from it a wheel for the
interpreter in use (`make wheel`). Given wheels, it builds nothing and audits these.

auditwheel says which systems a wheel is for; torch's own libraries stay outside. torch-abi-audit
has to find every library stable, and content with the oldest torch that the wheel asks for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheel"
# `import torch` has loaded these before ours.
OF_TORCH = ("libtorch*.so", "libc10*.so")
# What native.py looks for.
OURS = re.compile(r"(_C\.[^/]+|_cuda)\.so")
# The programs beside the interpreter come first: auditwheel takes the patchelf that it finds.
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def check_tools(builds: bool) -> None:
    modules = [name for name in ("build", "auditwheel") if builds and find_spec(name) is None]
    programs = ("patchelf", "torch-abi-audit") if builds else ("torch-abi-audit",)
    missing = modules + [name for name in programs if shutil.which(name, path=ENV["PATH"]) is None]
    if missing:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}: install what the extra release in "
            "pyproject.toml names (torch-abi-audit needs Python 3.11; any one on PATH will do)"
        )


def run(*command: object) -> None:
    """Into a log, of which the end is shown where the command fails."""
    words = [str(word) for word in command]
    with (WORK / "log").open("a+") as log:
        done = subprocess.run(words, cwd=ROOT, env=ENV, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            log.seek(0)
            lines = log.read().splitlines()
            sys.exit("\n".join([*lines[-30:], f"failed: {' '.join(words)} ({log.name})"]))


def build() -> Path:
    """The wheel, built from the source distribution; both are in dist/ then."""
    if "LION_KERNELS_CUDA" not in ENV:
        toolkit = shutil.which("nvcc") or ENV.get("CUDA_HOME") or ENV.get("CUDA_PATH")
        ENV["LION_KERNELS_CUDA"] = "1" if toolkit else "0"
    cuda = "with" if ENV["LION_KERNELS_CUDA"] == "1" else "without"
    print(f"building a wheel {cuda} CUDA (two minutes on two cores) ...", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", WORK)
    (source,), (wheel,) = WORK.glob("*.tar.gz"), WORK.glob("*.whl")
    outside = [word for name in OF_TORCH for word in ("--exclude", name)]
    repaired = WORK / "repaired"
    run(sys.executable, "-m", "auditwheel", "repair", *outside, "--wheel-dir", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    shutil.copy(source, DIST)
    return Path(shutil.copy(wheel, DIST))


def report_on(wheel: Path) -> tuple[dict, str]:
    """What torch-abi-audit says of a wheel's package, and the oldest torch that it asks for."""
    program = shutil.which("torch-abi-audit", path=ENV["PATH"])
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
        (metadata,) = Path(folder).glob("*.dist-info/METADATA")
        oldest = re.search(r"^Requires-Dist: torch>=([\d.]+)", metadata.read_text(), re.M)
        command = [program, "--json", f"{folder}/lion_kernels"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said), oldest[1]


def complaints(report: dict, oldest_torch: str) -> list[str]:
    """What in a report speaks against one wheel for every torch since ``oldest_torch``."""
    libraries = {Path(x["path"]).name: x for x in report["extensions"] + report["bundled_libs"]}
    found = [] if any(name.startswith("_C.") for name in libraries) else ["there is no _C"]
    for name, library in libraries.items():
        torch = library["torch"]
        unstable = torch["unstable_symbols"] + torch["unknown_shim_symbols"]
        if not OURS.fullmatch(name):
            found.append(f"nothing loads {name}")
        if unstable or not torch["stable"]:
            symbols = ", ".join(unstable) or library["error"] or "nothing of torch"
            found.append(f"{name} is not stable: it uses {symbols}")
        elif numbers(torch["min_torch_version"]) > numbers(oldest_torch):
            symbols = ", ".join(torch["version_defining_symbols"])
            found.append(f"{name} needs torch {torch['min_torch_version']}: it uses {symbols}")
    return found


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:2]]


def audit(wheel: Path) -> bool:
    """Prints the verdict on a wheel; whether it is good."""
    report, oldest_torch = report_on(wheel)
    found = complaints(report, oldest_torch)
    for library in report["extensions"] + report["bundled_libs"]:
        torch = library["torch"]
        counts = torch["stable_shim_count"], len(torch["unstable_symbols"])
        print(f"{Path(library['path']).name}: %d stable symbols of torch, %d others" % counts)
    print(f"{wheel.name}: {'; '.join(found) or f'stable, for every torch since {oldest_torch}'}")
    return not found


if __name__ == "__main__":
    check_tools(builds=not sys.argv[1:])
    wheels = [Path(name) for name in sys.argv[1:]] or [build()]
    sys.exit(not all([audit(wheel) for wheel in wheels]))
