"""The package imported from another folder, under another name, with its ops in another namespace,
beside the first and in one process: two versions do not disturb each other. Bit-exact."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lion_kernels
from common import bits_equal, generator
from lion_kernels import native

PACKAGE = Path(lion_kernels.__file__).parent
NAME, NAMESPACE = "another_lion", "_lion_kernels_abc"


def copy(folder, name, namespace):
    """The package, with its compiled libraries, as ``name`` in ``folder``."""
    ignored = shutil.ignore_patterns("__pycache__")
    package = Path(shutil.copytree(PACKAGE, folder / name, ignore=ignored))
    says = package / "_namespace.py"
    says.write_text(says.read_text().replace('"lion_kernels"', f'"{namespace}"'))
    return package


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    folder = tmp_path_factory.mktemp("another")
    copy(folder, NAME, NAMESPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module(NAME)


def stepped(package):
    """Parameters and momenta after steps of the package's Lion."""
    gen = generator(0)
    params = [torch.randn(n, generator=gen).bfloat16() for n in (1, 33, 5000)]
    opt = package.Lion(params, lr=0.01, weight_decay=0.1, rounding="stochastic")
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).bfloat16()
        opt.step()
    return [*params, *(opt.state[p]["exp_avg"] for p in params)]


def test_both_step_in_one_process(another):
    first, second, again = stepped(lion_kernels), stepped(another), stepped(lion_kernels)
    for a, b, c in zip(first, second, again, strict=True):
        assert bits_equal(a, b)
        assert bits_equal(a, c)


def test_each_has_ops_and_a_library_of_its_own(another):
    theirs = importlib.import_module(f"{NAME}.native")
    assert theirs._C.__file__ != native._C.__file__
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped(another)
    called = {event.name for event in profile.events()}
    assert f"{NAMESPACE}::lion_step" in called
    assert "lion_kernels::lion_step" not in called
    for name in importlib.import_module(f"{NAME}.ops").SCHEMAS:
        for device in ("CPU", "CUDA"):
            op = f"{NAMESPACE}::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, device), (op, device)


OTHER_OPS = """
import torch, another_lion
from another_lion import native

op = f"{native.NAMESPACE}::lion_step"
assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")
try:
    another_lion.Lion([torch.nn.Parameter(torch.ones(3))])
except RuntimeError as error:
    print(error)
"""
# Beside a torch with CUDA, or one that says so.
UNUSED_CUDA = """
import torch
torch.version.cuda = "13.0"
import another_lion
from another_lion import kernels

assert another_lion.build_info()["cuda"] is False
opt = another_lion.Lion([torch.nn.Parameter(torch.ones(3))], lr=0.5)
opt.param_groups[0]["params"][0].grad = torch.ones(3)
opt.step()
try:
    kernels.require(vote=True)
except RuntimeError as error:
    print(error)
"""


def printed(program, folder):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_library_of_other_ops_is_not_used(tmp_path):
    """As after `git pull`, where nothing was built again: it would misread what it is given."""
    file = copy(tmp_path, NAME, NAMESPACE) / "ops.py"
    text, last = file.read_text(), "bool uniform=False) -> ()"
    assert last in text
    file.write_text(text.replace(last, "bool uniform=False, int more=0) -> ()"))
    said = printed(OTHER_OPS, tmp_path)
    assert "_C." in said and "was built from another source" in said and "build it again" in said


@pytest.mark.parametrize("is_library", [False, True])
def test_a_cuda_part_that_does_not_fit_ends_no_import(tmp_path, is_library):
    """Such as one for another machine, or, of the same source no longer, a library of anything."""
    pytest.importorskip("triton")
    package = copy(tmp_path, NAME, NAMESPACE)
    (package / "_cuda.so").unlink(missing_ok=True)
    content = Path(native._C.__file__).read_bytes() if is_library else b"of another machine"
    (package / "_cuda.so").write_bytes(content)
    said = printed(UNUSED_CUDA, tmp_path)
    assert f"{package}/_cuda.so" in said
    assert ("was built from another source" if is_library else "cannot be loaded: ") in said


def test_a_copy_loads_nothing_of_the_first(tmp_path):
    copy(tmp_path, NAME, NAMESPACE)
    code = f"import sys, {NAME}.conformance; print(*sys.modules, sep=chr(10))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert f"{NAME}.lion" in loaded
    assert [name for name in loaded if name.startswith("lion_kernels")] == []


def test_one_namespace_is_for_one_copy(tmp_path, monkeypatch):
    """The second is refused, and leaves the ops of the first as they are."""
    copy(tmp_path, "a_second_lion", "lion_kernels")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"another lion_kernels .* torch\.ops\.lion_kernels"):
        importlib.import_module("a_second_lion")
    stepped(lion_kernels)


def test_a_library_registers_once_in_a_namespace():
    with pytest.raises(RuntimeError, match=r"torch\.ops\.lion_kernels for CPU tensors already"):
        native._C.register_ops("lion_kernels")


def test_no_module_imports_the_package_by_its_name():
    """As text for importlib neither."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            assert not [name for name in names if name.split(".")[0] == "lion_kernels"], path
