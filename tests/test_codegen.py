"""The codegen contract: what the compiler makes of every Triton kernel that ships, without a GPU.

Compiling takes about a minute on two cores, seconds where Triton has the kernels in its cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled():
    """The figures of every variant on every architecture. Its own process: this one interprets."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "codegen.py"), "--json"]
    outcome = subprocess.run(command, env=env, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


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
