"""The forecast beside the measurement: every op of the GPU bench finds its kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
import foreseen  # noqa: E402
from peers import KINDS  # noqa: E402
from workload import VARIANTS, name_of  # noqa: E402


def test_every_op_of_the_bench_has_a_forecast():
    """By the names that codegen.py gives, asked of itself."""
    script = (
        "import json, codegen; print(json.dumps([(v.room, v.name) for v in codegen.variants()]))"
    )
    folders = f"{ROOT / 'tools'}:{ROOT}"
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": folders, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
    )  # fmt: skip
    compiled = [
        {"kernel": room, "variant": name, "forecast": {"H100": {"ratio": i / 100}}}
        for i, (room, name) in enumerate(json.loads(outcome.stdout))
    ]
    cases = [f"{name_of(*v)}, {kind}, 1e8" for kind in KINDS for v in VARIANTS]
    measured = [{"case": case, "ratio": i / 100} for i, case in enumerate(cases)]
    rows = foreseen.beside(compiled, [*measured, {"case": "copy, fp32, 1e8", "ratio": 1}])
    assert [row["case"] for row in rows] == cases
    assert [row["measured"] for row in rows] == [row["ratio"] for row in measured]
    # Applying a verdict reads no momentum: kinds with the same parameters share its kernel.
    named = {foreseen.variant_of(*v, kind) for kind in KINDS for v in VARIANTS}
    assert len({tuple(row["forecast"].items()) for row in rows}) == len(named)
