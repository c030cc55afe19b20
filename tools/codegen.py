"""Compiles every variant of the Triton kernels that ships, for GPUs that need not be there, and
reads what the compiler made of it: `make codegen` prints the table and a forecast of what the
arithmetic leaves of the memory's time (forecast.py), and fails where either breaks the contract
(codegen_contract.py). A program, because tests set Triton to interpret.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import codegen_contract as contract
import forecast
from lion_kernels.int8 import MOMENTUM_BLOCK
from lion_kernels.kernels import config, launch
from lion_kernels.layout import BITS_PER_WORD
from lion_kernels.ops import ROUNDINGS

ARCHS = (80, 90, 100)
AMD_ARCHS = ("gfx942", "gfx950")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOMENTA = {**DTYPES, "int8": torch.int8}
# Of a verdict: one kernel each; those between differ in how often they read a byte.
PLANES = (1, 2, 4, 8, 16)
# What the launchers pass, where the kernel does not say it itself.
TYPES = {
    "table_ptr": "*i64", "tile_rows_ptr": "*i32", "nonfinite_ptr": "*i64", "step_ptr": "*i64",
    "agreeing_ptr": "*i64",
    "ballot_ptr": "*i32", "verdict_ptr": "*i32", "blanks_ptr": "*i32", "trailers_ptr": "*i32",
    "trailer_ptr": "*i32", "shared_ptr": "*i64", "beta1": "fp32", "beta2": "fp32",
}  # fmt: skip
KERNELS = {
    "step": launch._step_kernel,
    "agreeing": launch._agreeing_kernel,
    "encode": launch._encode_kernel,
    "apply": launch._apply_kernel,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Kinds that the forecast's own table leaves out.
SPECIAL = r"(?<!b)float16|stochastic|compensated|options|cautious"


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants, and the bytes an element that its full tile reads and writes:
    of each tensor; of ballot or verdict; and whether it has blank bits, one a word."""

    room: str
    name: str
    config: config.Config
    constants: dict
    reads: tuple
    writes: tuple
    planes: int = 0
    has_blanks: bool = False

    @property
    def bytes_of_votes(self):
        return self.planes / 8 + self.has_blanks / 8 / BITS_PER_WORD

    @property
    def bytes_read(self):
        scale = 4 / MOMENTUM_BLOCK if "int8" in self.name else 0
        return sum(self.reads) + scale + self.bytes_of_votes * (self.room == "apply")

    @property
    def bytes_moved(self):
        scale = 4 / MOMENTUM_BLOCK if "int8" in self.name and self.room != "agreeing" else 0
        return (
            self.bytes_read
            + sum(self.writes)
            + scale
            + self.bytes_of_votes * (self.room == "encode")
        )


def variants():
    """Everything that launch.py can launch, but for numbers of planes between PLANES."""
    for (g, m), flag, rounding in itertools.product(
        itertools.product(DTYPES, MOMENTA), (False, True), ROUNDINGS
    ):
        if g == "float32" and rounding != "nearest":
            continue  # float32 drops nothing
        types = f"{g}, momentum {m}"
        g_size, m_size = DTYPES[g].itemsize, MOMENTA[m].itemsize
        p_type, m_type = (launch.TRITON_DTYPES[MOMENTA[name]] for name in (g, m))
        low = (g_size,) if rounding == "compensated" else ()
        yield Variant(
            "step", f"{types}{', with options' if flag else ''}, {rounding}",
            config.step_config(is_plain=not flag),
            {"P": p_type, "M": m_type, "ROUNDING": ROUNDINGS.index(rounding), "PLAIN": not flag},
            (g_size, g_size, m_size, *low), (g_size, m_size, *low),
        )  # fmt: skip
        if rounding != "nearest":
            continue
        types_of = {"G": p_type, "M": m_type}
        if not flag:
            yield Variant("agreeing", types, config.AGREEING, types_of, (g_size, m_size), ())
        for cautious in (False, True):
            kind = ("ternary" if flag else "binary") + ", cautious" * cautious
            yield Variant(
                "encode", f"{types}, {kind}",
                config.encode_config(cautious),
                {**types_of, "TERNARY": flag, "CAUTIOUS": cautious},
                (g_size, m_size), (m_size,), 1 + flag, not flag,
            )  # fmt: skip
    for (p, dtype), planes, blanks, rounding, cautious in itertools.product(
        DTYPES.items(), PLANES, (False, True), ROUNDINGS, (False, True)
    ):
        if p == "float32" and rounding != "nearest":
            continue
        sizes = (dtype.itemsize,) * (2 if rounding == "compensated" else 1)
        constants = {"P": launch.TRITON_DTYPES[dtype], "ROUNDING": ROUNDINGS.index(rounding)}
        constants |= {"PLANES": planes, "BLANKS": blanks, "CAUTIOUS": cautious}
        yield Variant(
            "apply",
            f"{p}, planes {planes}{' and blanks' * blanks}, {rounding}" + ", cautious" * cautious,
            config.apply_config(planes), constants, sizes, sizes, planes, blanks,
        )  # fmt: skip


