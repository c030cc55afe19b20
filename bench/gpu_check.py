"""`make gpu-check`: whether this machine's GPU does what the tests and the targets say.

Runs the tests on the device, compute-sanitizer on the tally, the compiler's figures of the Triton
kernels, and bench/gpu.py, each as a process with a time limit; adds the outcomes to the bench's
JSON and .md. Fails where a step failed; a missed target is printed as NO, and is no failure.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch.utils.cpp_extension import CUDA_HOME
from tqdm import tqdm

import lion_kernels
import timing

LOGS = timing.ROOT / "build" / "gpu-check"
# All steps together, which each have a limit of their own as well.
TOTAL_S = 470
# Everything is slower under the sanitizers: some tests of every kind of shape.
SANITIZED = "cuda and (tile_edges or strided or (random_ballots and (8 or 17)))"


@dataclass(frozen=True)
class Outcome:
    """One step: ``ok`` is None where it could not run here."""

    step: str
    ok: bool | None
    seconds: float
    summary: str

    @property
    def word(self) -> str:
        return {True: "ok", False: "FAILED", None: "-"}[self.ok]


@dataclass(frozen=True)
class Ended:
    """How a process ended: ``status`` is None where its time was over."""

    status: int | None
    stdout: str
    log: str
    seconds: float


class Check:
    """The steps' processes and how much time is left for them."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.deadline = time.monotonic() + TOTAL_S
        paths = [str(timing.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        LOGS.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str], limit_s: float) -> Ended:
        """Run a command in the root of the repository; its output is kept in LOGS."""
        out, log = LOGS / f"{name}.out", LOGS / f"{name}.log"
        limit_s = max(1.0, min(limit_s, self.deadline - time.monotonic()))
        start = time.monotonic()
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, cwd=timing.ROOT, env=self.env,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                # With all that it started: the tests start processes of their own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = (path.read_text(errors="replace") for path in (out, log))
        return Ended(status, *texts, time.monotonic() - start)


def last_line(ended: Ended) -> str:
    lines = [line for text in (ended.stdout, ended.log) for line in text.splitlines() if line]
    return lines[-1][:160] if lines else "no output"


def over(ended: Ended) -> str:
    return f"time limit, after {ended.seconds:.0f} s"


