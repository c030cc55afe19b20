"""How everything in bench/ is timed, printed and kept: rounds, medians, tables, header, ceiling.

In each round every case is called once, in an order that is reversed in every other round. A ratio
is the median of the rounds' ratios, not the ratio of two medians: what slows one call on a noisy
machine slows its neighbours in the same round. Knows no optimizers and no ops.
"""

import ctypes
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from tabulate import tabulate
from tqdm import tqdm

import lion_kernels

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One thing to time, perhaps compared with the case named ``against``."""

    name: str
    call: Callable[[], object]
    n_bytes: int = 0  # read plus written; 0: not counted
    against: str = ""
    target: float | None = None  # of the ratio, which should be at least this


@dataclass(frozen=True)
class Result:
    case: Case
    seconds: list[float]
    ratio: float | None

    @property
    def ms(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile."""
        fifths = quantiles(self.seconds, n=5, method="inclusive")
        return 1e3 * median(self.seconds), 1e3 * fifths[0], 1e3 * fifths[-1]

    @property
    def gb_per_s(self) -> float | None:
        return self.case.n_bytes / self.ms[0] / 1e6 if self.case.n_bytes else None

    @property
    def reached(self) -> str:
        if self.case.target is None or self.ratio is None:
            return ""
        return "yes" if self.ratio >= self.case.target else "NO"


def rate_ratio(mine: Case, other: Case, seconds: float, other_seconds: float) -> float:
    """Bytes/s over bytes/s of the other: what share of a ceiling is reached."""
    return (mine.n_bytes / seconds) / (other.n_bytes / other_seconds)


def time_ratio(mine: Case, other: Case, seconds: float, other_seconds: float) -> float:
    """How many times as long as the other."""
    return seconds / other_seconds


def measure(
    cases: list[Case], rounds: int, warmup: int, label: str, ratio: Callable[..., float]
) -> list[Result]:
    """Call every case once a round; drop the first ``warmup`` rounds."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for r in tqdm(range(warmup + rounds), desc=label, leave=False, disable=None):
        for case in cases if r % 2 == 0 else reversed(cases):
            start = time.perf_counter()
            case.call()
            elapsed = time.perf_counter() - start
            if r >= warmup:
                seconds[case.name].append(elapsed)
    by_name = {case.name: case for case in cases}
    results = []
    for case in cases:
        middle = None
        if case.against:
            other, mine = by_name[case.against], seconds[case.name]
            pairs = zip(mine, seconds[other.name], strict=True)
            middle = median(ratio(case, other, *pair) for pair in pairs)
        results.append(Result(case, seconds[case.name], middle))
    return results


def rows_of(results: list[Result]) -> list[dict[str, object]]:
    """Results as plain values, for JSON."""
    rows = []
    for r in results:
        mid, low, high = r.ms
        rows.append(
            {
                "case": r.case.name,
                "ms": round(mid, 4),
                "ms_p20": round(low, 4),
                "ms_p80": round(high, 4),
                "bytes": r.case.n_bytes or None,
                "gb_per_s": None if r.gb_per_s is None else round(r.gb_per_s, 2),
                "against": r.case.against or None,
                "ratio": None if r.ratio is None else round(r.ratio, 4),
                "target": r.case.target,
                "reached": {"yes": True, "NO": False}.get(r.reached),
            }
        )
    return rows


def table(results: list[Result], ratio_header: str) -> str:
    rows = []
    for r in results:
        mid, low, high = r.ms
        rows.append(
            [
                r.case.name,
                f"{mid:.2f} ({low:.2f}-{high:.2f})",
                "" if r.gb_per_s is None else f"{r.gb_per_s:.1f}",
                "" if r.ratio is None else f"{r.ratio:.2f}",
                "" if r.case.target is None else f">= {r.case.target:g}",
                r.reached,
            ]
        )
    headers = ["case", "ms (p20-p80)", "GB/s", ratio_header, "target", "reached"]
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 5)


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        done = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return "none"
    if done.returncode != 0:
        return "none"
    return done.stdout.strip() + (" with changes" if changed.stdout else "")


def header() -> dict[str, object]:
    info = lion_kernels.build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": info["simd"],
        "torch": torch.__version__,
        "lion_kernels": lion_kernels.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def save(head: dict[str, object], sections: dict[str, object]) -> Path:
    """Write bench/results/cpu-<model>-<date>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(head["cpu"]).lower()).strip("-")
    path = ROOT / "bench" / "results" / f"cpu-{slug}-{head['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"header": head, "sections": sections}, indent=1) + "\n")
    return path


def load_ceiling() -> ctypes.CDLL:
    """Compile bench/ceiling.cpp for this machine into build/, and load it."""
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(f"the bench needs a C++ compiler, and {compiler!r} is not there: set CXX")
    library = ROOT / "build" / "ceiling.so"
    library.parent.mkdir(exist_ok=True)
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    source = str(ROOT / "bench" / "ceiling.cpp")
    done = subprocess.run([*compiler.split(), *flags, source, "-o", str(library)])
    if done.returncode != 0:
        sys.exit(f"{compiler} could not compile bench/ceiling.cpp")
    return ctypes.CDLL(str(library))
