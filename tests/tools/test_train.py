"""The job of `make train`, for a few steps of a small model: what a first user runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--steps 3 --width 24 --layers 1 --context 16 --eval-every 2 --eval-windows 8 --warmup 1"


def test_every_method_trains_and_counts_its_bytes(tmp_path):
    """It compares the bytes that the optimizer says with those that collectives were handed."""
    for needed in ("tqdm", "tabulate", "matplotlib"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["examples/train_bytes.py", *SMALL.split(), "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    methods = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert len(methods) == 4 and all(run["finished"] for run in methods)
