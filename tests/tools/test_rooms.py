"""What may import what: leaves know leaves alone, optimizers and states know no kernel, nothing
that ships knows the specification, and no circle closes."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import lion_kernels
from lion_kernels import ops, reference

PACKAGE = Path(lion_kernels.__file__).parent
NAMES = "_about", "_namespace", "capture", "coins", "declare", "dense", "int8", "layout", "shards"
LEAVES = {f"lion_kernels.{name}" for name in NAMES}
KERNELS = "lion_kernels.kernels"
REFERENCE = "lion_kernels.reference"


def modules():
    """The path of every module of the package, by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path, known):
    """Which of the ``known`` modules a module imports, also within functions: of a package the
    submodule, where it is one that is named. All imports within the package are relative."""
    folders = ["lion_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            above = folders[: len(folders) - node.level + 1]
            module = ".".join([*above, node.module] if node.module else above)
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= inner & known
            found |= set() if inner <= known else {module}
    return found & known


def graph():
    """Every module of the package, and those that it imports."""
    paths = modules()
    return {name: imported(path, {*paths}) for name, path in paths.items()}


def is_within(module, package):
    return module == package or module.startswith(package + ".")


def test_leaves_import_leaves_alone():
    found = graph()
    assert {name: found[name] - LEAVES for name in LEAVES} == {name: set() for name in LEAVES}


def test_kernels_are_imported_by_kernels_alone():
    """But for the package itself, which has them register their ops."""
    for name, others in graph().items():
        if not is_within(name, KERNELS) and name != "lion_kernels":
            assert not [other for other in others if is_within(other, KERNELS)], name


def test_nothing_imports_the_specification():
    assert [name for name, others in graph().items() if REFERENCE in others] == []


def test_no_circle():
    assert list(TopologicalSorter(graph()).static_order())


def loaded_by(*names):
    """The modules that a fresh process has after it imported ``names``."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules, sep=chr(10))"
    command = [sys.executable, "-c", code]
    root = PACKAGE.parent
    outcome = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return set(outcome.stdout.split())


def test_importing_the_package_loads_no_kernel_and_no_triton():
    loaded = loaded_by("lion_kernels")
    assert "lion_kernels.lion" in loaded
    assert "triton" not in loaded
    assert [name for name in loaded if name.startswith(KERNELS + ".")] == []


def test_launching_and_conformance_load_no_specification():
    loaded = loaded_by("lion_kernels.kernels.launch", "lion_kernels.conformance")
    assert "lion_kernels.kernels.step" in loaded
    assert REFERENCE not in loaded


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_an_op_has_one_list_of_arguments(name):
    """The schema's, the check's and the specification's have the same names and defaults."""
    schema = getattr(torch.ops.lion_kernels, name).default._schema.arguments
    declared = [(a.name, a.default_value if a.has_default_value() else None) for a in schema]
    for function in (getattr(ops, name), ops.CHECKS[name], getattr(reference, name)):
        parameters = inspect.signature(function).parameters.values()
        defaults = [None if p.default is p.empty else p.default for p in parameters]
        assert list(zip([p.name for p in parameters], defaults, strict=True)) == declared


def test_an_op_by_keyword_is_the_op():
    ballots, tally = torch.tensor([[[5]], [[3]]], dtype=torch.int32), torch.empty(2, 1).int()
    step = torch.zeros(1, dtype=torch.int64)
    ops.tally(ballots=ballots, scale=2, tally=tally, step=step, seed=0, first_word=0)
    assert tally.flatten().tolist() == [5 ^ 3, 5 & 3]
    params, grads, momenta = ([torch.ones(3)] for _ in range(3))
    ops.lion_step(
        params, grads, momenta, lr=torch.tensor(0.5), beta1=0.25, beta2=0.5, weight_decay=0.0,
        maximize=True,
    )  # fmt: skip
    assert params[0].tolist() == [1.5] * 3
