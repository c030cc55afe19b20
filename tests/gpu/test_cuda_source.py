"""The CUDA sources without a GPU: they compile, and the kernels are what cuda/tally.cu says.

Needs nvcc. One compilation of csrc/cuda/tally.cu for three architectures: about 15 s on two cores;
the torch side is only parsed, about 15 s more. The layouts that choose between vectors and words
are run on the host (on_host.py), bit-exact.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.hipify.cuda_to_hip_mappings import CUDA_TO_HIP_MAPPINGS

from common import generator, step_of
from lion_kernels import reference
from on_host import OnHost, compiler

CSRC = Path(__file__).parents[2] / "csrc"
ARCHS = (80, 90, 100)
N_KERNELS = 16  # tally and elect, words of 32 and 128 bits, sums of 2, 4, 7 and 16 planes
# Registers a thread, so that an SM of 65,536 holds 4, 3 and 2 blocks of 256 threads.
MAX_REGISTERS = {2: 64, 4: 64, 7: 80, 16: 128}
KERNEL = re.compile(r"count_kernel\w*?(Tally|Elect)E(?:\w*?(Words4)E|j)Li(\d+)E")

pytestmark = pytest.mark.timeout(600)


def kernel(mangled):
    """(op, bits of a word, planes of the sum)."""
    op, vector, planes = KERNEL.search(mangled).groups()
    return op, 128 if vector else 32, int(planes)


def tool(name):
    """A program of the CUDA toolkit (Triton brings some of them), or None."""
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    folders += [Path("/usr/local/cuda/bin")]
    folders += [Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(directory, log of ptxas, architectures): tally.cu compiled, intermediate files kept."""
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    if compiler() is None:
        pytest.skip("no C++ compiler, which nvcc needs")
    known = run(nvcc, "--list-gpu-arch").split()
    archs = [arch for arch in ARCHS if f"compute_{arch}" in known]
    assert archs, f"nvcc knows only {known}"
    folder = tmp_path_factory.mktemp("cuda")
    log = run(
        *(nvcc, "-std=c++17", "-O3", "-lineinfo", "-Werror=all-warnings", "-Xptxas", "-v"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        *("--threads", "2", "--keep", "--keep-dir", folder, f"-I{CSRC}"),
        *("-c", CSRC / "cuda/tally.cu", "-o", folder / "tally.o"),
    )
    return folder, log, archs


def test_no_local_memory(built):
    """No stack, no spills, and registers that leave room for several blocks."""
    _, log, archs = built
    entries = re.findall(
        r"entry function '(\S+)' for 'sm_(\d+)'(.*?)Used (\d+) registers", log, re.DOTALL
    )
    table = {}
    for name, arch, properties, registers in entries:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in properties, name
        table.setdefault(kernel(name), {})[int(arch)] = int(registers)
    assert len(table) == N_KERNELS
    print("\nregisters  " + "  ".join(f"sm_{arch}" for arch in archs))
    for (op, bits, planes), row in sorted(table.items()):
        print(f"{op:5} {bits:3} bits {planes:2} planes  {row}")
        assert sorted(row) == archs
        assert max(row.values()) <= MAX_REGISTERS[planes], (op, bits, planes, row)


def test_vectors_are_loaded_and_stored_whole(built):
    folder, _, archs = built
    for arch in archs:
        bodies = (folder / f"tally.compute_{arch}.ptx").read_text().split(".entry ")[1:]
        assert len(bodies) == N_KERNELS
        for body in bodies:
            _, bits, planes = kernel(body.split("(")[0])
            whole = re.findall(r"\bld\.global\.(?:nc\.)?v4\.\w*32\b", body)
            pieces = re.findall(r"\b(?:ld|st)\.global\.(?:nc\.)?\w*32\b", body)
            if bits == 128:
                assert len(whole) >= 8 * planes and not pieces
            else:
                assert len(pieces) >= 8 * planes and not whole


def test_eight_loads_are_in_flight(built):
    """The machine code issues the loads of eight ballots before the first of them is counted."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    folder, _, archs = built
    functions = run(cuobjdump, "-sass", folder / "tally.o").split("Function : ")[1:]
    assert len(functions) == N_KERNELS * len(archs)
    for function in functions:
        name, body = function.split("\n", 1)
        _, bits, planes = kernel(name)
        load = "LDG.E.128" if bits == 128 else "LDG.E"
        opcodes = re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?(LDG[.\w]*|LOP3)", body, re.M)
        runs = "".join("L" if opcode.startswith(load) else "." for opcode in opcodes).split(".")
        assert sum(len(r) >= 8 for r in runs) >= planes, (name, runs)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return OnHost(tmp_path_factory.mktemp("on_host"))


def inside(shape, gap, offset):
    """A (..., words) view at `offset` words of a larger buffer, `gap` words behind each row of its
    first dimension; and the buffer."""
    row = shape[1:].numel() + gap
    buffer = torch.full((offset + shape[0] * row + 4,), -7, dtype=torch.int32)
    strides = (row, shape[2], 1) if len(shape) == 3 else (row, 1)
    return buffer.as_strided(shape, strides, offset), buffer


def untouched(view, buffer):
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return bool((buffer[outside] == -7).all())


# Offsets and gaps: all vectors but a rest (the gap fills up ragged rows), a base, a stride of the
# ballots or of the result that is no multiple of 16 bytes.
@pytest.mark.parametrize("offset, out_offset", [(0, 0), (4, 4), (1, 0), (0, 2)])
@pytest.mark.parametrize("align, out_align", [(4, 4), (2, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("n, planes", [(1, 5), (3, 1), (8, 1), (9, 2), (16, 3), (17, 1), (64, 2)])
def test_ragged_and_unaligned_words(on_host, n, planes, align, out_align, offset, out_offset):
    top = (1 << planes) - 1
    for n_words in (0, 1, 3, 4, 5, 6, 8, 257, 1025):
        shape = torch.Size((n, planes, n_words))
        ballots, _ = inside(shape, -shape[1:].numel() % align, offset)
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator(n_words))
        ballots.copy_(bits.to(torch.int32))
        for scale in (n * top, n * top + 1):
            calls = [("tally", scale.bit_length(), (scale,))]
            for k in (1, 2) if scale % 2 == 0 else (1,):
                calls.append(("elect", k, (scale, 2**40 + 3, -5, step_of(n))))
            for op, k, arguments in calls:
                shape = torch.Size((k, n_words))
                out, buffer = inside(shape, -n_words % out_align, out_offset)
                want = torch.empty_like(out)
                getattr(on_host, op)(ballots, out, *arguments)
                getattr(reference, op)(ballots, want, *arguments)
                assert torch.equal(out, want), (op, k, n_words, scale)
                assert untouched(out, buffer), (op, k, n_words, scale)


def test_one_launch_where_vectors_suffice(on_host):
    """None without words, one for whole vectors or words alone, two for vectors and a rest."""
    for n_words, launches in ((0, 0), (3, 1), (4, 1), (1024, 1), (1027, 2)):
        ballots, _ = inside(torch.Size((3, 1, n_words)), -n_words % 4, 0)
        tally, _ = inside(torch.Size((2, n_words)), -n_words % 4, 0)
        before = on_host.launches
        on_host.tally(ballots, tally, 3)
        assert on_host.launches - before == launches, n_words


def test_hipify_can_translate():
    """What the kernels' source takes from CUDA: qualifiers, which HIP has too, and what torch's
    hipify knows; the rest stands where HIP is not. Nothing here has been built for ROCm."""
    known = {word for words in CUDA_TO_HIP_MAPPINGS for word in words}
    known |= {"__device__", "__host__", "__global__", "__forceinline__", "__launch_bounds__"}
    known |= {"__HIP_PLATFORM_AMD__", "__attribute__", "cuda_runtime"}  # the header has a prefix
    for name in ("cuda/tally.cu", "cuda/tally.h", "tally_run.h", "bitplanes.h", "coin.h"):
        text = re.sub(r"//.*", "", (CSRC / name).read_text())
        text = re.sub(
            r"#if defined\(__HIP_PLATFORM_AMD__\)(.*?)#else.*?#endif", r"\1", text, flags=re.S
        )
        used = set(re.findall(r"\b(?:cuda|__)\w+", text))
        assert not {word for word in used - known if not word.startswith("__builtin")}, name
        assert not re.search(r"\basm\b|warpSize|_sync\(", text), name


def test_torch_side_parses():
    """cuda/tally_op.cpp against the headers of this torch, which may be a build without CUDA."""
    nvcc = Path(tool("nvcc") or "")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", nvcc.parent.parent]
    includes = [home for home in map(Path, homes) if (home / "include/cuda_runtime.h").exists()]
    if not includes:
        pytest.skip("no cuda_runtime.h in CUDA_HOME, /usr/local/cuda or beside nvcc")
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler")
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    folders.append(str(includes[0] / "include"))
    run(
        *(cpp_extension.get_cxx_compiler(), "-std=c++20", "-fsyntax-only"),
        *("-Wall", "-Wextra", "-Werror"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
        *(f"-isystem{folder}" for folder in folders),
        *(f"-I{CSRC}", CSRC / "cuda/tally_op.cpp"),
    )
