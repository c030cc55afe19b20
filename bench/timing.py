"""How everything in bench/ is timed, printed and kept: rounds, medians, tables, header, ceiling.

In each round every case is called once, in an order that is reversed in every other round. A ratio
is the median of the rounds' ratios, not the ratio of two medians: what slows one call on a noisy
machine slows its neighbours in the same round. A clock says how one call is timed: on the host's
clock, or on the GPU's. Knows no optimizers and no ops.
"""

import ctypes
import datetime
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    limit: float | None = None  # of the ratio, which should be at most this


@dataclass(frozen=True)
class Result:
    case: Case
    seconds: list[float]
    ratio: float | None
    host_us: float | None = None  # until the call returned, where that was measured

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
        low, high = self.case.target, self.case.limit
        if self.ratio is None or low is high is None:
            return ""
        misses = (low is not None and self.ratio < low) or (high is not None and self.ratio > high)
        return "NO" if misses else "yes"

    @property
    def wanted(self) -> str:
        if self.case.limit is not None:
            return f"<= {self.case.limit:g}"
        return "" if self.case.target is None else f">= {self.case.target:g}"


def rate_ratio(mine: Case, other: Case, seconds: float, other_seconds: float) -> float:
    """Bytes/s over bytes/s of the other: what share of a ceiling is reached."""
    return (mine.n_bytes / seconds) / (other.n_bytes / other_seconds)


def time_ratio(mine: Case, other: Case, seconds: float, other_seconds: float) -> float:
    """How many times as long as the other."""
    return seconds / other_seconds


def wall_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call, on the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def device_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call on the current CUDA stream, between two events. Where the host is slower
    than the device, the device's waiting counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def host_us(call: Callable[[], object], rounds: int) -> float:
    """Median microseconds until a call returns; the device may still be at what it launched."""
    seconds = []
    for _ in range(rounds):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(wall_clock(call, 1))
    return 1e6 * median(seconds)


@dataclass(frozen=True)
class How:
    """How cases are timed. ``enough_s``: what one measurement should take, so that short calls are
    repeated in it; 0: one call each."""

    rounds: int
    warmup: int  # rounds dropped before
    clock: Callable[[Callable[[], object], int], float] = wall_clock
    enough_s: float = 0.0


def measure(
    cases: list[Case], how: How, label: str, ratio: Callable[..., float], host: bool = False
) -> list[Result]:
    """Time every case once a round; ``host``: also until its call returns. The results do not keep
    the calls, nor the tensors that these hold."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    calls = dict.fromkeys(seconds, 1)
    for r in tqdm(range(how.warmup + how.rounds), desc=label, leave=False, disable=None):
        for case in cases if r % 2 == 0 else reversed(cases):
            elapsed = how.clock(case.call, calls[case.name])
            if r >= how.warmup:
                seconds[case.name].append(elapsed)
            elif r == how.warmup - 1:
                calls[case.name] = max(1, min(100, math.ceil(how.enough_s / elapsed)))
    by_name = {case.name: case for case in cases}
    results = []
    for case in cases:
        middle = None
        if case.against:
            other, mine = by_name[case.against], seconds[case.name]
            pairs = zip(mine, seconds[other.name], strict=True)
            middle = median(ratio(case, other, *pair) for pair in pairs)
        kept = replace(case, call=_not_kept)
        until_returned = host_us(case.call, how.rounds) if host else None
        results.append(Result(kept, seconds[case.name], middle, until_returned))
    return results


def _not_kept() -> None:
    raise RuntimeError("the call of a result is not kept")


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replay of a CUDA graph."""
    call()  # compiles, and builds the tables: neither can be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launched(call: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the kernels, copies and fills that a call puts on the device."""
    kind = "CUDA" if device.type == "cuda" else "CPU"
    for _ in range(2):  # the first profile of a process may miss the first events
        with torch.profiler.profile(
            activities=[getattr(torch.profiler.ProfilerActivity, kind)]
        ) as profiler:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == getattr(torch.autograd.DeviceType, kind)
        and not event.is_user_annotation
        and not event.name.startswith("Optimizer.")
    ]


def waits(call: Callable[[], object]) -> str:
    """What makes the call wait for the CUDA device, or "no"."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


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
        if r.case.limit is not None:
            rows[-1]["limit"] = r.case.limit
        if r.host_us is not None:
            rows[-1]["host_us"] = round(r.host_us, 2)
    return rows


def table(results: list[Result], ratio_header: str) -> str:
    headers = ["case", "ms (p20-p80)", "GB/s", ratio_header, "target", "reached"]
    digits = 2 if all(r.ms[0] >= 1 for r in results) else 3
    rows = []
    for r in results:
        mid, low, high = (f"{ms:.{digits}f}" for ms in r.ms)
        rows.append(
            [
                r.case.name,
                f"{mid} ({low}-{high})",
                "" if r.gb_per_s is None else f"{r.gb_per_s:.1f}",
                "" if r.ratio is None else f"{r.ratio:.2f}",
                r.wanted,
                r.reached,
            ]
        )
    if any(r.host_us is not None for r in results):
        headers.insert(2, "host us")
        for row, r in zip(rows, results, strict=True):
            row.insert(2, "" if r.host_us is None else f"{r.host_us:.0f}")
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


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


def result_path(kind: str, model: object, date: object) -> Path:
    """bench/results/<kind>-<model>-<date>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(model).lower()).strip("-")
    return ROOT / "bench" / "results" / f"{kind}-{slug}-{date}.json"


def save(path: Path, head: dict[str, object], sections: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"header": head, "sections": sections}, indent=1) + "\n")


class Report:
    """What a run prints and, with a path, keeps: the figures as JSON, the text beside it as .md.
    Written after every section, so that a run that is stopped leaves what it has."""

    def __init__(self, head: dict[str, object], path: Path | None) -> None:
        self.head, self.path = head, path
        self.sections: dict[str, object] = {}
        facts = ", ".join(f"{key} {value}" for key, value in head.items())
        self.text = f"# lion_kernels on {head['gpu']}\n\n{facts}\n"
        print(f"{facts}\n")

    def add(self, name: str, rows: list[dict[str, object]], title: str, *body: str) -> None:
        lines = "\n".join(body)
        print(f"{name}: {title}\n{lines}\n", flush=True)
        self.sections[name] = rows
        self.text += f"\n## {name}\n\n{title}\n\n```\n{lines}\n```\n"
        if self.path is not None:
            save(self.path, self.head, self.sections)
            self.path.with_suffix(".md").write_text(self.text)


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