def tests(check: Check) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={xml}"]
        command += ["-k", "test_layout"] if check.dry else []
        ended = check.run("tests", command, 60 if check.dry else 210)
        root = ElementTree.parse(xml).getroot() if xml.exists() else None
    if root is None:
        why = over(ended) if ended.status is None else f"no result: {last_line(ended)}"
        return Outcome("tests", False, ended.seconds, why)
    cases = list(root.iter("testcase"))
    kinds = {
        kind: [case for case in cases if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    bad = kinds["failure"] + kinds["error"]
    passed = len(cases) - len(bad) - len(kinds["skipped"])
    summary = f"{passed} passed, {len(bad)} failed, {len(kinds['skipped'])} skipped"
    if bad:
        names = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
        summary += ": " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return Outcome("tests", ended.status == 0 and passed > 0, ended.seconds, summary)


def sanitizer() -> str | None:
    inside = Path(CUDA_HOME or "/") / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(inside) if inside.is_file() else None)


def sanitized(check: Check, tool: str) -> Outcome:
    """memcheck or racecheck of the tally's tests on the device."""
    program = sanitizer()
    if program is None or check.dry:
        why = "compute-sanitizer is not installed" if program is None else "no device"
        return Outcome(tool, None, 0.0, why)
    # torch asks the driver for things that may be missing: no errors of ours.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    pytest = [sys.executable, "-m", "pytest", "tests/test_tally.py", "-k", SANITIZED]
    command = [program, "--tool", tool, *options, *pytest]
    ended = check.run(tool, command, 60)
    if ended.status is None:
        return Outcome(tool, None, ended.seconds, over(ended))
    # "ERROR SUMMARY: 0 errors"; "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", ended.stdout + ended.log)
    ran = re.search(r"\d+ passed.*", ended.stdout)
    if found is None:
        return Outcome(tool, None, ended.seconds, f"could not run: {last_line(ended)}")
    clean = int(found.group(1)) == 0 and ended.status == 0 and ran is not None
    tested = ran.group(0) if ran else last_line(ended)
    return Outcome(tool, clean, ended.seconds, f"{found.group(0)}; {tested}")


def codegen(check: Check) -> tuple[Outcome, list[dict[str, object]]]:
    """The compiler's figures for the architecture of this device; in a dry run, for sm_90."""
    ended = check.run("codegen", [sys.executable, "tests/codegen.py", "--json"], 90)
    if ended.status != 0:
        why = over(ended) if ended.status is None else last_line(ended)
        return Outcome("codegen", False, ended.seconds, why), []
    major, minor = (9, 0) if check.dry else torch.cuda.get_device_capability()
    arch = 10 * major + minor
    rows = json.loads(ended.stdout)
    mine = [row for row in rows if row["arch"] == arch]
    if not mine:
        archs = sorted({row["arch"] for row in rows})
        why = f"no figures for sm_{arch}, only for {archs}"
        return Outcome("codegen", None, ended.seconds, why), []
    most = max(row["registers"] for row in mine)
    spilling = sum(row["stack"] + row["local"] > 0 for row in mine)
    summary = f"{len(mine)} kernels for sm_{arch}: at most {most} registers, {spilling} spill"
    return Outcome("codegen", True, ended.seconds, summary), mine


def targets(sections: dict[str, list[dict[str, object]]]) -> tuple[int, list[str]]:
    """How many targets were reached, and the cases that missed theirs."""
    rows = [row for section in sections.values() for row in section]
    missed = [str(row["case"]) for row in rows if row.get("reached") is False]
    return sum(row.get("reached") is True for row in rows), missed


def bench(check: Check, path: Path | None) -> Outcome:
    """bench/gpu.py, which writes ``path``."""
    if path is not None:
        path.unlink(missing_ok=True)  # what an earlier run wrote is no outcome of this one
    command = [sys.executable, "bench/gpu.py", "--save" if path else "--dry-run"]
    ended = check.run("bench", command, 240)
    print(ended.stdout)
    if ended.status != 0:
        print(ended.log)
    if ended.status is None:
        return Outcome("bench", False, ended.seconds, over(ended))
    if ended.status != 0:
        return Outcome("bench", False, ended.seconds, last_line(ended))
    if path is None:
        return Outcome("bench", True, ended.seconds, "dry run")
    reached, missed = targets(json.loads(path.read_text())["sections"])
    summary = f"{reached} targets reached, {len(missed)} NO"
    return Outcome("bench", True, ended.seconds, f"{summary}: {'; '.join(missed)}".rstrip(": "))


def keep(path: Path, outcomes: list[Outcome], compiled: list[dict[str, object]]) -> None:
    """Add the check to the bench's files; without these, write them with the check alone."""
    text_path = path.with_suffix(".md")
    if path.exists():
        kept, text = json.loads(path.read_text()), text_path.read_text()
    else:
        head = timing.header() | {"gpu": torch.cuda.get_device_name()}
        kept, text = {"header": head, "sections": {}}, f"# lion_kernels on {head['gpu']}\n"
    steps = [asdict(outcome) for outcome in outcomes]
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "build": {key: str(value) for key, value in lion_kernels.build_info().items()},
    }
    sections = kept["sections"] | {
        "check": {"steps": steps, "versions": versions},
        "codegen": compiled,
    }
    timing.save(path, kept["header"], sections)
    facts = ", ".join(f"{key} {value}" for key, value in versions["build"].items())
    table = f"```\n{steps_table(outcomes)}\n```"
    text_path.write_text(f"{text}\n## check\n\nPython {versions['python']}; {facts}\n\n{table}\n")
    print(f"wrote {path.relative_to(timing.ROOT)} and {text_path.name}")


def steps_table(outcomes: list[Outcome]) -> str:
    rows = [[o.step, o.word, f"{o.seconds:.0f}", o.summary] for o in outcomes]
    return tabulate(rows, ["step", "result", "s", "what"], maxcolwidths=[None, None, None, 90])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: a few tests, saves nothing"
    )
    dry = parser.parse_args().dry_run
    path = None
    if not dry:
        if not torch.cuda.is_available():
            sys.exit("gpu-check needs a CUDA device, and torch has none")
        if not lion_kernels.build_info()["cuda"]:
            sys.exit("lion_kernels was built without CUDA: build it with LION_KERNELS_CUDA=1")
        head = timing.header()
        path = timing.result_path("gpu", torch.cuda.get_device_name(), head["date"])
    check, outcomes, compiled = Check(dry), [], []
    with tqdm(total=5, unit="step", disable=None) as bar:

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            bar.write(f"{outcome.step}: {outcome.word}, {outcome.seconds:.0f} s, {outcome.summary}")
            bar.update()

        done(tests(check))
        for tool in ("memcheck", "racecheck"):
            done(sanitized(check, tool))
        outcome, compiled = codegen(check)
        done(outcome)
        done(bench(check, path))
    print(steps_table(outcomes))
    print(f"output of the steps: {LOGS.relative_to(timing.ROOT)}")
    if path is not None:
        keep(path, outcomes, compiled)
    sys.exit(any(outcome.ok is False for outcome in outcomes))


if __name__ == "__main__":
    main()
