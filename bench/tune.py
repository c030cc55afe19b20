"""Sweeps the launch configs of kernels/launch.py on one CUDA GPU: the share of a copy's bytes/s
that each reaches, best first.

Every config is compared with lion_kernels.reference before it is timed. `--dry-run` shows without a
GPU that all of it runs.
"""

from functools import partial
from statistics import mean
from typing import Any

from tabulate import tabulate

import gpu
from timing import Case, Report

ROOMS = {"lion_step": "STEP", "encode": "ENCODE", "apply": "APPLY"}
# By elements a thread; others leave it too little to load at once, or too much to keep.
REGISTERS = {4: (32, 64), 8: (32, 64), 16: (64, 128), 32: (128, 255)}


def configs(shipped: Any, dry: bool) -> list[Any]:
    """The one that launch.py has, and the grid."""
    from lion_kernels.kernels import launch

    grid = [
        launch.Config(block, warps, registers)
        for block in (1024, 2048, 4096, 8192)
        for warps in (4, 8)
        for registers in REGISTERS.get(block // (32 * warps), ())
    ]
    found = list(dict.fromkeys([shipped, *grid]))
    return found[:2] if dry else found


def tune(bench: gpu.Bench, report: Report) -> None:
    """Shares of the copy's bytes/s for every launch config of every Triton kernel, best first."""
    from lion_kernels.kernels import launch

    flat = [[bench.flat[0]]]
    places = [("flat", flat, "fp32"), ("flat", flat, "bf16"), ("GPT-2", bench.gpt2, "fp32")]
    works = {
        f"{kind}, {name}": gpu.Workload(shapes, kind, bench.device) for name, shapes, kind in places
    }
    for op, planes in gpu.PLAIN:
        shipped, notes, right = getattr(launch, ROOMS[op]), [], []
        use = partial(setattr, launch, ROOMS[op])
        for config in configs(shipped, bench.is_dry):
            use(config)
            try:
                variant = [(op, planes)]
                wrong = [w for k in ("fp32", "bf16") for w in gpu.wrong_ops(bench, variant, k)]
            except Exception as error:  # a config that the compiler or the device refuses
                wrong = [f"{type(error).__name__}: {str(error).strip()[:160]}"]
            notes += [f"{config}: no time, {message}" for message in wrong]
            right += [] if wrong else [config]
        found: dict[Any, list[float]] = {config: [] for config in right}
        for label, work in works.items():
            call = work.call(bench.ops, op, planes)
            n_bytes = work.n_bytes(op, planes)
            cases = [
                Case(str(c), lambda c=c, use=use, call=call: (use(c), call()), n_bytes)
                for c in right
            ]
            for config, result in zip(right, gpu.shares(bench, label, cases)[1:], strict=True):
                found[config].append(result.ratio)
        use(shipped)
        best = sorted(found, key=lambda config: -mean(found[config]))
        rows = [
            {"block": c.block, "num_warps": c.num_warps, "registers": c.registers}
            | {label: round(share, 4) for label, share in zip(works, found[c], strict=True)}
            | {"mean": round(mean(found[c]), 4), "shipped": c == shipped}
            for c in best
        ]
        body = [row | {"shipped": "yes" if row["shipped"] else ""} for row in rows]
        table = tabulate(body, headers="keys", floatfmt=".3f")
        report.add(f"tune {ROOMS[op]}", rows, f"{op}: share of the copy's bytes/s", table, *notes)


if __name__ == "__main__":
    gpu.run({"tune": tune}, "gpu-tune", __doc__)
