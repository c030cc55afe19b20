"""What the compiler's figures of the Triton kernels must be, and which exceptions have a reason.

Owns the rules; the figures are codegen.py's rows. Knows no compiler and no kernel.
"""

import re
from collections import Counter

import forecast

# Variants a kernel: 3 x 4 types, plain and with options, 16-bit parameters with each of three
# roundings; those that agree; binary and ternary, cautious or not; 3 types, five numbers of planes,
# with blank bits or without, cautious or not.
VARIANTS = {
    "step": 2 * 4 * (1 + 2 * 3),
    "agreeing": 12,
    "encode": 48,
    "apply": 2 * 2 * 5 * (1 + 2 * 3),
}

# Where arithmetic may take more than forecast.MOST of the memory's time, and why.
REASONS = (
    ("int8", "an exact root, a scale and a share of a division make a byte of each momentum"),
    ("stochastic", "16 random bits an element are a hash of 20 integer operations"),
    ("with options|cautious", "comparisons with the gradient's sign and choices, every element"),
    ("planes 16", "sums of more than 127 ranks: 16 bits of an element come from 16 bytes"),
)

# At 3.35 TB/s and 0.7 us a multiprocessor of an H100 has 18 KiB on their way; half as many again,
# because no program loads all of the time.
KIB_IN_FLIGHT = {"H100": 27}


def reason_for(row):
    """Why a kernel's arithmetic may take long; None: it may not."""
    return next((why for kind, why in REASONS if re.search(kind, row["variant"])), None)


def is_above(chip, figures):
    """Whether arithmetic takes more of the memory's time than it may without a reason. The
    forecast is none of the other chips' contract."""
    return chip in forecast.HELD_TO and figures["ratio"] > forecast.MOST


def keeps_bytes(row):
    """Whether bytes stay with the threads of their elements: eight elements of 16 bits are one load
    and one byte, so that no tile needs another thread's. Those of float32 are two loads, which
    share a byte."""
    if row["kernel"] == "encode":
        return re.search("momentum b?float16", row["variant"]) is not None
    return row["kernel"] == "apply" and not row["variant"].startswith("float32")


def broken_by(row):
    """The rules that one row breaks."""
    for key in ("loads_16_bytes", "stores_16_bytes"):
        # As many as g, m and p have; masked tiles have none. Without a write there is no store.
        if row[key] != row[f"{key}_wanted"]:
            yield f"{row[key]} {key}, not {row[f'{key}_wanted']}"
    if row["loads_16_bytes_wanted"] <= 0:
        yield "no 16-byte load is wanted"
    if row["stack"] or row["local"]:
        yield f"spills: stack {row['stack']}, local memory {row['local']}"
    if not 0 < row["registers"] <= row["registers_budget"]:
        yield f"{row['registers']} registers, the launch config has {row['registers_budget']}"
    for chip, figures in row["forecast"].items():
        if keeps_bytes(row) and (figures["barriers"] or figures["shuffles"]):
            yield f"{figures['barriers']} barriers and {figures['shuffles']} shuffles"
        if is_above(chip, figures) and reason_for(row) is None:
            yield f"arithmetic takes {figures['ratio']:.2f} of the memory's time on {chip}"
        if figures["KiB in flight"] < KIB_IN_FLIGHT.get(chip, 0):
            yield f"asks for {figures['KiB in flight']:.0f} KiB at once on {chip}"


def broken(rows):
    """What the figures of some variants break, one line each."""
    found = [
        f"{row['kernel']} {row['variant']} sm_{row['arch']}: {rule}"
        for row in rows
        for rule in broken_by(row)
    ]
    seen = {chip for row in rows for chip in row["forecast"]}
    archs = {row["arch"] for row in rows}
    if seen:  # else triton has no disassembler
        missing = {name for name, chip in forecast.CHIPS.items() if chip.arch in archs} - seen
        found += [f"{chip}: no forecast" for chip in sorted(missing)]
    return found


def incomplete(rows, archs):
    """What the figures of all variants on all architectures lack, one line each."""
    counts = Counter((row["kernel"], row["arch"]) for row in rows)
    wanted = {(kernel, arch): n for kernel, n in VARIANTS.items() for arch in archs}
    found = [
        f"{kernel} sm_{arch}: {counts[kernel, arch]} variants, not {wanted.get((kernel, arch), 0)}"
        for kernel, arch in sorted({*counts, *wanted})
        if counts[kernel, arch] != wanted.get((kernel, arch), 0)
    ]
    forecasts = [(row, chip, f) for row in rows for chip, f in row["forecast"].items()]
    if {chip for _, chip, _ in forecasts} >= set(forecast.HELD_TO):
        above = [row["variant"] for row, chip, f in forecasts if is_above(chip, f)]
        for kind, _ in REASONS:
            if not any(re.search(kind, variant) for variant in above):
                found.append(f"the reason for {kind!r} is stale: none of that kind needs it")
    return found


def broken_on_amd(rows):
    """The same of AMD's rows: every kernel compiles, loads 16 bytes at a time and spills nothing;
    no rows: triton has no back end for AMD."""
    missing = set(VARIANTS) - {row["kernel"] for row in rows} if rows else ()
    return [f"{kernel}: not compiled for AMD" for kernel in sorted(missing)] + [
        f"{row['kernel']} {row['variant']} {row['arch']}: {row['spilled']} registers spilled, "
        f"{row['16-byte loads']} 16-byte loads"
        for row in rows
        if row["spilled"] or not row["16-byte loads"]
    ]
