"""How everything in bench/ is timed, printed and kept: rounds, medians, tables, header, ceiling.

In each round every case is called once, in an order that is reversed in every other round. A ratio
is the median of the rounds' ratios, not the ratio of two medians: what slows one call on a noisy
machine slows its neighbours in the same round. A clock says how calls are timed: on the host's
clock, or on the GPU's, which never starts on an idle device. Knows no optimizers and no ops.
"""

import ctypes
import datetime
import json
import math
import os
import platform
import re
import shlex
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
RESULTS = ROOT / "bench" / "results"
NO_GPU = "none, a dry run"
# For so long a device waits at most while the host fills its queue.
MOST_LEAD_S = 0.05


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
    host_us: float | None = None  # until the call returned, on a device's clock
    queued: float = 1.0  # share of the rounds in which no work of the host's was on the clock

    @property
    def ms(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile."""
        fifths = quantiles(self.seconds, n=5, method="inclusive")
        return 1e3 * median(self.seconds), 1e3 * fifths[0], 1e3 * fifths[-1]

    @property
    def host_bound(self) -> bool:
        return self.queued < 0.8

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


@dataclass(frozen=True)
class Timed:
    """One measurement: seconds of one call, and of its host where a device is timed."""

    seconds: float
    host_s: float | None = None
    queued: bool = True


def wall_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call, on the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def host_clock(call: Callable[[], object], calls: int, lead_s: float) -> Timed:
    return Timed(wall_clock(call, calls))


def device_clock(call: Callable[[], object], calls: int, lead_s: float) -> Timed:
    """One call on the current CUDA stream, between two events. The device first spins for
    ``lead_s``, while the host puts the calls into its queue; ``queued`` says whether the host was
    done when the first of them began, so that the device waited for nothing."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9 * lead_s))  # cycles; at less than 2 GHz it spins longer
    start.record()
    host_s = wall_clock(call, calls)
    queued = not start.query()
    end.record()
    end.synchronize()
    return Timed(start.elapsed_time(end) / 1e3 / calls, host_s, queued)


@dataclass(frozen=True)
class How:
    """How cases are timed. ``enough_s``: what one measurement should take, so that short calls are
    repeated in it; 0: one call each. ``most``: calls of one measurement, which a device's queue,
    of about a thousand launches, should hold."""

    rounds: int
    warmup: int  # rounds dropped before
    clock: Callable[[Callable[[], object], int, float], Timed] = host_clock
    enough_s: float = 0.0
    most: int = 100


def measure(cases: list[Case], how: How, label: str, ratio: Callable[..., float]) -> list[Result]:
    """Time every case once a round. The results do not keep the calls, nor the tensors that these
    hold."""
    found: dict[str, list[Timed]] = {case.name: [] for case in cases}
    calls, host_s = dict.fromkeys(found, 1), dict.fromkeys(found, 0.0)
    for r in tqdm(range(how.warmup + how.rounds), desc=label, leave=False, disable=None):
        for case in cases if r % 2 == 0 else reversed(cases):
            name = case.name
            # Half as long again as the host took the last time, which may have been compiling.
            lead_s = min(MOST_LEAD_S, 5e-4 + 1.5 * host_s[name] * calls[name])
            timed = how.clock(case.call, calls[name], lead_s)
            host_s[name] = timed.host_s or 0.0
            if r >= how.warmup:
                found[name].append(timed)
            elif r == how.warmup - 1:
                wanted = math.ceil(how.enough_s / timed.seconds)
                hidden = MOST_LEAD_S / (2 * host_s[name]) if host_s[name] else wanted
                calls[name] = max(1, min(how.most, wanted, int(hidden)))
    return [_result(case, cases, found, ratio) for case in cases]


def _result(
    case: Case, cases: list[Case], found: dict[str, list[Timed]], ratio: Callable[..., float]
) -> Result:
    mine, middle = found[case.name], None
    if case.against:
        other = next(other for other in cases if other.name == case.against)
        pairs = zip(mine, found[other.name], strict=True)
        middle = median(ratio(case, other, a.seconds, b.seconds) for a, b in pairs)
    hosts = [timed.host_s for timed in mine if timed.host_s is not None]
    return Result(
        replace(case, call=_not_kept),
        [timed.seconds for timed in mine],
        middle,
        1e6 * median(hosts) if hosts else None,
        sum(timed.queued for timed in mine) / len(mine),
    )


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


def rows_of(results: list[Result], sheet_gb_per_s: float | None = None) -> list[dict[str, object]]:
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
        if sheet_gb_per_s and r.gb_per_s is not None:
            rows[-1]["of_data_sheet"] = round(r.gb_per_s / sheet_gb_per_s, 4)
        if r.host_us is not None:
            rows[-1] |= {"host_us": round(r.host_us, 2), "queued": round(r.queued, 3)}
    return rows


def table(results: list[Result], ratio_header: str, sheet_gb_per_s: float | None = None) -> str:
    digits, rows = 2 if all(r.ms[0] >= 1 for r in results) else 3, []
    on_device = any(r.host_us is not None for r in results)
    for r in results:
        mid, low, high = (f"{ms:.{digits}f}" for ms in r.ms)
        rate = r.gb_per_s
        row = {"case": r.case.name, "ms (p20-p80)": f"{mid} ({low}-{high})" + "*" * r.host_bound}
        if on_device:
            row["host us"] = "" if r.host_us is None else f"{r.host_us:.0f}"
        row["GB/s"] = "" if rate is None else f"{rate:.1f}"
        if sheet_gb_per_s:
            row["of data sheet"] = "" if rate is None else f"{rate / sheet_gb_per_s:.2f}"
        row[ratio_header] = "" if r.ratio is None else f"{r.ratio:.2f}"
        rows.append(row | {"target": r.wanted, "reached": r.reached})
    align = ["left"] + ["right"] * (len(rows[0]) - 1)
    text = tabulate(rows, headers="keys", disable_numparse=True, colalign=align)
    if any(r.host_bound for r in results):
        text += "\n* the device waited for the host in more than a fifth of the rounds"
    return text


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


def result_path(kind: str, model: object, date: object, folder: Path = RESULTS) -> Path:
    """<kind>-<model>-<date>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(model).lower()).strip("-")
    return folder / f"{kind}-{slug}-{date}.json"


def save(path: Path, head: dict[str, object], sections: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(
        ".part"
    )  # whole at any moment: whoever reads may have killed the writer
    part.write_text(json.dumps({"header": head, "sections": sections}, indent=1) + "\n")
    part.replace(path)


class Report:
    """What a run prints and, with a path, keeps: the figures as JSON, the text beside it as .md.
    Written after every table, so that a run that is stopped leaves what it has."""

    def __init__(self, head: dict[str, object], path: Path | None) -> None:
        self.head, self.path = head, path
        self.sections: dict[str, list[dict[str, object]]] = {}
        facts = ", ".join(f"{key} {value}" for key, value in head.items())
        self.text = f"# lion_kernels on {head['gpu']}\n\n{facts}\n"
        print(f"{facts}\n")

    def add(self, name: str, rows: list[dict[str, object]], title: str, *body: str) -> None:
        """A table of a section, and its figures; the title stands above the first."""
        lines = "\n".join(body)
        if name not in self.sections:
            print(f"{name}: {title}")
            self.text += f"\n## {name}\n\n{title}\n"
        print(f"{lines}\n", flush=True)
        self.sections[name] = self.sections.get(name, []) + rows
        self.text += f"\n```\n{lines}\n```\n"
        if self.path is not None:
            save(self.path, self.head, self.sections)
            self.path.with_suffix(".md").write_text(self.text)


def load_ceiling() -> ctypes.CDLL:
    """Compile bench/ceiling.cpp for this machine into build/, and load it."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        sys.exit(f"the bench needs a C++ compiler, and {compiler[0]!r} is not there: set CXX")
    library = ROOT / "build" / "ceiling.so"
    library.parent.mkdir(exist_ok=True)
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    source = str(ROOT / "bench" / "ceiling.cpp")
    done = subprocess.run([*compiler, *flags, source, "-o", str(library)])
    if done.returncode != 0:
        sys.exit(f"{shlex.join(compiler)} could not compile bench/ceiling.cpp")
    return ctypes.CDLL(str(library))