def compiled_for(variant, target):
    """What Triton makes of a variant for a GPUTarget."""
    kernel = KERNELS[variant.room]
    constants = {**variant.constants, "BLOCK": variant.config.block}
    signature = {
        p.name: "constexpr" if p.name in constants else p.annotation_type or TYPES[p.name]
        for p in kernel.params
    }
    # The buffers are aligned, as the allocator and the ballot's layout make them.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=config.options(variant.config))


def usage_of(cubin):
    """Registers, stack and local memory of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def compile_one(task):
    """The figures of one variant on one architecture."""
    variant, arch = task
    compiled = compiled_for(variant, GPUTarget("cuda", arch, 32))
    usage, ptx, config = usage_of(compiled.asm["cubin"]), compiled.asm["ptx"], variant.config
    per_thread = config.block // (32 * config.num_warps)
    # A thread has 8 elements in a row: 8 bytes of int8.
    reads, writes = ([s for s in sizes if s > 1] for sizes in (variant.reads, variant.writes))
    return {
        "kernel": variant.room,
        "variant": variant.name,
        "arch": arch,
        "registers": usage["REG"],
        "registers_budget": config.registers,
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "loads_16_bytes": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "loads_16_bytes_wanted": sum(size * per_thread // 16 for size in reads),
        "stores_16_bytes": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "stores_16_bytes_wanted": sum(size * per_thread // 16 for size in writes),
        "forecast": forecast.of(
            compiled.asm["cubin"], arch, config.num_warps, config.block,
            variant.bytes_read, variant.bytes_moved, usage["REG"], compiled.metadata.shared,
        ),
    }  # fmt: skip


def compile_for_amd(task):
    """Vector registers, spilled ones and 16-byte loads of a variant on AMD's MI300 or MI350. That
    it compiles is all that is claimed: nothing here has run on ROCm.

    To run there, it lacks launch configs for warps of 64 lanes, csrc/tally* through hipify with a
    branch of setup.py that builds it, pinned tables and captures tried under HIP, a check that
    v_rsq_f32 is within what momentum.py relies on, and a measurement of anything."""
    variant, arch = task
    asm = compiled_for(variant, GPUTarget("hip", arch, 64)).asm["amdgcn"]
    counts = dict(re.findall(r"\.(vgpr\w*count):\s+(\d+)", asm))
    return {
        "kernel": variant.room,
        "variant": variant.name,
        "arch": arch,
        "registers": int(counts["vgpr_count"]),
        "spilled": int(counts["vgpr_spill_count"]),
        "16-byte loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
    }


def a_few(variants):
    """Some of them that have, between them, every constant of every kernel in every value: the one
    that adds most, until none adds any."""
    left, chosen, seen = list(variants), [], set()
    while left:
        gains = [{(v.room, *item) for item in v.constants.items()} - seen for v in left]
        most = max(range(len(left)), key=lambda i: len(gains[i]))
        if not gains[most]:
            break
        seen |= gains[most]
        chosen.append(left[most])
    return chosen


def tasks_of(archs, few):
    """(variant, architecture) of all variants; of a few, each on one architecture in turn."""
    if few:
        return list(zip(a_few(variants()), itertools.cycle(archs), strict=False))
    return list(itertools.product(variants(), archs))


def amd_tasks_of(few):
    """The same of the plain kernels in bfloat16; of a few, the first of each kernel."""
    left_out = SPECIAL + "|float32|planes (4|8|16)"
    plain = [v for v in variants() if not re.search(left_out, v.name)]
    if few:
        firsts = {v.room: v for v in reversed(plain)}
        return list(zip(firsts.values(), itertools.cycle(AMD_ARCHS), strict=False))
    return list(itertools.product(plain, AMD_ARCHS))


def compile_all(tasks, compile_one, progress):
    with multiprocessing.get_context("fork").Pool() as pool:
        done = pool.imap(compile_one, tasks)
        if progress:
            from tqdm import tqdm

            done = tqdm(done, total=len(tasks), unit="kernel")
        return list(done)


def table(rows):
    """One line a variant; registers and forecasts of each architecture side by side."""
    from tabulate import tabulate

    lines = {}
    for row in rows:
        line = lines.setdefault((row["kernel"], row["variant"]), {})
        line.update(
            {
                "kernel": row["kernel"],
                "variant": row["variant"],
                "16-byte loads": row["loads_16_bytes"],
                "stores": row["stores_16_bytes"],
                "stack + local": max(line.get("stack + local", 0), row["stack"] + row["local"]),
                "shared": row["shared"],
                f"registers sm_{row['arch']}": row["registers"],
            }
        )
        line.update({chip: f["ratio"] for chip, f in row["forecast"].items()})
    return tabulate(list(lines.values()), headers="keys", floatfmt=".2f")


def forecasts(rows):
    """What the table of chips says of the kernels that ship without options, and which kernels of
    any kind lie above the bound on chips that the contract names."""
    from tabulate import tabulate

    lines = [
        {"kernel": row["kernel"], "variant": row["variant"], "chip": chip, **figures}
        for row in rows
        for chip, figures in row["forecast"].items()
        if not re.search(SPECIAL, row["variant"])
    ]
    why = contract.reason_for
    above = [
        f"  {row['kernel']} {row['variant']}, {chip}: {figures['ratio']:.2f}: {why(row)}"
        for row in rows
        for chip, figures in row["forecast"].items()
        if contract.is_above(chip, figures)
    ]
    return "\n".join(
        [
            "\n\nForecast from machine code, not measured. Ratio: the busiest pipe to the memory.",
            tabulate(lines, headers="keys", floatfmt=".2f"),
            f"\nAbove {forecast.MOST} on {' or '.join(forecast.HELD_TO)}, and why:", *above,
        ]
    )  # fmt: skip


def amd_table(rows):
    from tabulate import tabulate

    return "\n\nOn AMD: compiled, not run.\n" + tabulate(rows, headers="keys") if rows else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="the figures alone, for machines, which judge them")
    add("--arch", nargs="+", type=int, default=ARCHS, help="e.g. 90 (default all, and AMD's)")
    add("--amd", action="store_true", help="AMD's gfx942 and gfx950 alone")
    add("--few", action="store_true", help="every option once, each on one architecture")
    args = parser.parse_args()
    rows, amd_rows, shows = [], [], not args.json
    if not args.amd:
        rows = compile_all(tasks_of(args.arch, args.few), compile_one, shows)
        if not forecast.NVDISASM.exists():
            print(f"no forecast: triton has no {forecast.NVDISASM}", file=sys.stderr)
    if args.amd or (args.arch is ARCHS and shows):
        if "amd" in triton.backends.backends:
            amd_rows = compile_all(amd_tasks_of(args.few), compile_for_amd, shows)
        else:
            print("triton has no back end for AMD", file=sys.stderr)
    print(f"triton {triton.__version__}, {len(rows + amd_rows)} kernels", file=sys.stderr)
    if args.json:
        return print(json.dumps(rows + amd_rows))
    print(table(rows) + forecasts(rows) + amd_table(amd_rows))
    broken = contract.broken(rows) + contract.broken_on_amd(amd_rows)
    broken += contract.incomplete(rows, args.arch) if rows and not args.few else []
    print("", *broken, f"{len(broken)} breaches of the contract", sep="\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
