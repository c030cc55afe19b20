"""Sweeps the launch configs of kernels/config.py on one CUDA GPU: the share of a plain kernel's
bytes/s that each reaches, best first, a section for each config.

Where the margin is small: 16-bit types, int8 momenta, ternary ballots, several planes, options, at
the size of one layer group and on GPT-2's list. Every config is compared with
lion_kernels.reference before it is timed. `--dry-run` shows without a GPU that all of it runs.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from tabulate import tabulate

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import gpu
from lion_kernels.kernels import config as launched
from timing import Case, Report
from workload import cold, in_turn, name_of, wrong_ops

INT8 = ("fp32, int8 momentum", "bf16, int8 momentum")
# Config: whether the ops have options, and the (op, planes) and kinds that it is chosen by.
ROOMS = {
    "STEP": (False, [("lion_step", 0)], ("fp32", "bf16", *INT8)),
    "ENCODE": (False, [("encode", 1), ("encode", 2)], ("fp32", "bf16", *INT8)),
    "APPLY": (False, [("apply", 1), ("apply", 2), ("apply", 4)], ("fp32", "bf16")),
    "STEP_WITH_OPTIONS": (True, [("lion_step", 0)], ("fp32", "bf16")),
    "ENCODE_WITH_OPTIONS": (True, [("encode", 1)], ("fp32", "bf16")),
}
# By elements a thread; others leave it too little to load at once, or too much to keep.
REGISTERS = {4: (32, 64), 8: (32, 64, 80), 16: (64, 80, 96, 128), 32: (88, 96, 128, 255)}


def configs(shipped: Any, dry: bool) -> list[Any]:
    """The one that ships, and the grid."""
    grid = [
        launched.Config(block, warps, registers)
        for block in (1024, 2048, 4096, 8192)
        for warps in (4, 8)
        for registers in REGISTERS.get(block // (32 * warps), ())
    ]
    found = list(dict.fromkeys([shipped, *grid]))
    return found[:2] if dry else found


def refused(bench: gpu.Bench, variants: list[tuple[str, int]], kinds: tuple[str, ...]) -> list[str]:
    """Why the config in use has no time: wrong results, or what the compiler or the device said."""
    try:
        ops, sizes = bench.checked_ops, bench.ragged
        return [wrong for kind in kinds for wrong in wrong_ops(ops, sizes, variants, kind)]
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).strip()[:160]}"]


def shares(bench: gpu.Bench, room: str, right: list[Any]) -> dict[str, list[float]]:
    """By workload: of each config, in their order."""
    options, variants, kinds = ROOMS[room]
    places = [("flat", [[bench.flat[-1]]], kind) for kind in kinds]
    places += [("GPT-2", bench.gpt2, kind) for kind in ("fp32", "bf16")]
    found = {}
    for place, shapes, kind in places:
        works = cold(shapes, kind, bench.device, options)
        for variant in variants:
            cases = []
            for config in right:
                setattr(launched, room, config)
                call = in_turn([work.call(bench.ops, *variant) for work in works])
                with_config = partial(run_with, room, config, call)
                cases.append((Case(str(config), with_config), *works[0].traffic(*variant)))
            label = f"{name_of(*variant)}, {kind}, {place}"
            results = gpu.shares(bench, label, cases)[-len(cases) :]
            found[label] = [result.ratio for result in results]
    return found


def run_with(room: str, config: Any, call: Any) -> None:
    setattr(launched, room, config)
    call()


def tune(room: str, bench: gpu.Bench, report: Report) -> None:
    _, variants, kinds = ROOMS[room]
    shipped, notes, right = getattr(launched, room), [], []
    try:
        for config in configs(shipped, bench.is_dry):
            setattr(launched, room, config)
            messages = refused(bench, variants, kinds)
            notes += [f"{config}: no time, {message}" for message in messages]
            right += [] if messages else [config]
        found = shares(bench, room, right)
    finally:
        setattr(launched, room, shipped)
    rows = [
        {"block": c.block, "num_warps": c.num_warps, "registers": c.registers}
        | {label: round(values[i], 4) for label, values in found.items()}
        | {"mean": round(mean(values[i] for values in found.values()), 4), "shipped": c == shipped}
        for i, c in enumerate(right)
    ]
    rows.sort(key=lambda row: -row["mean"])
    body = [row | {"shipped": "yes" if row["shipped"] else ""} for row in rows]
    table = tabulate(body, headers="keys", floatfmt=".3f")
    report.add(room, rows, "share of a plain kernel's bytes/s", table, *notes)


if __name__ == "__main__":
    gpu.run({room: partial(tune, room) for room in ROOMS}, "gpu-tune", __doc__)
