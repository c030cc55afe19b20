"""The CPU bench: lion_kernels against its peers and against what the memory of this machine allows.

Sections: `step`, one optimizer step on the 148 tensors of GPT-2 124M; `ops`, each op on one flat
tensor against a plain loop with the same reads and writes; `options`, what each option of Lion
costs; `tally`, the vote count against a copy; `memory`, the buffers of the vote. Each op is
compared with lion_kernels.reference before it is timed. Ratios are medians of per-round ratios
(timing.py says why). Timings are never asserted.
"""

import argparse
import ctypes
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import lion_kernels
import timing
from lion_kernels import ops, reference
from lion_kernels.int8 import MOMENTUM_BLOCK
from lion_kernels.layout import BallotLayout, words_of
from lion_kernels.vote.buffers import Buffers
from lion_kernels.vote.poll import Poll
from timing import Case, Result

OPS = ops
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
LR = torch.tensor(SETTINGS["lr"], dtype=torch.float64)
# Of SETTINGS, what the ops take by keyword.
BETAS = dict(zip(("beta1", "beta2"), SETTINGS["betas"], strict=True))
RATES = {"lr": LR, "weight_decay": SETTINGS["weight_decay"]}
STEP = torch.zeros((), dtype=torch.int64)
OURS, FUSED = "lion_kernels Lion", "torch AdamW, fused"


def gpt2_shapes(width: int = 768, vocabulary: int = 50257, blocks: int = 12) -> list[list[int]]:
    """The parameters of GPT-2 small: 148 tensors, 124.4M elements."""
    shapes = [[vocabulary, width], [1024, width]]
    for _ in range(blocks):
        shapes += [[width], [width], [width, 3 * width], [3 * width], [width, width], [width]]
        shapes += [[width], [width], [width, 4 * width], [4 * width], [4 * width, width], [width]]
    return [*shapes, [width], [width]]


def random_words(*shape: int, device: str | torch.device = "cpu") -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def random_ballots(n: int, planes: int, words: int, device: str | torch.device = "cpu") -> Tensor:
    """Ballots of fair votes; two planes hold 0, 1 or 2, never 3."""
    ballots = random_words(n, planes, words, device=device)
    if planes == 2:
        ballots[:, 0] &= ~ballots[:, 1]
    return ballots


def trailers_of(
    layout: BallotLayout, present: int = -1, device: str | torch.device = "cpu"
) -> Tensor:
    """Trailers (1, words) of a rank that is ready; ``present``: a bit a tensor."""
    trailers = torch.zeros(1, layout.trailer_words, dtype=torch.int32, device=device)
    trailers[:, : layout.flag_words] = present
    return trailers


# Correct first: a kernel that differs from the reference has no time.


def differs(op: str, args: dict[str, Any], written: list[Tensor], ops: object = OPS) -> bool:
    """Whether the kernel writes anything else than the reference into ``written`` (among args)."""
    before = [t.clone() for t in written]
    getattr(ops, op)(**args)
    ours = [t.clone() for t in written]
    for t, old in zip(written, before, strict=True):
        t.copy_(old)
    getattr(reference, op)(**args)
    return not all(torch.equal(a, b) for a, b in zip(ours, written, strict=True))


def check_elementwise(dtype: torch.dtype) -> list[str]:
    """Names of the elementwise ops that are wrong on tensors of ragged sizes."""
    sizes = (50_021, 1, 33, 4_096)
    p, g, m = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(3))
    g[0][320:640] = m[0][320:640] = 0.0  # words that are blank
    wrong, counter = [], torch.zeros(1, dtype=torch.int64)
    elements = {"grads": g, "exp_avgs": m}
    for skip in (None, counter):
        args = {"params": p, **elements, **RATES, **BETAS, "maximize": False, "nonfinite": skip}
        if differs("lion_step", args, [*p, *m, counter]):
            wrong.append("lion_step")
    for planes in (1, 2):
        layout = BallotLayout(sizes, planes, 1)
        chunks = random_words(1, layout.chunk_words)
        args = {**elements, **BETAS, "maximize": False, "seed": 0, "rank": 1, "step": STEP}
        args |= {"ballot": layout.planes_of(chunks), "blanks": layout.blanks_of(chunks)}
        args |= {"trailers": layout.trailers_of(chunks), "shared": STEP.view(1)}
        args |= {"trailer": random_words(layout.trailer_words), "nonfinite": counter}
        if differs("encode", args, [*m, chunks, counter]):
            wrong.append(f"encode, {planes} plane")
        verdict = random_ballots(1, planes, layout.words_per_shard)
        blanks = random_words(1, layout.blank_words) if planes == 1 else None
        step = torch.zeros(1, dtype=torch.int64)
        args = {"params": p, "verdict": verdict, "blanks": blanks, "scale": planes, **RATES}
        args |= {"step": step, "trailers": trailers_of(layout, 0b1101)}
        if differs("apply", args, [*p, step]):
            wrong.append(f"apply, {planes} plane")
    return [f"{name}, {dtype}" for name in wrong]


