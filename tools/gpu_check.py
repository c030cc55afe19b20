"""`make gpu-check`: whether this machine's GPU does what the tests and the targets say.

Steps in the order of what is lost without them: the compiler's figures of the Triton kernels, for
this device alone, which also fills Triton's cache for all that follows; the tests that a GPU
changes; bench/gpu.py; bench/host.py; compute-sanitizer on what time is left. Each is a process
with a time limit. After each the outcomes are written anew, so that a check that is killed leaves
what it has. Fails where a step failed or the tests were cut off; a missed target is printed as NO,
and is no failure.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch.utils.cpp_extension import CUDA_HOME
from tqdm import tqdm

import lion_kernels

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import timing
from foreseen import beside

# All steps together, so that a machine that ends a command after ten minutes sees the end of it.
TOTAL_S = 450
# The tests that run something on the GPU: with it as a back end, test_ops.py and test_cuda.py.
ON_GPU = "(cuda or test_ops) and not cuda_source"
# In a dry run its kernels run on the host, slowly: some tests of every op.
DRY = ["-k", "GPU and (sizes or edges or shards)"]


@dataclass(frozen=True)
class Outcome:
    """One step: ``ok`` is None where it could not run here, or not to its end."""

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

    @property
    def last_line(self) -> str:
        lines = [line for text in (self.stdout, self.log) for line in text.splitlines() if line]
        return lines[-1][:160] if lines else "no output"

    @property
    def why(self) -> str:
        """What to say where it is no success."""
        return f"cut off after {self.seconds:.0f} s" if self.status is None else self.last_line


@dataclass
class Check:
    """What the steps share: where results go, and how much time is left."""

    dry: bool
    folder: Path  # of the figures
    logs: Path  # of what the steps said
    head: dict[str, object]
    seconds: float = TOTAL_S
    compiled: list[dict[str, object]] = field(default_factory=list)
    measured: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.logs.mkdir(parents=True, exist_ok=True)
        paths = [str(timing.ROOT), str(timing.ROOT / "tests" / "helpers")]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        # A process that is cut off says on its way where it was.
        self.env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONFAULTHANDLER="1")

    def path(self, stem: str) -> Path:
        return timing.result_path(stem, self.head["gpu"], self.head["date"], self.folder)

    def run(self, name: str, command: list[str], limit_s: float, **env: str) -> Ended:
        """Run a command in the root of the repository; its output is kept in the logs."""
        out, log = self.logs / f"{name}.out", self.logs / f"{name}.log"
        limit_s = max(1.0, min(limit_s, self.deadline - time.monotonic()))
        start = time.monotonic()
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, cwd=timing.ROOT, env=self.env | env,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
                process.send_signal(signal.SIGABRT)  # its stacks into the log
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            finally:
                # With all that it started: the tests start processes of their own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = (path.read_text(errors="replace") for path in (out, log))
        return Ended(status, *texts, time.monotonic() - start)


def codegen(check: Check) -> Outcome:
    """The compiler's figures for the architecture of this device; in a dry run, for sm_90."""
    major, minor = (9, 0) if check.dry else torch.cuda.get_device_capability()
    arch = f"{major}{minor}"
    command = [sys.executable, "tools/codegen.py", "--json", "--arch", arch]
    ended = check.run("codegen", command, 150 if check.dry else 100)
    if ended.status != 0:  # without a cache the other steps compile for themselves
        return Outcome("codegen", None if ended.status is None else False, ended.seconds, ended.why)
    check.compiled = rows = json.loads(ended.stdout)
    most = max(row["registers"] for row in rows)
    spilling = sum(row["stack"] + row["local"] > 0 for row in rows)
    summary = f"{len(rows)} kernels for sm_{arch}: at most {most} registers, {spilling} spill"
    return Outcome("codegen", True, ended.seconds, summary)


