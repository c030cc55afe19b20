"""The CUDA sources without a GPU: they compile, and the kernels are what cuda/tally.cu says.

Needs nvcc. One compilation of csrc/cuda/tally.cu for three architectures: about 30 s on two cores;
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
# tally and elect, sums of 2, 4, 7 and 16 planes; words of 32 and 128 bits without blank words, of
# 128 with them, of 32 with weights.
N_KERNELS = 32
# Registers a thread, so that an SM of 65,536 holds 4, 3 and 2 blocks of 256 threads.
MAX_REGISTERS = {
    "Whole": {2: 64, 4: 64, 7: 80, 16: 128},
    "Blank": {2: 80, 4: 80, 7: 128, 16: 128},
    "Weighted": {2: 80, 4: 80, 7: 128, 16: 128},
}
KERNEL = re.compile(
    r"count_kernelI\w*?(Tally|Elect)E\w*?(Whole|Blank|Weighted)E(?:\w*?(Words4)E|j)Li(\d+)E"
)

pytestmark = pytest.mark.timeout(600)


def kernel(mangled):
    """(op, kind of the ballots, bits of a word, planes of the sum)."""
    op, kind, vector, planes = KERNEL.search(mangled).groups()
    return op, kind, 128 if vector else 32, int(planes)


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
    for (op, kind, bits, planes), row in sorted(table.items()):
        print(f"{op:5} {kind:8} {bits:3} bits {planes:2} planes  {row}")
        assert sorted(row) == archs
        assert max(row.values()) <= MAX_REGISTERS[kind][planes], (op, kind, bits, planes, row)


def test_vectors_are_loaded_and_stored_whole(built):
    folder, _, archs = built
    for arch in archs:
        bodies = (folder / f"tally.compute_{arch}.ptx").read_text().split(".entry ")[1:]
        assert len(bodies) == N_KERNELS
        for body in bodies:
            _, kind, bits, planes = kernel(body.split("(")[0])
            n_loads = 8 * planes if kind == "Whole" else 8
            whole = re.findall(r"\bld\.global\.(?:nc\.)?v4\.\w*32\b", body)
            pieces = re.findall(r"\b(?:ld|st)\.global\.(?:nc\.)?\w*32\b", body)
            if bits == 128:
                assert len(whole) >= n_loads and not pieces
            else:
                assert len(pieces) >= n_loads and not whole


def test_what_is_read_may_be_written(built):
    """No load through the cache of what a kernel does not write: the result may lie in ballots."""
    folder, _, archs = built
    for arch in archs:
        assert "ld.global.nc" not in (folder / f"tally.compute_{arch}.ptx").read_text()


def test_eight_loads_are_in_flight(built):
    """The machine code issues the loads of eight ballots, and of their blank bits, before the first
    of them is counted."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    folder, _, archs = built
    functions = run(cuobjdump, "-sass", folder / "tally.o").split("Function : ")[1:]
    assert len(functions) == N_KERNELS * len(archs)
    for function in functions:
        name, body = function.split("\n", 1)
        _, kind, bits, planes = kernel(name)
        if kind == "Weighted":
            continue
        load = "LDG.E.128" if bits == 128 else "LDG.E"
        opcodes = re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?(LDG[.\w]*|LOP3)", body, re.M)
        marks = {load: "L", "LDG.E.U8": "b", "LOP3": "."}
        runs = "".join(marks.get(opcode, "") for opcode in opcodes).split(".")
        if kind == "Blank":
            assert any(r.count("L") >= 8 and r.count("b") >= 8 for r in runs), (name, runs)
        else:
            assert sum(r.count("L") >= 8 for r in runs) >= planes, (name, runs)


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


def random_words(shape, seed):
    words = torch.randint(-(2**31), 2**31, shape, generator=generator(seed))
    return words.to(torch.int32)