def counts(
    poll: Poll, ballots: Tensor, blanks: Tensor | None
) -> Iterator[tuple[str, dict[str, Any], list[Tensor]]]:
    """Every op that counts such ballots: its name, what it takes, and what of it it writes."""
    n_words, can_tie = ballots.shape[2], poll.scale % 2 == 0
    rest = {"ballots": ballots, "scale": poll.scale, "first_word": 5, "seed": 0, "step": STEP}
    rest |= {"blanks": blanks, "weights": poll.weights_on(ballots.device)}
    found = [("tally", "tally", poll.tally_planes, can_tie), ("elect", "verdict", 1, False)]
    for op, name, planes, says_zero in [*found, ("elect", "verdict", 2, True)][: 2 + can_tie]:
        written = [random_words(planes, n_words)]
        args = {name: written[0], **rest}
        if blanks is not None and not says_zero:
            args["out_blanks"] = random_words(1, words_of(n_words))
            written.append(args["out_blanks"])
        yield op, args, written


def check_counts(ops: object = OPS) -> list[str]:
    """Names of the counting ops that are wrong on ballots of a ragged length, of whose words one in
    eight is blank."""
    wrong, n_words = [], 1_003
    for n, kind in (
        (1, "binary"), (4, "binary"), (8, "binary"), (8, "ternary"), (11, "ternary"), (64, "binary")
    ):  # fmt: skip
        some = random_words(n, words_of(n_words))
        some &= random_words(*some.shape) & random_words(*some.shape)
        some[:, -1] &= 2 ** (n_words % 32) - 1
        for weights, blanks in itertools.product(
            (None, tuple(range(1, n + 1))), (None, some) if kind == "binary" else (None,)
        ):
            poll = Poll(n, ballots=kind, weights=weights)
            ballots = random_ballots(n, poll.ballot_planes, n_words)
            more = ", blank words" * (blanks is not None) + ", weights" * (weights is not None)
            for op, args, written in counts(poll, ballots, blanks):
                if differs(op, args, written, ops):
                    wrong.append(f"{op} to {len(written[0])}, {n} {kind} ballots{more}")
    return wrong


def check_optimizer(device: str | torch.device = "cpu") -> list[str]:
    copies = [torch.randn(n) for n in (10_007, 1, 33)]
    momenta = [torch.zeros_like(p) for p in copies]
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in copies]
    optimizer = lion_kernels.Lion(params, **SETTINGS)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in copies]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(device)
        optimizer.step()
        reference.lion_step(copies, grads, momenta, **RATES, **BETAS, maximize=False)
    same = all(torch.equal(p.cpu(), c) for p, c in zip(params, copies, strict=True))
    return [] if same else ["Lion.step"]


def check(sections: list[str]) -> None:
    """Exit with a message where a result is wrong."""
    wrong = check_optimizer() if "step" in sections else []
    if "ops" in sections:
        wrong += check_elementwise(torch.float32) + check_elementwise(torch.bfloat16)
    if "tally" in sections:
        wrong += check_counts()
    if wrong:
        sys.exit("wrong results, nothing was timed:\n  " + "\n  ".join(wrong))


# Section step.


def peers(params: list[Tensor]) -> tuple[dict[str, torch.optim.Optimizer], list[str]]:
    """Every optimizer at hand on the same parameters, and the names of those that are missing."""
    found = {OURS: lion_kernels.Lion(params, **SETTINGS)}
    missing = []
    for name, module in (
        ("lion-pytorch Lion", "lion_pytorch"),
        ("optimi Lion", "optimi"),
        ("pytorch_optimizer Lion", "pytorch_optimizer"),
        ("bitsandbytes Lion", "bitsandbytes.optim"),
    ):
        try:
            found[name] = importlib.import_module(module).Lion(params, **SETTINGS)
        except (ImportError, OSError):
            missing.append(module.split(".")[0])
    adamw = partial(torch.optim.AdamW, params, **SETTINGS)
    found[FUSED] = adamw(fused=True)
    found["torch AdamW, foreach"] = adamw(foreach=True)
    return found, missing


