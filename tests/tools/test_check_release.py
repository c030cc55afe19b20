"""What stops a release: a tag that is not the version, a changelog without its section, a library
that does not stand on torch's stable ABI.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import check_release
import wheels

ROOT = Path(__file__).parents[2]
CHANGELOG = """# Changelog

## 0.2.0 (2026-12-01)

### Added

* A thing.

## 0.1.10

* Another.

## 0.1.0 (2026-11-30)

### Added

## 0.0.1
"""


@pytest.mark.parametrize("version", ["0.2.0", "0.1.10"])
def test_a_tag_of_the_version_with_its_section_is_one(version):
    assert check_release.complaint(f"v{version}", version, CHANGELOG) is None


@pytest.mark.parametrize("tag", ["0.2.0", "v0.2.1", "v0.2", "v0.2.0rc1", ""])
def test_another_tag_is_none(tag):
    assert "the tag must be v0.2.0" in check_release.complaint(tag, "0.2.0", CHANGELOG)


@pytest.mark.parametrize("version", ["0.3.0", "0.1.1", "0.2", "0x2.0"])
def test_a_section_must_be_there(version):
    assert "no section" in check_release.complaint(f"v{version}", version, CHANGELOG)


@pytest.mark.parametrize("version", ["0.1.0", "0.0.1"])
def test_a_section_must_say_something(version):
    """Headings alone say nothing."""
    assert "is empty" in check_release.complaint(f"v{version}", version, CHANGELOG)


def test_the_tree_is_asked():
    command = [sys.executable, "tools/check_release.py", "v0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    version = (ROOT / "lion_kernels" / "_version.py").read_text().split('"')[-2]
    assert done.returncode == 1 and f"the tag must be v{version}" in done.stderr


def test_workflows_install_the_tools_that_are_pinned():
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^release = \[\n(.*?)^\]", text, re.M | re.S)
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)', extra))
    assert {"build", "auditwheel", "torch-abi-audit"} <= {*pinned}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for name, version in re.findall(r"(?<=\s)([\w-]+)==([\d.]+)", path.read_text()):
            assert pinned.get(name, version) == version, (path.name, name)


def library(name, **torch):
    """A library in torch-abi-audit's report."""
    found = {
        "stable": True, "unstable_symbols": [], "unknown_shim_symbols": [],
        "min_torch_version": "2.10.0", "version_defining_symbols": ["torch_list_size"],
    }  # fmt: skip
    return {"path": f"/x/lion_kernels/{name}", "error": None, "torch": found | torch}


EXTENSION = "_C.cpython-311-x86_64-linux-gnu.so"


def complaints(*bundled, **torch):
    extensions = [library(EXTENSION, **torch)]
    return wheels.complaints({"extensions": extensions, "bundled_libs": list(bundled)}, "2.11")


def test_stable_libraries_are_good():
    assert complaints() == []
    assert complaints(library("_cuda.so"), min_torch_version="2.11.0") == []


@pytest.mark.parametrize(
    "wrong, torch",
    [
        ("at::empty", {"stable": False, "unstable_symbols": ["at::empty"]}),
        ("torch_new", {"unknown_shim_symbols": ["torch_new"]}),
        ("nothing of torch", {"stable": False, "min_torch_version": None}),
        ("needs torch 2.12.0: it uses torch_list_size", {"min_torch_version": "2.12.0"}),
    ],
)
def test_what_is_wrong_is_named(wrong, torch):
    (said,) = complaints(**torch)
    assert EXTENSION in said and wrong in said
    (said,) = complaints(library("_cuda.so", **torch))
    assert "_cuda.so" in said and wrong in said


def test_libraries_have_the_names_that_are_looked_for():
    (said,) = complaints(library("_cuda.cpython-311-x86_64-linux-gnu.so"))
    assert "nothing loads _cuda.cpython-311" in said
    assert wheels.complaints({"extensions": [], "bundled_libs": []}, "2.11") == ["there is no _C"]
