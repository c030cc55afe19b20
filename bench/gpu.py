"""The GPU bench: lion_kernels on one CUDA GPU against a large copy in the same run, and its peers.

Sections: `ops`, each op on one flat tensor; `tally`, the vote count; `lists`, many tensors against
one flat tensor, called directly and replayed as a CUDA graph; `launches`, kernels and waits of a
step; `step`, one step of several optimizers. Each op is compared with lion_kernels.reference before
it is timed. `--dry-run` shows without a GPU that all of it runs; its times mean nothing. tune.py
sweeps the launch configs.
"""

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import cpu
import lion_kernels
import peers
import timing
from cpu import LR, SCALARS, SETTINGS, gpt2_shapes, random_ballots, random_words
from lion_kernels.layout import BallotLayout
from lion_kernels.reference import quantize
from peers import KINDS, OURS, parameters
from timing import Case, Report, Result

# (op, planes) that are timed on lists and tuned.
PLAIN = (("lion_step", 0), ("encode", 1), ("apply", 1))
SCALES = {1: 1, 2: 2, 4: 8}  # of a verdict of so many planes


@dataclass(frozen=True)
class Bench:
    """The device, the ops on its tensors, and how large everything is there."""

    device: torch.device
    ops: Any
    checked_ops: Any  # the same kernels, called with CPU tensors
    how: timing.How
    flat: tuple[int, ...]
    gpt2: list[list[int]]
    many: list[list[int]]
    ragged: tuple[int, ...]
    ballot_bytes: int
    copy: Case

    @property
    def is_dry(self) -> bool:
        return self.device.type == "cpu"


Section = Callable[[Bench, Report], None]