def step_section(how: timing.How, quick: bool, only: list[str]) -> list[Result]:
    shapes = gpt2_shapes(*((96, 5_003) if quick else ()))
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    n = sum(p.numel() for p in params)
    # All update the same parameters from the same gradients: only their states take memory.
    optimizers, missing = peers(params)
    n_bytes = {OURS: 20 * n, FUSED: 28 * n}
    targets = {"lion-pytorch Lion": 6.0, "optimi Lion": 3.0, FUSED: 1.0}
    cases = [
        Case(name, o.step, n_bytes.get(name, 0), "" if name == OURS else OURS, targets.get(name))
        for name, o in optimizers.items()
        if name == OURS or any(word in name for word in only)
    ]
    print(f"\nstep: GPT-2, {len(params)} fp32 tensors, {n / 1e6:.1f}M parameters")
    results = timing.measure(cases, how, "step", timing.time_ratio)
    print(timing.table(results, "ours = 1"))
    print("bytes a parameter: Lion 20, fused AdamW 28; not counted for the others")
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    return results


# Section ops.


def elementwise_cases(plain: ctypes.CDLL, dtype: torch.dtype, n: int) -> list[Case]:
    """Each op after its plain loop, on the same buffers."""
    p, g, m = (torch.randn(n).to(dtype) for _ in range(3))
    size, counter = p.element_size(), torch.zeros(1, dtype=torch.int64)
    layout = BallotLayout((n,), 1, 1)
    ballot, two_planes = (random_ballots(1, k, layout.words_per_shard) for k in (1, 2))
    blanks = torch.zeros(1, layout.blank_words, dtype=torch.int32)
    trailers = trailers_of(layout)
    suffix, kind = ("", "fp32") if dtype == torch.float32 else ("_bf16", "bf16")
    pointer, count = (lambda t: ctypes.c_void_p(t.data_ptr())), ctypes.c_int64(n)
    cases = []

    def pair(name: str, op: Callable, loop: str, on: list[Tensor], planes: int):
        # A plane of bits is one eighth of a byte an element, and one plane has a blank bit a word;
        # the plain loop has neither.
        loop_bytes = {"read3_write2": 5, "read2_write1": 3, "read1_write1": 2}[loop] * size * n
        call = partial(getattr(plain, loop + suffix), *map(pointer, on), count)
        loop_name = f"plain {loop}, {kind}"
        if all(case.name != loop_name for case in cases):
            # The tensors go along: the pointers alone would not keep them.
            cases.append(Case(loop_name, lambda call=call, on=on: call(), loop_bytes))
        n_bytes = loop_bytes + planes * n // 8 + planes % 2 * n // 256
        cases.append(Case(f"{name}, {kind}", op, n_bytes, loop_name, 0.85))

    step = partial(OPS.lion_step, [p], [g], [m], **RATES, **BETAS, maximize=False)
    pair("lion_step", step, "read3_write2", [p, g, m], 0)
    encode = partial(
        OPS.encode, [g], [m], ballot, blanks, **BETAS, maximize=False, seed=0, rank=0, step=STEP,
        nonfinite=counter, trailers=trailers.clone(), trailer=trailers[0], shared=STEP.view(1),
    )  # fmt: skip
    pair("encode", encode, "read2_write1", [g, m], 1)
    for planes, verdict, of_verdict in ((1, ballot, blanks), (2, two_planes, None)):
        steps = torch.zeros(1, dtype=torch.int64)
        apply = partial(
            OPS.apply, [p], verdict, of_verdict, trailers, scale=planes, **RATES, step=steps
        )
        pair(f"apply, {planes} plane", apply, "read1_write1", [p], planes)
    return cases


def ops_section(how: timing.How, quick: bool) -> list[Result]:
    n, plain, results = 1_000_000 if quick else 64_000_000, timing.load_ceiling(), []
    print(f"\nops: one flat tensor of {n / 1e6:.0f}M elements")
    for dtype in (torch.float32, torch.bfloat16):
        cases = elementwise_cases(plain, dtype, n)
        results += timing.measure(cases, how, "ops", timing.rate_ratio)
    print(timing.table(results, "of plain loop"))
    print("bytes an element: read plus written, 1/8 for a plane of bits, 1/256 for blank bits")
    return results


# Section options.