def judged(step: str, ended: Ended, journal: Path) -> Outcome:
    """The outcome of a pytest run, from what its tests wrote as they went (journal.py)."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    collected, begun, outcomes = 0, "", {}
    for entry in entries:
        collected, begun = entry.get("collected", collected), entry.get("begun", begun)
        if "ended" in entry:
            outcomes[entry["ended"]] = entry["outcome"]
    names = {
        kind: [test for test, outcome in outcomes.items() if outcome == kind]
        for kind in ("passed", "failed", "skipped")
    }
    bad, passed = names["failed"], len(names["passed"])
    summary = f"{passed} passed, {len(bad)} failed, {len(names['skipped'])} skipped"
    if bad:
        summary += ": " + ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    if ended.status is None:
        where = f"in {begun}" if begun not in outcomes else f"after {begun}"
        where = where if begun else "before the first test"
        summary = f"{ended.why} {where}; {collected - len(outcomes)} not run; {summary}"
    elif ended.status != 0 and not bad:
        summary = f"{ended.why}; {summary}"
    return Outcome(step, ended.status == 0 and passed > 0, ended.seconds, summary)


def run_tests(check: Check, step: str, which: list[str], limit_s: float) -> Outcome:
    journal = (check.logs / f"{step}.jsonl").resolve()
    journal.unlink(missing_ok=True)
    # A warning that only a GPU brings fails no run there: it stands in the log.
    options = ["-p", "journal", "--durations=15", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options, *which]
    return judged(step, check.run(step, command, limit_s, JOURNAL=str(journal)), journal)


def tests(check: Check) -> Outcome:
    return run_tests(check, "tests", DRY if check.dry else ["-k", ON_GPU], 180)


def bench(check: Check) -> Outcome:
    """bench/gpu.py, which writes its figures beside ours as it goes."""
    path = check.path("gpu")
    path.unlink(missing_ok=True)  # what an earlier run wrote is no outcome of this one
    command = [sys.executable, "bench/gpu.py", "--save", str(check.folder)]
    ended = check.run("bench", command + ["--dry-run"] * check.dry, 270)
    print(ended.stdout)
    sections = json.loads(path.read_text())["sections"] if path.exists() else {}
    check.measured = sections.get("ops", [])
    rows = [row for section in sections.values() for row in section]
    reached = sum(row.get("reached") is True for row in rows)
    missed = [str(row["case"]) for row in rows if row.get("reached") is False]
    summary = f"{', '.join(sections) or 'nothing'} measured; {reached} targets reached, "
    summary += f"{len(missed)} NO" + (f": {'; '.join(missed)}" if missed else "")
    if check.dry:
        summary = f"dry run of {', '.join(sections)}"
    if ended.status == 0:
        return Outcome("bench", True, ended.seconds, summary)
    print(ended.log)
    ok = None if ended.status is None and sections else False
    return Outcome("bench", ok, ended.seconds, f"{ended.why}; {summary}")


def host(check: Check) -> Outcome:
    """bench/host.py: what a step costs the host, beside fused AdamW."""
    command = [sys.executable, "bench/host.py", "--save", str(check.folder)]
    ended = check.run("host", command + ["--rounds", "5"] * check.dry, 60)
    print(ended.stdout)
    if ended.status == 0:
        return Outcome("host", True, ended.seconds, "dry run" if check.dry else "measured")
    return Outcome("host", None if ended.status is None else False, ended.seconds, ended.why)


def sanitizer() -> str | None:
    # The second, because torch's CUDA_HOME is no toolkit where nvcc is a wrapper script.
    folders = [*filter(None, [CUDA_HOME]), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders)])
    return shutil.which("compute-sanitizer", path=path)


def sanitized(check: Check, tool: str) -> Outcome:
    """memcheck or racecheck of every op on tensors of ragged sizes. Allocations are the driver's
    own, or an overrun within a segment of torch's would go unseen."""
    program = sanitizer()
    if program is None and not check.dry:
        return Outcome(tool, None, 0.0, "compute-sanitizer is not installed")
    command = [sys.executable, "bench/gpu.py", "--check-only"]
    if check.dry:
        command += ["--dry-run"]
    else:
        # torch asks the driver for things that may be missing: no errors of ours.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        options += ["--target-processes", "application-only"]
        command = [str(program), "--tool", tool, *options, *command]
    ended = check.run(tool, command, 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if check.dry or ended.status is None:
        ok = None if ended.status is None else ended.status == 0
        return Outcome(tool, ok, ended.seconds, ended.why)
    # "ERROR SUMMARY: 0 errors"; "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", ended.stdout + ended.log)
    if found is None:
        return Outcome(tool, None, ended.seconds, f"could not run: {ended.last_line}")
    clean = int(found.group(1)) == 0 and ended.status == 0
    return Outcome(tool, clean, ended.seconds, found.group(0))


STEPS: dict[str, Callable[[Check], Outcome]] = {
    "codegen": codegen,
    "tests": tests,
    "bench": bench,
    "host": host,
    "memcheck": lambda check: sanitized(check, "memcheck"),
    "racecheck": lambda check: sanitized(check, "racecheck"),
}


def steps_table(outcomes: list[Outcome]) -> str:
    rows = [[o.step, o.word, f"{o.seconds:.0f}", o.summary] for o in outcomes]
    return tabulate(rows, ["step", "result", "s", "what"], maxcolwidths=[None, None, None, 90])


def keep(check: Check, outcomes: list[Outcome]) -> None:
    """All outcomes so far, as JSON and as a table."""
    path, head = check.path("gpu-check"), check.head
    steps = [asdict(outcome) for outcome in outcomes]
    foreseen = beside(check.compiled, check.measured)
    sections = {"check": steps, "foreseen": foreseen, "codegen": check.compiled}
    timing.save(path, head, sections)
    facts = ", ".join(f"{key} {value}" for key, value in head.items())
    text = f"# gpu-check on {head['gpu']}\n\n{facts}\n\n```\n{steps_table(outcomes)}\n```\n"
    if foreseen:
        rows = [[*row.values()] for row in foreseen]
        headers = ["case", "forecast: arithmetic's time over memory's", "measured: share of plain"]
        text += f"\n```\n{tabulate(rows, headers)}\n```\n"
    path.with_suffix(".md").write_text(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dry-run", action="store_true", help="the same steps without a GPU, on little")
    add("--out", type=Path, help="folder of the results and of what the steps said")
    add("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps (default all)")
    add("--seconds", type=float, default=TOTAL_S, help=f"for all of them (default {TOTAL_S})")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device, and torch has none")
    elif not lion_kernels.build_info()["cuda"]:
        sys.exit("lion_kernels was built without CUDA: build it with LION_KERNELS_CUDA=1")
    return args


def main() -> None:
    args = arguments()
    # What ends this process ends the step it is in; a step that is aborted leaves no core.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gpu = timing.NO_GPU if args.dry_run else torch.cuda.get_device_name()
    built = {key: str(value) for key, value in lion_kernels.build_info().items()}
    head = {"gpu": gpu, "python": sys.version.split()[0], **timing.header(), "build": built}
    logs = timing.ROOT / "build" / "gpu-check"
    folder = logs if args.dry_run else timing.RESULTS
    if args.out:
        folder, logs = args.out.resolve(), args.out.resolve() / "logs"
    check = Check(args.dry_run, folder, logs, head, args.seconds)
    outcomes: list[Outcome] = []
    with tqdm(total=len(args.only), unit="step", disable=None) as bar:
        for name in args.only:
            outcome = STEPS[name](check)
            outcomes.append(outcome)
            keep(check, outcomes)
            bar.write(f"{outcome.step}: {outcome.word}, {outcome.seconds:.0f} s, {outcome.summary}")
            bar.update()
    print(steps_table(outcomes))
    print(f"results: {check.path('gpu-check')}; what the steps said: {check.logs}")
    sys.exit(any(outcome.ok is False for outcome in outcomes))


if __name__ == "__main__":
    main()
