"""Lays the tree out in build/installed, so that tests which run there use the lion_kernels that is
installed (`make INSTALLED=1 test`): a folder lion_kernels without __init__.py hides no package.
"""

import runpy
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "installed"
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "__pycache__", "*.so", "*.egg-info")


def complaint() -> str | None:
    """Why this interpreter has no installed package of the tree's version, or None."""
    wanted = runpy.run_path(str(ROOT / "lion_kernels" / "_version.py"))["__version__"]
    found = find_spec("lion_kernels")
    if found is None or found.origin is None:
        return f"lion_kernels is not installed for {sys.executable}"
    if Path(found.origin).resolve().is_relative_to(ROOT / "lion_kernels"):
        return f"{sys.executable} takes lion_kernels from this tree; INSTALLED=1 is for a wheel"
    if (version := metadata.version("lion_kernels")) != wanted:
        return f"lion_kernels {version} is installed for {sys.executable}, and this is {wanted}"
    return None


if __name__ == "__main__":
    if found := complaint():
        sys.exit(found)
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT, COPY, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (COPY / "lion_kernels" / "__init__.py").unlink()
