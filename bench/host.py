"""How long the host takes for a step of many small tensors: `python bench/host.py`.

Tensors of 64 elements, so that nothing but the optimizer's own work is measured: on a CPU with one
thread, on a GPU up to the last launch, with the queue emptied outside the clock. Ours beside
torch's fused AdamW in the same rounds; "moved": every gradient lies elsewhere than a step before.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import Parameter
from tqdm import tqdm

import timing
from lion_kernels import Lion

# Tensors: (most microseconds of a step, by the design).
TARGETS_US = {1: None, 148: 250, 2000: 2000}
# A moved gradient may cost so many times the step without.
MOVED = 1.3


def parameters(n: int, device: str) -> list[Parameter]:
    return [Parameter(torch.randn(64, device=device)) for _ in range(n)]


class Case:
    """An optimizer, its parameters, and two sets of gradients that are there at once."""

    def __init__(self, name: str, opt: torch.optim.Optimizer, moved: bool) -> None:
        self.name, self.opt, self.moved = name, opt, moved
        self.params = opt.param_groups[0]["params"]
        self.sets = [[torch.randn_like(p) for p in self.params] for _ in range(2)]
        self.us: list[float] = []

    def round(self, i: int, device: str) -> None:
        for p, g in zip(self.params, self.sets[i % 2 if self.moved else 0], strict=True):
            p.grad = g
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.opt.step()
        self.us.append((time.perf_counter() - start) * 1e6)


def cases(n: int, device: str) -> list[Case]:
    return [
        Case("lion_kernels", Lion(parameters(n, device)), False),
        Case("lion_kernels, moved", Lion(parameters(n, device)), True),
        Case("fused AdamW", torch.optim.AdamW(parameters(n, device), fused=True), False),
        Case("fused AdamW, moved", torch.optim.AdamW(parameters(n, device), fused=True), True),
    ]


def measure(n: int, device: str, rounds: int) -> list[dict[str, object]]:
    found = cases(n, device)
    for i in tqdm(range(rounds + 5), desc=f"{n} tensors", leave=False):
        # Each comes first in turn: the caches are cold for who follows a larger one.
        for case in found[i % len(found) :] + found[: i % len(found)]:
            case.round(i, device)
    rows: list[dict[str, object]] = []
    median = {case.name: statistics.median(case.us[5:]) for case in found}
    for case in found:
        quantiles = statistics.quantiles(case.us[5:], n=5)
        rows.append(
            {
                "tensors": n, "optimizer": case.name, "us": round(median[case.name], 1),
                "p20": round(quantiles[0], 1), "p80": round(quantiles[-1], 1),
            }
        )  # fmt: skip
    most = TARGETS_US[n]
    ours, moved = median["lion_kernels"], median["lion_kernels, moved"]
    for row, reached in zip(
        rows,
        (
            (most is None or ours <= most) and ours <= median["fused AdamW"],
            moved <= MOVED * ours and moved <= median["fused AdamW, moved"],
        ),
        strict=False,
    ):
        row["reached"] = reached
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="timed rounds (default 100)")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=timing.RESULTS, metavar="FOLDER",
        help="write host-<device>-<date>.json (default bench/results)",
    )  # fmt: skip
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = {**timing.header(), "device": device}
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    rows = [row for n in TARGETS_US for row in measure(n, device, args.rounds)]
    body = [
        [
            row["tensors"], row["optimizer"], row["us"], f"{row['p20']} to {row['p80']}",
            {True: "yes", False: "NO"}.get(row.get("reached"), ""),
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["tensors", "optimizer", "us a step", "p20 to p80", "reached"]
    print(tabulate(body, headers, disable_numparse=True, colalign=("right", "left", "right")))
    targets = ", ".join(f"{us} us for {n} tensors" for n, us in TARGETS_US.items() if us)
    print(f"targets: {targets}; moved at most {MOVED} times that; never above fused AdamW")
    if args.save:
        model = torch.cuda.get_device_name() if device == "cuda" else head["cpu"]
        path = timing.result_path("host", model, head["date"], args.save)
        timing.save(path, head, {"host": rows})
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