# Options and the bytes that they take more than a float32 momentum does, an element.
OPTIONS: dict[str, tuple[dict[str, object], float]] = {
    "bfloat16 momentum": ({"momentum_dtype": "bfloat16"}, -4),
    "int8 momentum": ({"momentum_dtype": "int8"}, -8 + 2 * (1 + 4 / MOMENTUM_BLOCK)),
    "stochastic": ({"rounding": "stochastic"}, 0),
    "compensated": ({"rounding": "compensated"}, 4),
    "skip": ({"nonfinite": "skip"}, 0),
    "cautious, both": ({"cautious": True, "cautious_weight_decay": True}, 0),
    "cautious, rescaled": ({"cautious": "rescaled"}, 4),  # and the gradient once more
}


def options_section(how: timing.How, quick: bool) -> list[Result]:
    n, results = 1_000_000 if quick else 64_000_000, []
    print(f"\noptions: one step, one flat tensor of {n / 1e6:.0f}M elements, float32 momentum")
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        p = torch.nn.Parameter((0.02 * torch.randn(n)).to(dtype))
        p.grad, size = (1e-3 * torch.randn(n)).to(dtype), dtype.itemsize
        plain = f"Lion, {kind}"

        def step(p: torch.nn.Parameter = p, **options: object) -> Callable[[], object]:
            return lion_kernels.Lion(
                [p], **{**SETTINGS, "momentum_dtype": "float32", **options}
            ).step

        cases = [Case(plain, step(), (3 * size + 8) * n)]
        for name, (options, more) in OPTIONS.items():
            if "rounding" in options and dtype == torch.float32:
                continue  # float32 drops nothing
            more += size if name.endswith("rescaled") else 0
            n_bytes = int((3 * size + 8 + more) * n)
            limit = {"stochastic": 1.1, "int8 momentum": 1.0}.get(name)
            cases.append(Case(f"{name}, {kind}", step(**options), n_bytes, plain, limit=limit))
        results += timing.measure(cases, how, f"options, {kind}", timing.time_ratio)
    print(timing.table(results, "plain = 1"))
    return results


# Section tally.


