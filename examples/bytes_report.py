"""What the training job measures: bytes counted at the collectives, and the table, summary.json
and plot made of them.

Knows no model and no optimizer. Everything is written by rank 0, atomically, so that a file is
always whole.
"""

import json
import os
import textwrap
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

# Blue, vermilion, green and purple of Okabe and Ito: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "-", (0, (5, 2)), (0, (1.5, 1.5)))


def sent_by(op: str, args: tuple[Any, ...], ranks: int) -> int:
    """Bytes that leave a rank in one collective, from the tensors handed to it."""
    if op == "c10d::alltoall_base_":  # (output, input, ...): a rank keeps its own chunk
        return args[1].nbytes * (ranks - 1) // ranks
    if op == "c10d::_allgather_base_":  # (output, input, ...)
        return args[1].nbytes * (ranks - 1)
    if op == "c10d::allgather_":  # (lists of outputs, inputs, ...)
        return sum(t.nbytes for t in args[1]) * (ranks - 1)
    if op == "c10d::allreduce_":  # (tensors, ...): a ring's reduce-scatter and all-gather
        return 2 * sum(t.nbytes for t in args[0]) * (ranks - 1) // ranks
    raise RuntimeError(f"the counter does not know what {op} sends")


class WireCounter(TorchDispatchMode):
    """While it is entered, adds up what this rank's collectives send. Every op within goes through
    Python: entered around more than the collectives, it is what one measures."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes_sent = ranks, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.bytes_sent += sent_by(func._schema.name, args, self.ranks)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class CurvePoint:
    step: int
    val_bits_per_byte: float
    bytes_sent: int


@dataclass
class MethodRun:
    """One method's results; grows while it trains."""

    method: str
    label: str
    finished: bool = False
    steps: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)

    @property
    def bytes_per_step(self) -> float | None:
        return self.bytes_sent / self.steps if self.steps else None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


@dataclass
class Report:
    """All runs so far. Saved after every method; published, once, at the end."""

    NOTE: ClassVar[str] = (
        "Bytes sent are counted where collectives are called, from the tensors handed to them: of "
        "an all-to-all (N-1)/N of the input, of an all-gather N-1 times the input, of an "
        "all-reduce 2(N-1)/N of the tensor, which is what a ring sends."
    )

    out: Path
    methods: list[str]
    writes: bool
    started: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    reference_bytes: int = 0
    runs: list[MethodRun] = field(default_factory=list)
    published: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, method: str, label: str) -> MethodRun:
        self.runs.append(MethodRun(method, label))
        return self.runs[-1]

    @property
    def finished(self) -> bool:
        return len(self.runs) == len(self.methods) and all(run.finished for run in self.runs)

    def ratio(self, run: MethodRun) -> float | None:
        """How many times fewer bytes than a bfloat16 all-reduce of the gradients."""
        return self.reference_bytes / run.bytes_per_step if run.bytes_per_step else None

    def save(self) -> None:
        """Write summary.json and the plot."""
        if self.writes:
            summary = json.dumps(self.summary(), indent=2) + "\n"
            write_atomically(self.out / "summary.json", lambda path: path.write_text(summary))
            write_atomically(self.out / "curves.png", lambda path: plot(self.runs, path))

    def publish(self) -> None:
        """Save, and print the table; the second call, from another thread, only waits."""
        with self.lock:
            if self.writes and not self.published:
                self.published = True
                note = textwrap.fill(self.NOTE, 100, break_on_hyphens=False)
                print(f"\n{self.table()}\n\n{note}\n", flush=True)
                self.save()
                print(f"written: {self.out}/summary.json, {self.out}/curves.png", flush=True)

    def summary(self) -> dict[str, Any]:
        methods = []
        for run in self.runs:
            facts = asdict(run)
            curve = facts.pop("curve")
            final = curve[-1]["val_bits_per_byte"] if curve else None
            facts |= {
                "val_bits_per_byte": final,
                "bytes_sent_per_step": run.bytes_per_step,
                "times_fewer_bytes_than_bf16_all_reduce": self.ratio(run),
                "curve": curve,
            }
            methods.append(facts)
        return {
            "finished": self.finished,
            **self.about,
            "bytes_sent_note": self.NOTE,
            "bf16_all_reduce_bytes_sent_per_step": self.reference_bytes,
            "methods": methods,
        }

    def table(self) -> str:
        rows = []
        for run in self.runs:
            at = "" if run.finished else f" (stopped after step {run.steps})"
            ratio = self.ratio(run)
            rows.append(
                (
                    run.label + at,
                    f"{run.curve[-1].val_bits_per_byte:.3f}" if run.curve else "-",
                    "-" if run.bytes_per_step is None else f"{run.bytes_per_step:,.0f}",
                    "-" if ratio is None else f"{ratio:.2f} x less",
                    f"{run.tokens_per_s:,.0f}",
                    f"{run.seconds:.0f}",
                )
            )
        headers = (
            "method",
            "validation loss\n(bits per byte)",
            "bytes sent per\nrank and step",
            "against bf16\nall-reduce",
            "tokens/s",
            "training\nseconds",
        )
        align = ("left", *["right"] * 5)
        return tabulate(rows, headers, colalign=align if rows else None, disable_numparse=True)


def plot(runs: list[MethodRun], path: Path) -> None:
    """Validation loss against steps, and against bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with plt.rc_context(style):
        figure, (by_step, by_bytes) = plt.subplots(
            1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
        )
        for run, colour, dashes in zip(runs, COLOURS, DASHES, strict=False):
            label = run.label + ("" if run.finished else f" (stopped after step {run.steps})")
            look = {"color": colour, "linestyle": dashes, "linewidth": 2, "label": label}
            # One point makes no line: the last is marked, with a cross where the run was stopped.
            look |= {"marker": "o" if run.finished else "X", "markevery": [-1], "markersize": 7}
            losses = [point.val_bits_per_byte for point in run.curve]
            by_step.plot([point.step for point in run.curve], losses, **look)
            if run.curve and run.curve[0].bytes_sent:
                by_bytes.plot([point.bytes_sent for point in run.curve], losses, **look)
        by_bytes.set_xscale("log")
        by_bytes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        by_step.set(xlabel="training step", ylabel="validation loss (bits per byte)")
        by_bytes.set(xlabel="bytes sent per rank (log scale)")
        for axes in (by_step, by_bytes):
            axes.grid(axis="y", color="0.9", linewidth=0.8)
            axes.set_axisbelow(True)
        if runs:
            by_step.legend(frameon=False)
        figure.savefig(path, dpi=160, format="png")
        plt.close(figure)