def copy_case(n_bytes: int, device: torch.device) -> Case:
    """The ceiling: a copy that reads so many bytes and writes as many."""
    source, target = (random_words(n_bytes // 4, device=device) for _ in range(2))
    return Case("copy", partial(target.copy_, source), 2 * source.nbytes)


def bench_on(rounds: int, dry: bool) -> Bench:
    import backends  # after main has said whether there is a GPU

    if dry:
        device = torch.device("cpu")
        return Bench(
            device, backends.gpu(), backends.gpu(), timing.How(rounds=2, warmup=1),
            flat=(3_000,), gpt2=gpt2_shapes(8, 301, 1)[:6], many=[[100]] * 3, ragged=(3_001, 1, 33),
            ballot_bytes=2**16, copy=copy_case(2**20, device),
        )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.cuda.get_device_properties(device).total_memory
    return Bench(
        device, torch.ops.lion_kernels, backends.gpu(),
        timing.How(rounds, warmup=3, clock=timing.device_clock, enough_s=0.01),
        flat=(100_000_000, 1_000_000_000), gpt2=gpt2_shapes(), many=[[10_000]] * 2_000,
        ragged=(50_021, 1, 33, 4_096), ballot_bytes=256_000_000,
        copy=copy_case(min(2_000_000_000, memory // 20), device),
    )  # fmt: skip


def header(dry: bool) -> dict[str, object]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        driver = ""
    found: dict[str, object] = {"gpu": "none, a dry run"}
    if not dry:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = {
            "gpu": properties.name,
            "gpu_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    versions = {"driver": driver or "unknown", "cuda": torch.version.cuda}
    return {**found, **versions, "triton": triton.__version__, **timing.header()}


class Workload:
    """Tensors of some shapes and one kind, and all that the ops take along with them."""

    def __init__(self, shapes: list[list[int]], kind: str, device: str | torch.device) -> None:
        p_dtype, m_dtype = KINDS[kind]
        self.device = device
        self.params = [torch.randn(shape, dtype=p_dtype, device=device) for shape in shapes]
        self.grads = [torch.randn_like(p) for p in self.params]
        momenta = [torch.randn(shape, device=device) for shape in shapes]
        self.scales = None
        if m_dtype == torch.int8:
            stored = [quantize(m) for m in momenta]
            self.exp_avgs, self.scales = [q for q, _ in stored], [scale for _, scale in stored]
        else:
            self.exp_avgs = [m.to(m_dtype) for m in momenta]
        self.layout = BallotLayout(tuple(p.numel() for p in self.params), planes=1, shards=1)
        self.flags = torch.full((1, self.layout.flag_words), -1, dtype=torch.int32, device=device)
        self.step, self.counter = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.sizes = p_dtype.itemsize, peers.momentum_bytes(kind)
        self._words: dict[int, Tensor] = {}

    def words(self, planes: int) -> Tensor:
        """A ballot or a verdict of so many planes."""
        if planes not in self._words:
            room = self.layout.words_per_shard
            self._words[planes] = random_ballots(1, planes, room, self.device)
        return self._words[planes]

    def arguments(self, op: str, planes: int) -> tuple[list[Any], list[Tensor]]:
        """What the op takes, and those of it that it writes."""
        if op == "lion_step":
            args = [self.params, self.grads, self.exp_avgs, LR, *SCALARS, False]
            args += [None, None, None, "nearest", None, 0, None, False, False, self.scales]
            return args, [*self.params, *self.exp_avgs, *(self.scales or ())]
        words = self.words(planes)
        if op == "encode":
            args = [self.grads, self.exp_avgs, words, self.flags, *SETTINGS["betas"], False, 0, 0]
            args += [self.step, self.counter, None, None, False, self.scales]
            written = [*self.exp_avgs, words, self.flags, self.counter]
            return args, [*written, *(self.scales or ())]
        args = [self.params, words, self.flags, SCALES[planes], LR, SETTINGS["weight_decay"]]
        return [*args, self.step], [*self.params, self.step]

    def call(self, ops: Any, op: str, planes: int) -> Callable[[], object]:
        return partial(getattr(ops, op), *self.arguments(op, planes)[0])

    def n_bytes(self, op: str, planes: int) -> int:
        """Read plus written; a plane of bits is one eighth of a byte an element."""
        p, m = self.sizes
        each = {"lion_step": 3 * p + 2 * m, "encode": p + 2 * m, "apply": 2 * p}[op]
        n = sum(self.layout.numels)
        return int(each * n) + planes * n // 8

    def case(self, ops: Any, op: str, planes: int, **rest: Any) -> Case:
        kind = {"encode": {1: ", binary", 2: ", ternary"}.get(planes), "lion_step": ""}
        name = op + kind.get(op, f", {planes} plane{'s' * (planes > 1)}")
        return Case(name, self.call(ops, op, planes), self.n_bytes(op, planes), **rest)


# Correct first: a kernel that differs from the reference has no time.


def wrong_ops(bench: Bench, variants: list[tuple[str, int]], kind: str) -> list[str]:
    """Those of the (op, planes) that are wrong on tensors of ragged sizes."""
    small = Workload([[n] for n in bench.ragged], kind, "cpu")
    return [
        f"{op}, {planes} planes, {kind}"
        for op, planes in variants
        if cpu.differs(op, *small.arguments(op, planes), bench.checked_ops)
    ]


def check(bench: Bench) -> None:
    """Exit with a message where a result is wrong."""
    variants = [*PLAIN, ("encode", 2), ("apply", 2), ("apply", 4)]
    wrong = [name for kind in KINDS for name in wrong_ops(bench, variants, kind)]
    wrong += cpu.check_counts(bench.checked_ops) + cpu.check_optimizer(bench.device)
    if wrong:
        sys.exit("wrong results, nothing was timed:\n  " + "\n  ".join(wrong))


# Sections ops and tally: shares of the copy.


def shares(bench: Bench, label: str, cases: list[Case], host: bool = False) -> list[Result]:
    ceiling = replace(bench.copy, name=f"copy, {label}")
    named = [replace(c, name=f"{c.name}, {label}", against=ceiling.name) for c in cases]
    how = bench.how
    return timing.measure([ceiling, *named], how, label, timing.rate_ratio, host)


def has_room(n_bytes: int, bench: Bench) -> bool:
    if bench.is_dry:
        return True
    torch.cuda.empty_cache()
    return 1.1 * n_bytes < torch.cuda.mem_get_info()[0]


def flat_shares(bench: Bench, n: int, kind: str) -> list[Result]:
    """Its own function: what it allocates is free before the next."""
    work = Workload([[n]], kind, bench.device)
    variants = [("lion_step", 0), ("encode", 1), ("encode", 2)]
    if work.sizes[0] == work.sizes[1]:  # apply knows no momentum: once for each type of p
        variants += [("apply", 1), ("apply", 2), ("apply", 4)]
    cases = [work.case(bench.ops, *variant, target=0.92) for variant in variants]
    return shares(bench, f"{kind}, {n:.0e}".replace("e+0", "e"), cases, host=True)


def ops_section(bench: Bench, report: Report) -> None:
    results, notes = [], []
    for n in bench.flat:
        for kind, (p_dtype, m_dtype) in KINDS.items():
            # A momentum is drawn in float32 and then stored.
            if has_room((2 * p_dtype.itemsize + m_dtype.itemsize + 5) * n, bench):
                results += flat_shares(bench, n, kind)
            else:
                notes.append(f"{kind}, {n:.0e}: left out, more than the free memory")
    title = "each op on one flat tensor, in one launch; share of the copy's bytes/s"
    notes.append("bytes: read plus written, one eighth an element for each plane of bits")
    report.add("ops", timing.rows_of(results), title, timing.table(results, "of copy"), *notes)


def tally_section(bench: Bench, report: Report) -> None:
    results = []
    for n, planes in ((2, 1), (8, 1), (64, 1), (8, 2)):
        words = bench.ballot_bytes // (4 * n * planes) // 4 * 4
        ballots = random_ballots(n, planes, words, bench.device)
        scale = n * planes
        tally = random_words(scale.bit_length(), words, device=bench.device)
        verdict = random_words(2, words, device=bench.device)
        step = torch.zeros(1, dtype=torch.int64, device=bench.device)
        target = 0.85 if n >= 8 else None
        counted = partial(bench.ops.tally, ballots, tally, scale)
        elected = partial(bench.ops.elect, ballots, verdict, scale, 0, 0, step)
        cases = [
            Case("tally", counted, ballots.nbytes + tally.nbytes, target=target),
            Case("elect", elected, ballots.nbytes + verdict.nbytes, target=target),
        ]
        results += shares(bench, f"N={n} {'binary' if planes == 1 else 'ternary'}", cases)
    title = f"{bench.ballot_bytes / 1e6:.3g} MB of ballots; share of the copy's bytes/s"
    note = "bytes: ballots read plus planes written"
    report.add("tally", timing.rows_of(results), title, timing.table(results, "of copy"), note)


# Section lists.


def lists_section(bench: Bench, report: Report) -> None:
    results = []
    for name, shapes, kind, limit in (
        ("GPT-2", bench.gpt2, "fp32", 1.15),
        ("GPT-2", bench.gpt2, "bf16", 1.15),
        ("2,000 x 10,000", bench.many, "fp32", None),
    ):
        listed = Workload(shapes, kind, bench.device)
        flat = Workload([[sum(listed.layout.numels)]], kind, bench.device)
        for op, planes in PLAIN:
            label, n_bytes = f"{op}, {kind}, {name}", listed.n_bytes(op, planes)
            one, call = (work.call(bench.ops, op, planes) for work in (flat, listed))
            graph = call if bench.is_dry else timing.replayed(call)
            rest = {"n_bytes": n_bytes, "against": f"{label}: flat", "limit": limit}
            cases = [
                Case(f"{label}: flat", one, n_bytes),
                Case(f"{label}: list", call, **rest),
                Case(f"{label}: list, graph", graph, **rest),
            ]
            results += timing.measure(cases, bench.how, label, timing.time_ratio, host=True)
    title = "lists of tensors, called directly and as a CUDA graph, against one flat tensor"
    note = "host us: until the call returned"
    report.add("lists", timing.rows_of(results), title, timing.table(results, "flat = 1"), note)


# Section launches.


def launches_section(bench: Bench, report: Report) -> None:
    work = Workload(bench.gpt2, "fp32", bench.device)
    params = parameters(bench.gpt2, torch.float32, bench.device)
    ballots = random_ballots(8, 1, work.layout.words_per_shard, bench.device)
    encode = list(work.arguments("encode", 1)[0])
    encode[2] = ballots[:1]
    verdict = work.words(2)

    def vote() -> None:
        bench.ops.encode(*encode)
        bench.ops.elect(ballots, verdict[0], 8, 0, 0, work.step)
        bench.ops.apply(*work.arguments("apply", 2)[0])

    rows = []
    optimizer = lion_kernels.Lion(params, **SETTINGS)
    for name, call in (("Lion.step()", optimizer.step), ("encode + elect + apply", vote)):
        call()
        names = timing.launched(call, bench.device)
        wait = "no" if bench.is_dry else timing.waits(call)
        row = {"case": name, "launches": len(names), "names": names, "waits": wait, "target": 3}
        # None seen: the profiler may not look at this device.
        rows.append(row | {"reached": len(names) <= 3 and wait == "no" if names else None})
    answers = {True: "yes", False: "NO", None: "none seen"}
    body = [
        {"case": r["case"], "launches": r["launches"], "target": "<= 3", "waits": r["waits"]}
        | {"reached": answers[r["reached"]]}
        | {"what": ", ".join(name[:40] for name in r["names"][:6])}
        for r in rows
    ]
    title = f"what one call puts on the device, GPT-2, {len(params)} tensors"
    report.add("launches", rows, title, tabulate(body, headers="keys"))


# Section step.


def step_section(bench: Bench, report: Report) -> None:
    results, notes = [], []
    for name, shapes in (("GPT-2", bench.gpt2), ("flat", [[bench.flat[0]]])):
        for kind, (p_dtype, _) in KINDS.items():
            params = parameters(shapes, p_dtype, bench.device)
            n, p, m = sum(x.numel() for x in params), p_dtype.itemsize, peers.momentum_bytes(kind)
            # All update the same parameters from the same gradients: only states take memory.
            found, lines = peers.steps(params, kind, bench.is_dry)
            # Lion reads p, g, m and writes p, m.
            n_bytes = dict.fromkeys(found, int((3 * p + 2 * m) * n))
            n_bytes["torch AdamW, fused"] = int((3 * p + 4 * m) * n)
            label = f"{kind}, {name}"
            ours = f"{OURS}, {label}"
            cases = [
                Case(f"{peer}, {label}", step, n_bytes[peer], "" if peer == OURS else ours)
                for peer, step in found.items()
            ]
            results += timing.measure(cases, bench.how, label, timing.time_ratio, host=True)
            notes += [line for line in lines if line not in notes]
    title = f"one step: GPT-2, {len(bench.gpt2)} tensors, and one flat tensor of {bench.flat[0]:,}"
    notes.append("GB/s: of the bytes that the formula needs, whatever an implementation moves")
    report.add("step", timing.rows_of(results), title, timing.table(results, "ours = 1"), *notes)


SECTIONS: dict[str, Section] = {
    "ops": ops_section,
    "tally": tally_section,
    "lists": lists_section,
    "launches": launches_section,
    "step": step_section,
}


def arguments(sections: dict[str, Section], doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (default 21)")
    parser.add_argument(
        "--only", nargs="+", choices=sections, default=list(sections), help="sections (default all)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/gpu-<model>-<date>.json and .md"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does it run")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.dry_run and args.save:
        parser.error("--dry-run times nothing worth keeping: leave out --save")
    return args


def run(sections: dict[str, Section], stem: str, doc: str) -> None:
    """The command line of sections, whose results are saved as ``stem``-<model>-<date>."""
    args = arguments(sections, doc)
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        print("dry run on the CPU: the times mean nothing")
    elif not torch.cuda.is_available():
        sys.exit("this bench needs a CUDA device, and torch has none (--dry-run needs none)")
    elif not lion_kernels.build_info()["cuda"]:
        sys.exit("lion_kernels was built without CUDA: build it again with LION_KERNELS_CUDA=1")
    sys.path.append(str(timing.ROOT / "tests"))  # backends
    torch.manual_seed(0)
    bench = bench_on(args.rounds, args.dry_run)
    print("compiling, and comparing with the reference ...", flush=True)
    check(bench)
    head = header(args.dry_run)
    path = timing.result_path(stem, head["gpu"], head["date"]) if args.save else None
    report = Report(head, path)
    failed = []
    for name in args.only:
        try:
            sections[name](bench, report)
        except Exception:  # the other sections keep their results
            traceback.print_exc()
            failed.append(name)
    if path is not None and path.exists():
        print(f"wrote {path.relative_to(timing.ROOT)} and {path.with_suffix('.md').name}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run(SECTIONS, "gpu", __doc__)
