"""What tools/hub.py makes for the hub's builder, as far as it can be checked without the builder:
build.toml names every file, and the package and its module work as the builder lays them out."""

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import hub
from on_host import compiler

ROOT = Path(__file__).parents[2]
NAME = "_lion_kernels_cpu_abc"
# As the builder writes it into the package.
OPS = f"""
import torch
from . import {NAME}

ops = torch.ops.{NAME}


def add_op_namespace_prefix(op_name):
    return f"{NAME}::{{op_name}}"
"""
# Steps of both packages on every SIMD level, bit for bit, and what the module refuses.
PROGRAM = f"""
import sys, torch
sys.path.insert(0, sys.argv[1])
import hubbed, lion_kernels

def stepped(package):
    gen = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=gen).bfloat16() for n in (1, 33, 5000)]
    params.append(torch.randn(30, 20, generator=gen))
    opt = package.Lion(params, lr=0.01, weight_decay=0.1, rounding="stochastic")
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        params[-1].grad = torch.randn(20, 30, generator=gen).t()  # in another layout
        opt.step()
    return [*params, *(opt.state[p]["exp_avg"] for p in params)]

for level in hubbed.build_info()["simd_levels"]:
    for package in (hubbed, lion_kernels):
        package.native._C.set_simd_level(level)
        assert package.build_info()["simd"] == level
    for a, b in zip(stepped(hubbed), stepped(lion_kernels), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), level
assert hubbed.native._C.__name__.split(".")[-1] == "{NAME}"

def of_cpu(package):
    info = package.build_info()
    del info["cuda"], info["cuda_archs"]
    return info

assert of_cpu(hubbed) == of_cpu(lion_kernels)
assert hubbed.native._C.schemas_digest == lion_kernels.native._C.schemas_digest

def raised(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    raise SystemExit("nothing raised")

ours, theirs = lion_kernels.native._C, hubbed.native._C
assert raised(ours.set_simd_level, "no") == raised(theirs.set_simd_level, "no")
sparse = [torch.zeros(3).to_sparse()], []
assert raised(ours.identity, *sparse) == raised(theirs.identity, *sparse)
assert raised(theirs.register_ops, "{NAME}")[0] is RuntimeError
p, g = torch.zeros(4, 3), torch.zeros(3, 4).t()
for grads in ([g], [None], [torch.zeros(5)]):
    assert ours.identity([p, None], grads) == theirs.identity([p, None], grads)
    known = ours.identity([p], [])[1]
    args = known, [p], grads
    assert ours.odd_gradients(*args) == theirs.odd_gradients(*args)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "project"
    hub.assemble(folder)
    return folder


def test_build_toml_names_every_source_once(project):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    build = tomllib.loads((project / "build.toml").read_text())
    named = [*build["torch"]["src"], *build["kernel"]["tally"]["src"]]
    there = [str(p.relative_to(project)) for p in (project / "csrc").rglob("*") if p.is_file()]
    assert sorted(named) == sorted(there)
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert ours ^ {*there} == {"csrc/bindings.cpp", "csrc/hub/about.cpp"}
    assert all(Path(project, folder).is_dir() for folder in build["torch"]["include"])


def test_the_package_is_there_and_needs_nothing_that_the_hub_forbids(project):
    """Only Python's own modules, torch, and Triton, which torch brings; what a function imports
    when it is asked for has an error of its own."""
    package = project / "torch-ext" / "lion_kernels"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    ours = ROOT.glob("lion_kernels/**/*.py")
    assert files == {path.relative_to(ROOT / "lion_kernels") for path in ours}
    known = {*sys.stdlib_module_names, "torch", "triton"}
    for path in files:
        for node in ast.parse((package / path).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= known, path


def compiled(project, folder):
    """The module, in ``folder``. What calls Python or is the hub's is compiled, as the builder
    compiles it; the rest is linked from the tree's own build."""
    of_this_python = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built, csrc = ROOT / "build" / of_this_python / "csrc", project / "csrc"
    if compiler() is None or not built.is_dir():
        pytest.skip(f"no C++ compiler, or no build in build/{of_this_python}")
    include = Path(torch.__file__).parent / "include"
    command = [*compiler(), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += ["-Werror", "-Wno-psabi", "-ffp-contract=off", "-DPy_LIMITED_API=0x03090000"]
    command += [f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DCPU_KERNEL", f"-I{csrc}", f"-isystem{include}"]
    command += [f"-isystem{sysconfig.get_path('include')}"]
    names = ("hub/module.cpp", "hub/about.cpp", "identity.cpp", "cpu/ops.cpp")
    of_the_hub = {csrc / name for name in names}
    objects = []
    for source in sorted(path for path in csrc.rglob("*.cpp") if path.parent.name != "cuda"):
        objects.append(built / f"{source.relative_to(csrc)}.o")
        if source in of_the_hub:
            objects[-1] = folder / f"{source.stem}.o"
            done = subprocess.run(
                [*command, "-c", source, "-o", objects[-1]], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    library = folder / f"{NAME}.abi3.so"
    link = [*compiler(), "-shared", *objects, "-o", library, f"-L{include.parent / 'lib'}"]
    subprocess.run([*link, "-Wl,--no-as-needed", "-ltorch_cpu"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_module_steps_as_the_normal_build(project, tmp_path):
    package = project / "torch-ext" / "lion_kernels"
    library = compiled(project, tmp_path)
    (tmp_path / "hubbed").symlink_to(package)  # under yet another name
    (package / library.name).write_bytes(library.read_bytes())
    (package / "_ops.py").write_text(OPS)
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