def count_cases(plain: ctypes.CDLL, poll: Poll, words: int) -> list[Case]:
    """tally and elect of ballots after a copy that reads and writes as many bytes as tally. Of
    binary ballots no word is blank, or one in 1024 ("blank words"), so that every strip has one."""
    ballots = random_ballots(poll.voters, poll.ballot_planes, words)
    tally, verdict = random_words(poll.tally_planes, words), random_words(2, words)
    coin = random_words(1, words)
    total = ballots.nbytes + tally.nbytes
    scratch = random_words(total // 8)
    args = (ctypes.c_void_p(ballots.data_ptr()), ctypes.c_void_p(scratch.data_ptr()))
    kind = f"N={poll.voters} {poll.ballots}"
    if words & (words - 1) == 0:
        kind += f", stride 2^{words.bit_length() - 1} words"
    copy = f"plain copy, {kind}"

    def run_copy(keep=(ballots, scratch)) -> None:
        plain.copy(*args, ctypes.c_int64(total // 8))

    cases = [Case(copy, run_copy, total // 8 * 8)]
    rest = {"scale": poll.scale, "first_word": 0, "seed": 0, "step": STEP}
    blanks = some = of_coin = None
    if poll.ballots == "binary":
        blanks, of_coin = (
            torch.zeros(rows, words_of(words), dtype=torch.int32) for rows in (poll.voters, 1)
        )
        some = blanks.clone()
        some[:, ::32] = 1
    weights = torch.ones(poll.voters, dtype=torch.int32)
    counts = [
        ("tally", OPS.tally, tally, {"blanks": blanks}),
        ("elect", OPS.elect, verdict, {"blanks": blanks}),
        ("elect with coins", OPS.elect, coin, {"blanks": blanks, "out_blanks": of_coin}),
        ("elect, weights", OPS.elect, verdict, {"blanks": blanks, "weights": weights}),
    ]
    if some is not None:
        counts.append(("elect, blank words", OPS.elect, verdict, {"blanks": some}))
    for name, op, out, more in counts:
        call = partial(op, ballots, out, **rest, **more)
        n_bytes = ballots.nbytes + out.nbytes + (0 if blanks is None else blanks.nbytes)
        target = 0.7 if poll.voters == 8 and "," not in name else None
        cases.append(Case(f"{name}, {kind}", call, n_bytes, copy, target))
    return cases


def tally_section(how: timing.How, quick: bool) -> list[Result]:
    plain, results = timing.load_ceiling(), []
    shrink = 64 if quick else 1
    print(f"\ntally: {128 // shrink} MB of ballots")
    for n, kind, words in (
        (8, "binary", 4_000_000),
        (8, "binary", 2**22),
        (8, "ternary", 2_000_000),
        (64, "binary", 500_000),
        (64, "binary", 2**19),
    ):
        cases = count_cases(plain, Poll(n, ballots=kind), words // shrink // 8 * 8)
        results += timing.measure(cases, how, "tally", timing.rate_ratio)
    print(timing.table(results, "of copy"))
    print("bytes: ballots read plus planes written; the copy counts what it reads and writes")
    return results


# Section memory.


def memory_section() -> list[dict[str, object]]:
    """Buffers of DistributedLion for GPT-2: sharded, majority, binary ballots."""
    numels = tuple(torch.Size(shape).numel() for shape in gpt2_shapes())
    rows = []
    for world_size in (4, 8):
        for ties in ("zero", "coin"):
            # On the meta device the storages have a size and no memory.
            poll = Poll(world_size, ties=ties)
            buffers = Buffers.allocate(numels, poll, True, 0, torch.device("meta"))
            tensors = (t for t in vars(buffers).values() if isinstance(t, Tensor))
            storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
            per_parameter = sum(storages.values()) / sum(numels)
            rows.append(
                {
                    "case": f"N={world_size}, ties={ties}",
                    "bytes": sum(storages.values()),
                    "bytes_per_parameter": round(per_parameter, 4),
                    "target": 0.5,
                    "reached": per_parameter <= 0.5,
                }
            )
    print("\nmemory: buffers of DistributedLion beside the momentum, GPT-2 124M, one rank")
    headers = ["case", "MB", "bytes a parameter", "target", "reached"]
    body = [
        [
            r["case"],
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['bytes_per_parameter']:.4f}",
            f"<= {r['target']}",
            "yes" if r["reached"] else "NO",
        ]
        for r in rows
    ]
    print(tabulate(body, headers, disable_numparse=True, colalign=["left"] + ["right"] * 4))
    return rows


def plot(results: list[Result], head: dict[str, object], path: str) -> None:
    """Write the step section as a bar chart, the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(results, key=lambda r: r.ms[0])
    figure, axes = pyplot.subplots(figsize=(7.2, 0.42 * len(ordered) + 0.9))
    colors = ["#0072B2" if r.case.name == OURS else "#A6A6A6" for r in ordered]
    bars = axes.barh([r.case.name for r in ordered], [r.ms[0] for r in ordered], color=colors)
    axes.bar_label(bars, [f"{r.ms[0]:.0f} ms" for r in ordered], padding=4)
    axes.invert_yaxis()
    axes.set_title(
        f"One step, GPT-2 124M in fp32, {head['threads']} cores of {head['cpu']}",
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    figure.savefig(path, dpi=160, bbox_inches="tight")


SECTIONS = ("step", "ops", "options", "tally", "memory")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (default 21)")
    parser.add_argument("--warmup", type=int, default=3, help="dropped rounds before (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections (default: all)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/cpu-<model>-<date>.json"
    )
    parser.add_argument(
        "--peers", nargs="+", default=[""], metavar="WORD",
        help="section step: only peers whose name holds one of these. The memory that one peer "
        "frees is there for the next: alone they are slower",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="draw the section step as a bar chart")
    args = parser.parse_args()
    if args.rounds < 2 or args.warmup < 0:
        parser.error("--rounds must be at least 2, --warmup at least 0")
    if args.plot and "step" not in args.only:
        parser.error("--plot draws the section step, which --only leaves out")
    if args.quick and (args.plot or args.save):
        parser.error("--quick times nothing worth keeping: leave out --plot and --save")
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    check(args.only)
    head = timing.header()
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    how = timing.How(args.rounds, args.warmup), args.quick
    sections: dict[str, object] = {}
    if "step" in args.only:
        results = step_section(*how, args.peers)
        sections["step"] = timing.rows_of(results)
        if args.plot:
            plot(results, head, args.plot)
    if "ops" in args.only:
        sections["ops"] = timing.rows_of(ops_section(*how))
    if "options" in args.only:
        sections["options"] = timing.rows_of(options_section(*how))
    if "tally" in args.only:
        sections["tally"] = timing.rows_of(tally_section(*how))
    if "memory" in args.only:
        sections["memory"] = memory_section()
    if args.save:
        path = timing.result_path("cpu", head["cpu"], head["date"])
        timing.save(path, head, sections)
        print(f"\nwrote {path.relative_to(timing.ROOT)}")


if __name__ == "__main__":
    main()
