"""setup.py finds torch and the CUDA toolkit, and calls compilers as it is told: here they compile
nothing. The build itself is `make built`'s."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lion_kernels import _about, native, ops

ROOT = Path(__file__).parents[2]
# What setup.py does, but for building: what it would build, and the toolkit.
PROGRAM = """
import runpy, setuptools
options = {}
setuptools.setup = options.update
found = runpy.run_path("setup.py")
print(*(extension.name for extension in options["ext_modules"]), found["toolkit"]())
"""


# A compiler writes down how it was called, and makes what it should.
MAKES = (
    """case " $* " in *" -o "*) ;; *) exit 0;; esac""",
    """echo "$0 $*" >> "$(dirname "$0")/log" """,
    """while [ "$1" != -o ]; do shift; done; : > "$2" """,
)
BUILD = """
import runpy, sys
{before}
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)


def run(nvcc=None, program=PROGRAM, folder=ROOT, **more):
    """setup.py where this nvcc is the one on PATH."""
    said = (
        *("CUDA_HOME", "CUDA_PATH", "LION_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"),
        *("CC", "CXX", "LDFLAGS", "MAX_JOBS", "LION_KERNELS_CXXFLAGS"),
    )
    env = {k: v for k, v in os.environ.items() if k not in said} | more
    if nvcc is not None:
        env["PATH"] = f"{nvcc.parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def found(nvcc, **more):
    """The names of what is built, and the toolkit."""
    done = run(nvcc, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def toolkit_at(folder, version=13000):
    script(folder / "bin" / "nvcc", f'echo "#$ TOP={folder}/bin/.." >&2', *MAKES)
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


@pytest.fixture
def tree(tmp_path):
    """What a build needs of this tree, and a folder ``tools`` of compilers."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    folder = tmp_path / "a tree"
    for name in ("csrc", "lion_kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    script(folder / "tools" / "c++", *MAKES)
    return folder


def build(tree, before="", **more):
    """A build in the tree by its compiler; what the compilers were told, a line a call."""
    more = {"CXX": shlex.quote(str(tree / "tools" / "c++")), "LION_KERNELS_CUDA": "0"} | more
    done = run(program=BUILD.format(before=before), folder=tree, **more)
    assert done.returncode == 0, done.stderr
    logs = [log for log in tree.glob("**/log") if log.is_file()]
    lines = [line for log in logs for line in log.read_text().splitlines()]
    for log in logs:
        log.unlink()
    return lines


def test_what_is_left_of_a_build_with_cuda_goes(tree):
    """A library of an older source would be loaded as if it were of this one."""
    home = str(toolkit_at(tree / "cuda"))
    cuda = {"LION_KERNELS_CUDA": "1", "CUDA_HOME": home}
    assert any("tally.cu" in line for line in build(tree, **cuda))
    assert len([*tree.rglob("_cuda.so")]) == 2  # setup's copy, and the one in the tree
    lines = build(tree, CUDA_HOME=home)
    assert not [*tree.rglob("_cuda.so")] and [*tree.glob("lion_kernels/_C*.so")]
    assert len(lines) == 2, lines  # about.cpp, and the library that has it
    build(tree, **cuda)
    assert (tree / "lion_kernels" / "_cuda.so").is_file()


def test_a_compiler_of_several_words(tree):
    """Each file and each library by all of them; nvcc is told of the compiler alone."""
    script(tree / "tools" / "launcher", 'echo launched >> "$(dirname "$0")/log"', 'exec "$@"')
    words = [str(tree / "tools" / "launcher"), str(tree / "tools" / "c++"), "-DA='b c'"]
    toolkit = toolkit_at(tree / "cuda")
    cuda = {"LION_KERNELS_CUDA": "1", "CUDA_HOME": str(toolkit)}
    lines = build(tree, CXX=shlex.join(words), **cuda)
    calls = [line for line in lines if line.startswith(words[1])]
    assert len(calls) > 10 and lines.count("launched") == len(calls)
    assert all(line.startswith(" ".join(words[1:])) for line in calls)
    (of_nvcc,) = (line for line in lines if line.startswith(f"{toolkit}/bin/nvcc"))
    assert f"-ccbin {words[1]} " in of_nvcc


def test_nvcc_is_told_of_no_compiler_that_nobody_chose(tree):
    script(tree / "other" / "gcc", *MAKES)
    path = f"{tree / 'tools'}{os.pathsep}{os.environ['PATH']}"
    cuda = {"LION_KERNELS_CUDA": "1", "CUDA_HOME": str(toolkit_at(tree / "cuda")), "PATH": path}
    assert not [line for line in build(tree, CXX="", **cuda) if "-ccbin" in line]
    lines = build(tree, CXX="", CC=shlex.quote(str(tree / "other" / "gcc")), **cuda)
    assert [line for line in lines if f"-ccbin {tree / 'other' / 'gcc'} " in line]


def test_max_jobs_is_how_many_run(tree):
    lock = '"$(dirname "$0")/lock"'
    alone = f"mkdir {lock} || exit 1", "sleep 0.1", f"rmdir {lock}"
    script(tree / "tools" / "c++", *alone, *MAKES)
    assert build(tree, MAX_JOBS="1")


@pytest.mark.parametrize("name", ["ninja", "pybind11"])
def test_what_builds_is_named_where_it_is_missing(tree, name):
    program = BUILD.format(before=f"sys.modules[{name!r}] = None")
    done = run(program=program, folder=tree, LION_KERNELS_CUDA="0")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"lacks {name}: pip install {name}" in done.stderr


# As pip isolates a build: what is installed is not on the path.
ISOLATED = """
import sys, sysconfig
import setuptools.command.build_ext
sys.path[:] = [path for path in sys.path if "-packages" not in path]
sys.base_prefix = {base}
get_path = sysconfig.get_path
sysconfig.get_path = lambda name: "/nowhere" if name == "platlib" else get_path(name)
"""


def isolated(tmp_path, base="sys.prefix", **files):
    """setup.py where the user's own folder has a torch of these files, and no other is found."""
    env = {"PYTHONUSERBASE": str(tmp_path), "LION_KERNELS_CUDA": "0"}
    where = "import site; print(site.getusersitepackages())"
    folder = Path(run(program=where, **env).stdout.strip()) / "torch"
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    return run(program=ISOLATED.format(base=base) + PROGRAM, **env)


def test_torch_is_found_where_users_install_it(tmp_path):
    files = {"__init__": "", "version": "debug = False\n__version__ = '2.12.1+cpu'\n"}
    done = isolated(tmp_path, **files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "lion_kernels._C"
    assert "none was found" in isolated(tmp_path, base="'/another'", **files).stderr  # in a venv


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "`pip install --no-build-isolation .` takes the torch that `import torch` finds"),
        ({"__init__": "", "version": "__version__ = '2.9.0'"}, "torch >= 2.11, got 2.9.0"),
        ({"__init__": ""}, "version.py names no version"),
        ({"__init__": "", "version": "git = 'abc'"}, "version.py names no version"),
    ],
)
def test_no_torch_that_fits(tmp_path, files, message):
    done = isolated(tmp_path, **files)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert message in done.stderr


def test_a_library_says_for_which_ops_it_was_built():
    """By the schemas that stand in ops.py: setup.py reads them there, and does not import it."""
    source = Path(ops.__file__).read_text()
    assert _about.schemas_in(source) == ops.SCHEMAS
    assert native._C.schemas_digest == _about.digest_of(ops.SCHEMAS)
    others = {**ops.SCHEMAS, "tally": ops.SCHEMAS["tally"].replace("int seed", "int first")}
    assert _about.digest_of(others) != _about.digest_of(ops.SCHEMAS)


def test_the_library_knows_the_oldest_torch_and_no_other():
    """What its headers call their own version differs with the torch that it is built beside."""
    csrc = ROOT / "csrc"
    assert not [p for p in csrc.rglob("*.*") if "TORCH_ABI_VERSION" in p.read_text()]
