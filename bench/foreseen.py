"""The compiler's forecast of each kernel beside what was measured of it. Knows no clock and no
compiler: rows of `tools/codegen.py --json` and of section `ops` of bench/gpu.py.
"""

from typing import Any

from peers import KINDS
from workload import VARIANTS, name_of

Rows = list[dict[str, Any]]


def variant_of(op: str, planes: int, kind: str) -> tuple[str, str]:
    """The kernel and the variant that codegen.py compiles for an op of the bench."""
    p, m = (str(dtype).removeprefix("torch.") for dtype in KINDS[kind])
    if op == "apply":
        return op, f"{p}, planes {planes}, nearest"
    if op == "encode":
        return op, f"{p}, momentum {m}, {'ternary' if planes == 2 else 'binary'}"
    return "step", f"{p}, momentum {m}, nearest"


def beside(compiled: Rows, measured: Rows) -> Rows:
    """A row for every measured case that has a forecast: the time of arithmetic over that of
    memory, by chip of the compiled architecture, and the share of a plain kernel with the same
    mix of reads and writes that was reached."""
    forecasts = {(row["kernel"], row["variant"]): row["forecast"] for row in compiled}
    rows: Rows = []
    for kind in KINDS:
        for op, planes in VARIANTS:
            chips = forecasts.get(variant_of(op, planes, kind))
            prefix = f"{name_of(op, planes)}, {kind}, "
            for row in measured if chips else ():
                # The rest is a size: "bf16, " begins "bf16, int8 momentum, " too.
                if row["case"].startswith(prefix) and "," not in row["case"][len(prefix) :]:
                    ratios = {chip: round(f["ratio"], 2) for chip, f in chips.items()}
                    rows.append({"case": row["case"], "forecast": ratios, "measured": row["ratio"]})
    return rows
