"""The GPU bench: lion_kernels on one CUDA GPU against what its memory gives in the same run, and
its peers.

Sections, what is worth most first: `ops`, each op on one flat tensor; `step`, one step of several
optimizers; `lists`, many tensors against one flat tensor; `tally`, the vote count; `launches`,
kernels and waits of a step; `compiled`, what Inductor makes of Lion. Each op is compared with
lion_kernels.reference before it is timed. Times are the device's, with its queue full, and the
host's beside them. `--dry-run` shows without a GPU that all of it runs; its times mean nothing.
tune.py sweeps the launch configs.
"""

import argparse
import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import lion_kernels
import peers
import timing
import workload
from cpu import FUSED, OPS, SETTINGS, gpt2_shapes, random_ballots, random_words
from lion_kernels.layout import OCTET, blank_words
from lion_kernels.vote.poll import Poll
from peers import KINDS, OURS, parameters
from timing import Case, Report, Result
from workload import PLAIN, Workload, cold, in_turn, name_of


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
    stream_bytes: int
    sheet: float | None  # GB/s

    @functools.cached_property
    def data(self) -> torch.Tensor:
        """What the ceilings read and write."""
        return random_words(self.stream_bytes // 4, device=self.device)

    @property
    def is_dry(self) -> bool:
        return self.device.type == "cpu"


Section = Callable[[Bench, Report], None]


def bench_on(rounds: int, dry: bool) -> Bench:
    import backends  # after main has said whether there is a GPU
    import ceilings

    if dry:
        device = torch.device("cpu")
        return Bench(
            device, backends.gpu(), backends.gpu(), timing.How(rounds=2, warmup=1),
            flat=(3_000,), gpt2=gpt2_shapes(8, 301, 1)[:6], many=[[100]] * 3, ragged=(3_001, 1, 33),
            ballot_bytes=2**16, stream_bytes=2**18, sheet=None,
        )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.cuda.get_device_properties(device).total_memory
    return Bench(
        device, OPS, backends.gpu(),
        timing.How(rounds, warmup=3, clock=timing.device_clock, enough_s=0.006),
        flat=(1_000_000_000, 100_000_000), gpt2=gpt2_shapes(), many=[[50_000]] * 2_000,
        ragged=(50_021, 1, 33, 4_096), ballot_bytes=1_000_000_000,
        stream_bytes=min(4_000_000_000, memory // 20),
        sheet=ceilings.data_sheet_gb_per_s(device),
    )  # fmt: skip


def header(dry: bool) -> dict[str, object]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        driver = ""
    found: dict[str, object] = {"gpu": timing.NO_GPU}
    if not dry:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = {
            "gpu": properties.name,
            "gpu_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    versions = {"driver": driver or "unknown", "cuda": torch.version.cuda}
    return {**found, **versions, "triton": triton.__version__, **timing.header()}


# Sections ops and tally: shares of the ceilings.


def shares(bench: Bench, label: str, cases: list[tuple[Case, int, int]]) -> list[Result]:
    """Each case, of so many bytes read and written, against a plain kernel with such a mix."""
    import ceilings

    mixes = [ceilings.nearest(read, written) for _, read, written in cases]
    plain = {mix: ceilings.ceiling_of(bench.data, mix, label) for mix in dict.fromkeys(mixes)}
    named = [
        replace(case, name=f"{case.name}, {label}", n_bytes=read + written, against=plain[mix].name)
        for (case, read, written), mix in zip(cases, mixes, strict=True)
    ]
    beside = [ceilings.copy_case(bench.data, label), *plain.values()]
    return timing.measure([*beside, *named], bench.how, label, timing.rate_ratio)


def add(
    report: Report, section: str, title: str, results: list[Result], ratio: str, bench: Bench,
    *notes: str,
) -> None:  # fmt: skip
    """A table, as soon as it is measured."""
    rows = timing.rows_of(results, bench.sheet)
    report.add(section, rows, title, timing.table(results, ratio, bench.sheet), *notes)


def has_room(n_bytes: float, bench: Bench) -> bool:
    if bench.is_dry:
        return True
    torch.cuda.empty_cache()
    return 1.1 * n_bytes < torch.cuda.mem_get_info()[0]


def target_of(op: str, kind: str) -> float:
    if "int8" in kind and op != "apply":
        return 0.80
    return 0.95 if op == "lion_step" else 0.92


def flat_shares(bench: Bench, n: int, kind: str) -> list[Result]:
    """Its own function: what it allocates is free before the next."""
    works = cold([[n]], kind, bench.device)
    variants = [("lion_step", 0), ("encode", 1), ("encode", 2)]
    if works[0].sizes[0] == works[0].sizes[1]:  # apply knows no momentum: once a type of p
        variants += [("apply", 1), ("apply", 2), ("apply", 4), ("apply", 8)]
    cases = []
    for variant in variants:
        call = in_turn([work.call(bench.ops, *variant) for work in works])
        case = Case(name_of(*variant), call, target=target_of(variant[0], kind))
        cases.append((case, *works[0].traffic(*variant)))
    return shares(bench, f"{kind}, {n:.0e}".replace("e+0", "e"), cases)


def ops_section(bench: Bench, report: Report) -> None:
    title = "each op on one flat tensor, in one launch; bytes read plus written, 1/8 an element "
    title += "for a plane of bits, 1/256 for blank bits; share of a plain kernel with that mix"
    for n in bench.flat:
        for kind, (p_dtype, m_dtype) in KINDS.items():
            # Of some workloads; a momentum is drawn in float32 and then stored.
            elements = n + workload.LARGE // p_dtype.itemsize * (not bench.is_dry)
            if has_room((2 * p_dtype.itemsize + m_dtype.itemsize + 5) * elements, bench):
                add(report, "ops", title, flat_shares(bench, n, kind), "of ceiling", bench)
            else:
                note = f"{kind}, {n:.0e}: left out, more than the free memory"
                report.add("ops", [], title, note)


def tally_section(bench: Bench, report: Report) -> None:
    title = f"{bench.ballot_bytes / 1e6:.3g} MB of ballots, none blank; bytes: ballots and their "
    title += "blank bits read, planes written"
    for n, kind in ((8, "binary"), (64, "binary"), (2, "binary"), (8, "ternary")):
        poll = Poll(n, ballots=kind)
        words = bench.ballot_bytes // (4 * n * poll.ballot_planes) // OCTET * OCTET
        ballots = random_ballots(n, poll.ballot_planes, words, bench.device)
        tally = random_words(poll.tally_planes, words, device=bench.device)
        verdict = random_words(2, words, device=bench.device)
        step = torch.zeros(1, dtype=torch.int64, device=bench.device)
        target = 0.92 if n >= 8 else None
        blanks = None
        if kind == "binary":  # of which no word is blank
            blanks = torch.zeros(n, blank_words(words), dtype=torch.int32, device=bench.device)
        rest = {"scale": poll.scale, "first_word": 0, "seed": 0, "step": step, "blanks": blanks}
        counted = partial(bench.ops.tally, ballots, tally, **rest)
        elected = partial(bench.ops.elect, ballots, verdict, **rest)
        read = ballots.nbytes + (0 if blanks is None else blanks.nbytes)
        cases = [
            (Case("tally", counted, target=target), read, tally.nbytes),
            (Case("elect", elected, target=target), read, verdict.nbytes),
        ]
        results = shares(bench, f"N={n} {kind}", cases)
        add(report, "tally", title, results, "of ceiling", bench)


# Section lists.


def lists_section(bench: Bench, report: Report) -> None:
    title = "lists of tensors, replayed as a CUDA graph and called directly, against one flat "
    title += "tensor of that size"
    for name, shapes, kind, limit in (
        ("GPT-2", bench.gpt2, "fp32", 1.10),
        ("GPT-2", bench.gpt2, "bf16", 1.10),
        (f"{len(bench.many):,} x {bench.many[0][0]:,}", bench.many, "fp32", None),
    ):
        results = []
        listed = cold(shapes, kind, bench.device)
        flat = cold([[sum(listed[0].layout.numels)]], kind, bench.device)
        replayed = (lambda call: call) if bench.is_dry else timing.replayed
        for op, planes in PLAIN:
            label, n_bytes = f"{op}, {kind}, {name}", sum(listed[0].traffic(op, planes))
            one, direct = ([w.call(bench.ops, op, planes) for w in ws] for ws in (flat, listed))
            one, graphs = ([replayed(call) for call in calls] for calls in (one, direct))
            rest = {"n_bytes": n_bytes, "against": f"{label}: flat"}
            cases = [
                Case(f"{label}: flat", in_turn(one), n_bytes),
                Case(f"{label}: list", in_turn(graphs), limit=limit, **rest),
                Case(f"{label}: list, no graph", in_turn(direct), **rest),
            ]
            results += timing.measure(cases, bench.how, label, timing.time_ratio)
        add(report, "lists", title, results, "flat = 1", bench)


# Section launches.


def launches_section(bench: Bench, report: Report) -> None:
    work = Workload(bench.gpt2, "fp32", bench.device)
    params = parameters(bench.gpt2, torch.float32, bench.device)
    ballots = random_ballots(8, 1, work.layout.words_per_shard, bench.device)
    blanks = work.blanks.repeat(8, 1)
    encode = {**work.arguments("encode", 1)[0], "ballot": ballots[:1], "blanks": blanks[:1]}
    place = {"scale": 8, "first_word": 0, "seed": 0, "step": work.step, "blanks": blanks}
    verdict = work.words(2)

    def vote() -> None:
        bench.ops.encode(**encode)
        bench.ops.elect(ballots, verdict[0], **place)
        bench.ops.apply(**work.arguments("apply", 2)[0])

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


# Sections step and compiled.


def step_rows(
    bench: Bench, report: Report, section: str, places: list, kinds: Any, title: str
) -> None:
    """Ours and the peers that the section has, in every place and of every kind."""
    # Peers with a launch for every tensor would overflow the device's queue with more calls.
    how = replace(bench.how, most=2)
    for name, shapes in places:
        for kind in kinds:
            p_dtype = KINDS[kind][0]
            params = parameters(shapes, p_dtype, bench.device)
            n, p, m = sum(x.numel() for x in params), p_dtype.itemsize, peers.momentum_bytes(kind)
            # All update the same parameters from the same gradients: only states take memory.
            found, notes = peers.steps(params, kind, bench.is_dry, compiled=section == "compiled")
            # Lion reads p, g, m and writes p, m.
            n_bytes = dict.fromkeys(found, int((3 * p + 2 * m) * n))
            n_bytes[FUSED] = int((3 * p + 4 * m) * n)
            label = f"{kind}, {name}"
            ours = f"{OURS}, {label}"
            cases = [
                Case(
                    f"{peer}, {label}", step, n_bytes[peer], "" if peer == OURS else ours,
                    1.33 if peer == FUSED else None,
                )
                for peer, step in found.items()
            ]  # fmt: skip
            results = timing.measure(cases, how, label, timing.time_ratio)
            add(report, section, title, results, "ours = 1", bench, *notes)


STEP_TITLE = "GB/s: of the bytes that the formula needs, whatever an implementation moves"


def step_section(bench: Bench, report: Report) -> None:
    places = [("GPT-2", bench.gpt2), ("flat", [[bench.flat[-1]]])]
    title = f"one step of GPT-2, {len(bench.gpt2)} tensors, and of one flat tensor; {STEP_TITLE}"
    step_rows(bench, report, "step", places, KINDS, title)


def compiled_section(bench: Bench, report: Report) -> None:
    """Last, and flat: Inductor compiles a list of tensors for a minute."""
    places = [("flat", [[bench.flat[-1]]])]
    title = f"foreach Lion under torch.compile, one flat tensor; {STEP_TITLE}"
    step_rows(bench, report, "compiled", places, ("fp32", "bf16"), title)


SECTIONS: dict[str, Section] = {
    "ops": ops_section,
    "step": step_section,
    "lists": lists_section,
    "tally": tally_section,
    "launches": launches_section,
    "compiled": compiled_section,
}


def arguments(sections: dict[str, Section], doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=21, help="timed rounds (default 21)")
    add("--only", nargs="+", choices=sections, default=list(sections), help="sections, in order")
    add(
        "--save", nargs="?", type=Path, const=timing.RESULTS, metavar="DIR",
        help="write gpu-<model>-<date>.json and .md (default into bench/results)",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="tiny, on the CPU: does it run")
    add("--check-only", action="store_true", help="compare with the reference, time nothing")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
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
    sys.path.append(str(timing.ROOT / "tests" / "helpers"))  # backends
    torch.manual_seed(0)
    bench = bench_on(args.rounds, args.dry_run)
    print("compiling, and comparing with the reference ...", flush=True)
    if wrong := workload.wrong(bench.checked_ops, bench.ragged, bench.device):
        sys.exit("wrong results, nothing was timed:\n  " + "\n  ".join(wrong))
    if args.check_only:
        return print("every op equals the reference, bit for bit")
    head = header(args.dry_run)
    path = timing.result_path(stem, head["gpu"], head["date"], args.save) if args.save else None
    report = Report(head, path)
    failed = []
    for name in args.only:
        try:
            sections[name](bench, report)
        except Exception:  # the other sections keep their results
            traceback.print_exc()
            failed.append(name)
    if path is not None and path.exists():
        print(f"wrote {path} and {path.with_suffix('.md').name}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run(SECTIONS, "gpu", __doc__)
