"""The codegen contract: what the compiler makes of every Triton kernel that ships, without a GPU,
and what its arithmetic leaves of the memory's time, as a forecast.

Compiling takes about a minute on two cores, seconds where Triton has the kernels in its cache.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import codegen
import forecast

ROOT = Path(__file__).parents[2]


def figures(*args):
    """What codegen.py says. Its own process: this one interprets."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tools" / "codegen.py"), "--json", *args]
    outcome = subprocess.run(command, env=env, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def compiled():
    """The figures of every variant on every architecture."""
    return figures()


pytestmark = pytest.mark.timeout(900)


def faults(rows, is_faulty):
    return [f"{r['kernel']} {r['variant']} sm_{r['arch']}: {r}" for r in rows if is_faulty(r)]


def test_every_variant_compiles_everywhere(compiled):
    """3 x 4 types, plain and with options; those that agree; binary and ternary, cautious or not; 3
    types, five numbers of planes, cautious or not; 16-bit parameters with each of three roundings;
    three architectures."""
    counts = {}
    for row in compiled:
        key = row["kernel"], row["arch"]
        counts[key] = counts.get(key, 0) + 1
    wanted = {
        "step": 2 * 4 * (1 + 2 * 3),
        "agreeing": 12,
        "encode": 48,
        "apply": 2 * 5 * (1 + 2 * 3),
    }
    assert counts == {(k, arch): n for k, n in wanted.items() for arch in (80, 90, 100)}


def test_full_tiles_move_16_bytes_at_a_time(compiled):
    """As many 16-byte loads and stores as g, m and p have; masked tiles have none."""
    assert all(row["loads_16_bytes_wanted"] > 0 for row in compiled)
    assert not faults(compiled, lambda r: r["loads_16_bytes"] != r["loads_16_bytes_wanted"])
    assert not faults(compiled, lambda r: r["stores_16_bytes"] != r["stores_16_bytes_wanted"])


def test_no_stack_and_no_local_memory(compiled):
    assert not faults(compiled, lambda r: r["stack"] != 0 or r["local"] != 0)


def test_registers_stay_within_the_launch_configs(compiled):
    assert all(row["registers"] > 0 for row in compiled)
    assert not faults(compiled, lambda r: r["registers"] > r["registers_budget"])


@pytest.fixture(scope="module")
def forecasts(compiled):
    """(row, chip, its figures) of every kernel."""
    found = [(row, chip, f) for row in compiled for chip, f in row["forecast"].items()]
    if not found:
        pytest.skip("triton has no nvdisasm")
    assert {chip for _, chip, _ in found} == set(forecast.CHIPS)
    return found


def test_bytes_stay_with_the_threads_of_their_elements(forecasts):
    """Eight elements of 16 bits are one load and one byte: no tile of them needs another thread's.
    Those of float32 are two loads, which share a byte."""
    rows = [
        (row, f)
        for row, _, f in forecasts
        if (row["kernel"] == "encode" and re.search("momentum b?float16", row["variant"]))
        or (row["kernel"] == "apply" and not row["variant"].startswith("float32"))
    ]
    assert len(rows) > 100
    assert not [(row["variant"], f) for row, f in rows if f["barriers"] or f["shuffles"]]


def test_arithmetic_leaves_the_memory_its_time(forecasts):
    """Plain encode, apply and step, in every type, on A100 and H100; whatever takes more has its
    reason in codegen.py. The forecast is none of the other chips' contract."""
    held = [row for row in forecasts if row[1] in forecast.HELD_TO]
    above = [row for row in held if row[2]["ratio"] > forecast.MOST]
    assert not [(row, f) for row, _, f in above if codegen.reason_for(row) is None]
    for kind, _ in codegen.REASONS:
        assert any(re.search(kind, row["variant"]) for row, _, _ in above), f"{kind!r} is stale"


def test_enough_is_asked_of_memory_at_once(forecasts):
    """At 3.35 TB/s and 0.7 us a multiprocessor of an H100 has 18 KiB on their way; half as many
    again, because no program loads all of the time."""
    assert min(f["KiB in flight"] for _, chip, f in forecasts if chip == "H100") >= 27


def test_amd_compiles():
    """No claim beyond that."""
    if "amd" not in triton.backends.backends:
        pytest.skip("triton has no back end for AMD")
    rows = figures("--amd")
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in codegen.KERNELS for arch in ("gfx942", "gfx950")
    }
    assert not [row for row in rows if row["spilled"] or row["16-byte loads"] == 0]


def test_the_full_tile_is_found():
    """The way that moves most in whole vectors: through the branch, once through the loop."""
    sass = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   FFMA R4, R4, R5, R6 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
        /*0080*/                   CALL.REL.NOINC `($slowpath) ;
.L_x_3:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
"""
    seen = forecast.full_tile(sass)
    assert dict(seen) == {
        "S2R": 1, "BRA": 3, "LDG.E.128": 1, "FFMA": 1, "STG.E.128": 1, "EXIT": 1,
    }  # fmt: skip
    work = forecast.work_of(sass)
    assert work.by_pipe == {"none": 5, "lsu": 8, "fma": 1}
    assert forecast.cycles(work, 4, 90)["issue"] == 8
