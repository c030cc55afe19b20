"""What a kernel asks of a multiprocessor beside memory: a forecast from its machine code.

Counts the instructions of a program's full tile, shares them out to the pipes, and compares the
busiest pipe with the time in which the tile's bytes pass. Owns the disassembly and the table of
chips; knows no kernel. What it leaves out: latencies, caches, and how well pipes overlap.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Chip:
    """Of one GPU: multiprocessors, GHz, and what a large copy moves in bytes/s."""

    arch: int
    multiprocessors: int
    clock_ghz: float
    copy_bytes_per_s: float

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.copy_bytes_per_s / self.multiprocessors / (self.clock_ghz * 1e9)


# Multiprocessors and bandwidth are those of NVIDIA's data sheets; a large copy reaches 0.9 of the
# sheet's 3.35 TB/s on an H100 (3.0) and of 4.8 on an H200 (4.3), as published benchmarks say, and
# the same share is assumed of the A100's 2.04 and the B200's 8.0. Clocks: the A100's boost clock;
# for H100 and H200 the boost clock of the PCIe card, for these SXM cards lower it where power runs
# short (1.98 at most); for the B200 the 1.98 of its sheet's 75 TFLOP/s, lowered likewise.
CHIPS = {
    "A100": Chip(80, 108, 1.41, 0.9 * 2.04e12),
    "H100": Chip(90, 132, 1.755, 0.9 * 3.35e12),
    "H200": Chip(90, 132, 1.755, 0.9 * 4.8e12),
    "B200": Chip(100, 148, 1.755, 0.9 * 8.0e12),
}

# What arithmetic may take of the memory's time: with more, the copy's rate is out of reach.
MOST = 0.6
# The chips whose forecasts are a contract. The others have 1.4 and 2.1 times the H100's bandwidth a
# multiprocessor and the same arithmetic.
HELD_TO = ("A100", "H100")

# Of any of these: registers, warps and blocks that a multiprocessor holds.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32

# Pipes by opcode, the first that matches: Nsight Compute's documentation names what each executes.
PIPES = (
    ("fp64", r"D(ADD|MUL|FMA|SETP)|F2F.*F64|[IU]2F\.F64|DMMA"),
    ("xu", r"MUFU|I2F(?!P)|F2I|F2F(?!P)|FRND|POPC|FLO|BREV|REDUX"),
    ("lsu", r"LD[GSLC]?\b|ST[GSL]?\b|LDSM|STSM|ATOM|RED\b|SHFL|MATCH"),
    ("imad", r"IMAD|IDP|HFMA2|HADD2|HMUL2"),
    ("fma", r"F(ADD|MUL|FMA|SWZADD)2?\b"),
    ("none", r"U[A-Z]|R2UR|S2UR|S2R|CS2R|BRA|BSSY|BSYNC|EXIT|BAR|NOP|CALL|RET|WARPSYNC|DEPBAR|"
     r"MEMBAR|ERRBAR|CGAERRBAR|CCTL|BREAK|YIELD|ACQBULK|LEPC"),
    ("alu", r"."),
)  # fmt: skip


def pipe_of(opcode: str) -> str:
    return next(pipe for pipe, pattern in PIPES if re.match(pattern, opcode))


def _width(opcode: str) -> int:
    """Bytes of a global load or store a thread; 0: neither."""
    if not re.match(r"(LDG|STG)\b", opcode):
        return 0
    bits = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
    return int(bits.group(1)) // 8 if bits else 4


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [NVDISASM, "-c", file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


LINE = re.compile(r"^\s+/\*\w{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\w[\w.]*)\s*(.*?);?\s*$")
LABEL = re.compile(r"^(\.L_x_\d+):")


def full_tile(sass: str) -> Counter:
    """The opcodes of one pass through a program that has a whole tile without exceptions: of the
    ways from entry to exit that move most bytes, the one of fewest instructions. Loops count once;
    a call is a slow path, which costs its call alone."""
    code: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := LINE.match(line):
            code.append((found.group(1) or "", found.group(2), found.group(3)))
    best: list[tuple[int, int, int]] = [(0, 0, -1)] * (len(code) + 1)
    # From the end: a branch back is a loop, whose body has been passed.
    for i in range(len(code) - 1, -1, -1):
        predicate, opcode, operands = code[i]
        ends = re.match(r"EXIT|RET", opcode)
        nexts = [] if ends and not predicate else [i + 1]
        # BSSY only names where the threads of a branch meet again.
        target = re.search(r"\.L_x_\d+", operands)
        if target and re.match(r"BRA\b", opcode):
            forward = labels[target.group()]
            conditional = predicate or re.match(r"!?U?P\d", operands)
            nexts = (nexts if conditional else []) + ([forward] if forward > i else [])
        if ends and predicate:
            nexts.append(len(code))
        moved, short, then = max(((*best[n][:2], n) for n in nexts), default=(0, 0, -1))
        wide = _width(opcode) if _width(opcode) >= 16 else 0
        best[i] = (moved + wide, short - 1, then)
    counts, i = Counter(), 0
    while 0 <= i < len(code):
        counts[code[i][1]] += 1
        i = best[i][2]
    return counts


@dataclass(frozen=True)
class Work:
    """What one thread of a full tile issues, by pipe: instructions, and 128-byte rows of the
    load/store unit."""

    instructions: int
    by_pipe: dict[str, float]


def work_of(sass: str) -> Work:
    opcodes = full_tile(sass)
    by_pipe: Counter = Counter()
    for opcode, n in opcodes.items():
        by_pipe[pipe_of(opcode)] += n * max(1, _width(opcode) / 4)
    return Work(sum(opcodes.values()), dict(by_pipe))


def cycles(work: Work, warps: int, arch: int) -> dict[str, float]:
    """Cycles a tile that each pipe of a multiprocessor is busy. Warp instructions a cycle, from the
    throughput table of the CUDA programming guide: 4 issued; 2 of integers, logic and comparisons
    (64 results); 4 of float32 (2 on the A100), of which integer products may be 2; 2 of float64 (1
    on the A100); 1 of loads, stores and shuffles; 0.5 of roots, of conversions and of integers
    that a warp reduces."""
    n = work.by_pipe.get
    fma = n("fma", 0) + n("imad", 0)
    per_warp = {
        "issue": work.instructions / 4,
        "alu": n("alu", 0) / 2,
        "fma": max(fma / (2 if arch == 80 else 4), n("imad", 0) / 2),
        "fp64": n("fp64", 0) / (1 if arch == 80 else 2),
        "lsu": n("lsu", 0),
        "xu": n("xu", 0) / 0.5,
    }
    return {pipe: warps * each for pipe, each in per_warp.items()}


def resident(registers: int, warps: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once."""
    per_warp = -(-registers // 8) * 8 * 32
    by_shared = BLOCKS if shared == 0 else 228 * 1024 // (shared + 1024)
    return min(REGISTERS // per_warp // warps, WARPS // warps, BLOCKS, by_shared)


def of(
    cubin: bytes, arch: int, warps: int, block: int, bytes_read: float, bytes_moved: float,
    registers: int, shared: int,
) -> dict[str, dict[str, object]]:  # fmt: skip
    """By chip of the architecture: instructions and busiest pipe's cycles an element, their ratio
    to the memory's, and KiB that programs ask of memory at once. Empty without the disassembler."""
    if not NVDISASM.exists():
        return {}
    sass = disassemble(cubin)
    opcodes, work = full_tile(sass), work_of(sass)
    busy, pipe = max((n, pipe) for pipe, n in cycles(work, warps, arch).items())
    return {
        name: {
            "instructions": work.instructions * 32 * warps / block,
            "cycles": busy / block,
            "pipe": pipe,
            "ratio": busy / (block * bytes_moved / chip.bytes_per_cycle),
            "KiB in flight": resident(registers, warps, shared) * block * bytes_read / 1024,
            "barriers": sum(n for opcode, n in opcodes.items() if opcode.startswith("BAR")),
            "shuffles": sum(n for opcode, n in opcodes.items() if opcode.startswith("SHFL")),
        }
        for name, chip in CHIPS.items()
        if chip.arch == arch
    }
