"""Compiles every variant of the Triton kernels that ships, for GPUs that need not be there, and
reads what the compiler made of it: `make codegen` prints the table, test_codegen.py holds it to
the contract. Runs as a program, because tests set Triton to interpret.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lion_kernels._ops import ROUNDINGS
from lion_kernels.kernels import launch

ARCHS = (80, 90, 100)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOMENTA = {**DTYPES, "int8": torch.int8}
# What the launchers pass, where the kernel does not say it itself.
TYPES = {
    "table_ptr": "*i64", "tile_rows_ptr": "*i32", "nonfinite_ptr": "*i64", "step_ptr": "*i64",
    "agreeing_ptr": "*i64",
    "ballot_ptr": "*i32", "flags_ptr": "*i32", "flag_source_ptr": "*i64", "verdict_ptr": "*i32",
    "presence_ptr": "*i32", "beta1": "fp32", "beta2": "fp32",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def variants():
    """(kernel, name of the variant, its constants, bytes that a tile's tensors read and write an
    element) of everything that launch.py can launch."""
    for (g, m), flag, rounding in itertools.product(
        itertools.product(DTYPES, MOMENTA), (False, True), ROUNDINGS
    ):
        if g == "float32" and rounding != "nearest":
            continue  # float32 drops nothing
        types = f"{g}, momentum {m}"
        g_size, m_size = DTYPES[g].itemsize, MOMENTA[m].itemsize
        p_type, m_type = (launch.TRITON_DTYPES[MOMENTA[name]] for name in (g, m))
        constants = {"P": p_type, "M": m_type, "ROUNDING": ROUNDINGS.index(rounding)}
        constants |= {"PLAIN": not flag, "BLOCK": launch.STEP.block}
        low = (g_size,) if rounding == "compensated" else ()
        yield (
            "step", f"{types}{', with options' if flag else ''}, {rounding}", constants,
            (g_size, g_size, m_size, *low), (g_size, m_size, *low),
        )  # fmt: skip
        if rounding != "nearest":
            continue
        if not flag:
            constants = {"G": p_type, "M": m_type, "BLOCK": launch.AGREEING.block}
            yield "agreeing", types, constants, (g_size, m_size), ()
        for cautious in (False, True):
            constants = {"G": p_type, "M": m_type, "TERNARY": flag, "CAUTIOUS": cautious}
            kind = ("ternary" if flag else "binary") + ", cautious" * cautious
            constants["BLOCK"] = launch.ENCODE.block
            yield "encode", f"{types}, {kind}", constants, (g_size, m_size), (m_size,)
    for (p, dtype), planes, rounding in itertools.product(
        DTYPES.items(), (1, 2, 4, 8, 16), ROUNDINGS
    ):
        if p == "float32" and rounding != "nearest":
            continue
        constants = {"P": launch.TRITON_DTYPES[dtype], "ROUNDING": ROUNDINGS.index(rounding)}
        sizes = (dtype.itemsize,) * (2 if rounding == "compensated" else 1)
        for cautious in (False, True):
            more = {"PLANES": planes, "CAUTIOUS": cautious, "BLOCK": launch.APPLY.block}
            name = f"{p}, planes {planes}, {rounding}" + ", cautious" * cautious
            yield "apply", name, constants | more, sizes, sizes


KERNELS = {
    "step": (launch._step_kernel, launch.STEP),
    "agreeing": (launch._agreeing_kernel, launch.AGREEING),
    "encode": (launch._encode_kernel, launch.ENCODE),
    "apply": (launch._apply_kernel, launch.APPLY),
}


def compile_one(task):
    """The figures of one variant on one architecture."""
    (room, name, constants, reads, writes), arch = task
    kernel, config = KERNELS[room]
    if not constants.get("PLAIN", True):
        config = launch.STEP_WITH_OPTIONS
    elif room == "encode" and constants["CAUTIOUS"]:
        config = launch.ENCODE_WITH_OPTIONS
    elif room == "apply":
        config = launch.apply_config(constants["PLANES"])
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
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=launch.options(config)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    # A thread has 8 elements in a row: 8 bytes of int8.
    reads, writes = ([size for size in sizes if size > 1] for sizes in (reads, writes))
    per_thread = config.block // (32 * config.num_warps)
    return {
        "kernel": room,
        "variant": name,
        "arch": arch,
        "registers": numbers["REG"],
        "registers_budget": config.registers,
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "loads_16_bytes": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "loads_16_bytes_wanted": sum(size * per_thread // 16 for size in reads),
        "stores_16_bytes": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "stores_16_bytes_wanted": sum(size * per_thread // 16 for size in writes),
    }


def compile_all(archs=ARCHS, progress=False):
    tasks = list(itertools.product(variants(), archs))
    with multiprocessing.get_context("fork").Pool() as pool:
        done = pool.imap(compile_one, tasks)
        if progress:
            from tqdm import tqdm

            done = tqdm(done, total=len(tasks), unit="kernel")
        return list(done)


def table(rows):
    """One line a variant; registers of each architecture side by side."""
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
    return tabulate(list(lines.values()), headers="keys")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the figures, for machines")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHS, help="e.g. 90 (default all)")
    args = parser.parse_args()
    rows = compile_all(args.arch, progress=not args.json)
    print(json.dumps(rows) if args.json else table(rows))
    print(f"triton {triton.__version__}, {len(rows)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