def random_blanks(n, n_words, share, seed):
    """Blank bits, also behind the last word; about that share is set, half of it by all ballots."""
    draws = torch.rand((2, n, -(-n_words // 32) + 1, 32), generator=generator(seed))
    draws[1] = draws[1, :1]
    bits = (draws[0] < share) | (draws[1] < share / 2)
    return (bits.long() << torch.arange(32)).sum(-1).to(torch.int32)


def calls(scale, n_words, blanks):
    """(op, planes of the result, what follows it, out_blanks) of every count there is."""
    arguments = scale, 2**40 + 3, -5, step_of(scale)
    is_even = scale % 2 == 0
    cases = [("tally", scale.bit_length(), is_even), ("elect", 1, False)]
    for op, k, says_zero in [*cases, ("elect", 2, True)] if is_even else cases:
        row = torch.full((1, -(-n_words // 32) + 1), -7, dtype=torch.int32)
        yield op, k, arguments, None if blanks is None or says_zero else row


def check_count(on_host, ballots, scale, blanks=None, weights=None, out_align=4, out_offset=0):
    """Bit for bit the reference's, and nothing is written beside the result."""
    n_words = ballots.shape[2]
    for op, k, arguments, row in calls(scale, n_words, blanks):
        out, buffer = inside(torch.Size((k, n_words)), -n_words % out_align, out_offset)
        want, wanted_row = torch.empty_like(out), None if row is None else row.clone()
        getattr(on_host, op)(ballots, out, *arguments, blanks, row, weights)
        getattr(reference, op)(ballots, want, *arguments, blanks, wanted_row, weights)
        assert torch.equal(out, want), (op, k, n_words, scale)
        assert row is None or torch.equal(row, wanted_row), (op, k, n_words, scale)
        assert untouched(out, buffer), (op, k, n_words, scale)


# Offsets and gaps: all vectors but a rest (the gap fills up ragged rows), a base, a stride of the
# ballots or of the result that is no multiple of 16 bytes.
LAYOUTS = [(0, 0), (4, 4), (1, 0), (0, 2)]
ALIGNS = [(4, 4), (2, 4), (4, 2), (1, 1)]


@pytest.mark.parametrize("offset, out_offset", LAYOUTS)
@pytest.mark.parametrize("align, out_align", ALIGNS)
@pytest.mark.parametrize("n, planes", [(1, 5), (3, 1), (8, 1), (9, 2), (16, 3), (17, 1), (64, 2)])
def test_ragged_and_unaligned_words(on_host, n, planes, align, out_align, offset, out_offset):
    top = (1 << planes) - 1
    for n_words in (0, 1, 3, 4, 5, 6, 8, 257, 1025):
        shape = torch.Size((n, planes, n_words))
        ballots, _ = inside(shape, -shape[1:].numel() % align, offset)
        ballots.copy_(random_words(shape, n_words))
        for scale in (n * top, n * top + 1):
            check_count(on_host, ballots, scale, out_align=out_align, out_offset=out_offset)


@pytest.mark.parametrize("offset, out_offset", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 16, 17, 64])
def test_blank_words(on_host, n, share, offset, out_offset):
    """Vectors, whose octets are a byte of two threads, and words, eight threads a byte."""
    for n_words in (1, 4, 5, 8, 9, 31, 264, 1029):
        ballots, _ = inside(torch.Size((n, 1, n_words)), -n_words % 4, offset)
        ballots.copy_(random_words(ballots.shape, n_words))
        blanks = random_blanks(n, n_words, share, n_words)
        for scale in (n, n + 1):
            check_count(on_host, ballots, scale, blanks, out_offset=out_offset)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("n, planes, heaviest", [(1, 1, 9), (3, 1, 5), (9, 1, 7000), (17, 1, 2)])
def test_weights(on_host, n, planes, heaviest, share):
    n_words = 41
    weights = torch.randint(1, heaviest + 1, (n,), generator=generator(n)).to(torch.int32)
    ballots = random_words((n, planes, n_words), n)
    blanks = None if share is None else random_blanks(n, n_words, share, n)
    for scale in (int(weights.sum()), int(weights.sum()) + 1):
        check_count(on_host, ballots, scale, blanks, weights)


@pytest.mark.parametrize("n, planes", [(1, 2), (3, 2), (9, 3)])
def test_weights_of_several_planes(on_host, n, planes):
    weights = torch.arange(1, n + 1, dtype=torch.int32)
    scale = int(weights.sum()) * ((1 << planes) - 1)
    check_count(on_host, random_words((n, planes, 41), n), scale, weights=weights)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [4, 5, 8, 9])
def test_in_place(on_host, n, weighted, offset):
    """The result in the ballots' own planes, and out_blanks in the first ballot's blank bits."""
    weights = torch.arange(1, n + 1, dtype=torch.int32) if weighted else None
    scale = int(weights.sum()) if weighted else n
    for n_words in (5, 8, 13, 1029):
        ballots, _ = inside(torch.Size((n, 1, n_words)), -n_words % 4, offset)
        votes = random_words(ballots.shape, n_words)
        blanks = random_blanks(n, n_words, 0.5, n_words)
        for op, k, arguments, row in calls(scale, n_words, blanks):
            want = torch.empty((k, n_words), dtype=torch.int32)
            getattr(reference, op)(votes, want, *arguments, blanks, row, weights)
            ballots.copy_(votes)
            bits, out = blanks.clone(), ballots[:k, 0]
            in_place = None if row is None else bits[:1]
            getattr(on_host, op)(ballots, out, *arguments, bits, in_place, weights)
            assert torch.equal(out, want), (op, k, n_words)
            assert row is None or torch.equal(in_place, row), (op, k, n_words)


def test_one_launch_where_vectors_suffice(on_host):
    """None without words, one for whole octets or words alone, two for octets and a rest; with
    weights words alone."""
    cases = ((0, 0), (3, 1), (7, 1), (8, 1), (1024, 1), (1027, 2))
    for n_words, launches in cases:
        ballots, _ = inside(torch.Size((3, 1, n_words)), -n_words % 4, 0)
        tally, _ = inside(torch.Size((2, n_words)), -n_words % 4, 0)
        blanks, row = torch.zeros((4, 40), dtype=torch.int32).split([3, 1])
        ones = torch.ones(3, dtype=torch.int32)
        options = {}, {"blanks": blanks, "out_blanks": row}, {"weights": ones}
        for named, expected in zip(options, (launches, launches, min(launches, 1)), strict=True):
            before = on_host.launches
            on_host.tally(ballots, tally, 3, 0, 0, step_of(0), **named)
            assert on_host.launches - before == expected, (n_words, named.keys())


def test_hipify_can_translate():
    """What the kernels' source takes from CUDA: qualifiers, which HIP has too, and what torch's
    hipify knows; the rest stands where HIP is not. Nothing here has been built for ROCm."""
    known = {word for words in CUDA_TO_HIP_MAPPINGS for word in words}
    known |= {"__device__", "__host__", "__global__", "__forceinline__", "__launch_bounds__"}
    known |= {"__syncthreads"}
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
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    folders.append(str(includes[0] / "include"))
    run(
        *(*compiler(), "-std=c++20", "-fsyntax-only"),
        *("-Wall", "-Wextra", "-Werror"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
        *(f"-isystem{folder}" for folder in folders),
        *(f"-I{CSRC}", CSRC / "cuda/tally_op.cpp"),
    )
