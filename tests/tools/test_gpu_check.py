"""`make gpu-check` where its steps do not end well: what it says then, and what it keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
import gpu_check  # noqa: E402

CUT_OFF = """
import os, signal

def test_quick():
    pass

def test_wrong():
    assert 1 == 2, "a message"

def test_endless():
    os.kill(os.getpid(), signal.SIGKILL)

def test_never_begun():
    pass
"""


@pytest.fixture
def check(tmp_path):
    return gpu_check.Check(True, tmp_path, tmp_path / "logs", {"gpu": "none", "date": "today"})


def test_a_test_run_that_is_cut_off_says_where_and_keeps_the_rest(check, tmp_path):
    file = tmp_path / "test_cut_off.py"
    file.write_text(CUT_OFF)
    outcome = gpu_check.run_tests(check, "tests", [str(file)], 100)
    assert outcome.word == "FAILED" and "1 passed, 1 failed" in outcome.summary
    journal = check.logs / "tests.jsonl"
    outcome = gpu_check.judged("tests", gpu_check.Ended(None, "", "", 100.0), journal)
    assert outcome.word == "FAILED"
    assert "cut off after 100 s in " in outcome.summary
    assert "test_cut_off.py::test_endless; 2 not run" in outcome.summary
    assert "1 passed, 1 failed, 0 skipped: " in outcome.summary
    assert "test_wrong" in outcome.summary and "a message" in journal.read_text()


def test_a_run_without_a_test_is_no_success(check, tmp_path):
    outcome = gpu_check.run_tests(check, "tests", [str(tmp_path / "test_missing.py")], 100)
    assert outcome.word == "FAILED" and "test_missing.py" in outcome.summary


def test_a_step_that_is_cut_off_shows_its_stacks(check):
    ended = check.run("step", [sys.executable, "-c", "import time; time.sleep(99)"], 3)
    assert ended.status is None and "cut off after" in ended.why
    assert "most recent call first" in ended.log


def test_results_are_in_the_folder_also_after_a_failure(tmp_path):
    out = tmp_path / "new" / "out"
    command = [sys.executable, "tools/gpu_check.py", "--dry-run", "--out", str(out)]
    more = ["--only", "tests", "racecheck", "--seconds", "1"]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cut off after" in done.stdout
    (figures,) = out.glob("gpu-check-*.json")
    steps = json.loads(figures.read_text())["sections"]["check"]
    assert [(step["step"], step["ok"]) for step in steps] == [("tests", False), ("racecheck", None)]
    assert "cut off after" in figures.with_suffix(".md").read_text()
    logs = {path.name for path in (out / "logs").iterdir()}
    assert logs >= {"tests.out", "tests.log", "racecheck.out", "racecheck.log"}
    depths = {len(path.relative_to(out).parts) for path in out.rglob("*")}
    assert max(depths) <= 2
