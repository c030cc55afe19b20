"""Which 8-bit blockwise format should hold Lion's momentum? A study on one CPU core, in minutes.

A byte-level transformer is trained with float32 Lion, and each candidate format advances a shadow
of the momentum from the same gradients: stored, read back, updated, stored. A shadow is compared
with the float32 momentum, and by what decides Lion's step, the sign of the interpolation. Then some
formats train by themselves. Nothing is timed; the formats are written for reading, not for speed.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import timing

sys.path.append(str(timing.ROOT / "examples"))
import train_bytes as job

BETA1, BETA2 = 0.9, 0.99
LARGEST_BLOCK = 2048
LAST_STEPS, EVERY, LOSS_STEPS, TINY_STEPS, DECAY_STEPS = 100, 10, 50, 50, 100
MODEL = {"batch": 4, "width": 128, "heads": 2}  # small enough for one core
TINY = 2.0**-30  # about 1e-9; a power of two, so that a scaled format makes the same roundings
# Blue, vermilion, green and purple of Okabe and Ito: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

Coins = torch.Generator


def safe(scale: Tensor) -> Tensor:
    """A divisor for blocks of zeros too."""
    return torch.where(scale == 0, 1.0, scale)


def companded(m: Tensor, coins: Coins, k: int, stochastic: bool = False) -> Tensor:
    """sign * absmax * (q / 127)**k, where q = round(127 * (|m| / absmax)**(1 / k)). Stochastic: one
    of the two values around m, so that the mean is m."""
    absmax = m.abs().amax(-1, keepdim=True)
    share = m.abs() / safe(absmax)
    exact = 127 * share.pow(1 / k)
    if stochastic:
        q = exact.floor().clamp_(max=126)
        low, high = (q / 127).pow(k), ((q + 1) / 127).pow(k)
        q += torch.rand(m.shape, generator=coins) < (share - low) / (high - low)
    else:
        q = exact.round()
    return absmax * (q / 127).pow(k) * m.sign()


def dynamic_map() -> Tensor:
    """bitsandbytes' 256 signed values (dynamic tree quantization, arXiv:1511.04561): in each of
    seven decades twice as many as in the one below, and 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values


MAP = dynamic_map()
MIDPOINTS = (MAP[:-1] + MAP[1:]) / 2


def mapped(m: Tensor, coins: Coins) -> Tensor:
    """The nearest of bitsandbytes' values, times absmax."""
    absmax = m.abs().amax(-1, keepdim=True)
    return absmax * MAP[torch.bucketize(m / safe(absmax), MIDPOINTS)]


def microscaled(m: Tensor, coins: Coins) -> Tensor:
    """MXINT8: q / 64 times the power of two at or below absmax, |q| at most 127."""
    absmax = m.abs().amax(-1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(absmax), safe(absmax).frexp().exponent - 1)
    return scale * (m / scale * 64).round().clamp_(-127, 127) / 64


def bfloat16(m: Tensor, coins: Coins) -> Tensor:
    return m.bfloat16().float()


def float32(m: Tensor, coins: Coins) -> Tensor:
    return m


@dataclass(frozen=True)
class Format:
    name: str
    kind: str  # the colour in the picture
    block: int
    stored: Callable[[Tensor, Coins], Tensor]  # (blocks, block) as it is read back
    element_bytes: int = 1
    scale_bytes: int = 4

    def __call__(self, m: Tensor, coins: Coins) -> Tensor:
        return self.stored(m.view(-1, self.block), coins).view(-1)

    def bytes_a_parameter(self, sizes: list[int]) -> float:
        scales = sum(-(-n // self.block) for n in sizes) * self.scale_bytes
        return self.element_bytes + scales / sum(sizes)


def power(k: int, block: int, stochastic: bool = False) -> Format:
    name = f"k = {k}, block {block}" + (", stochastic" if stochastic else "")
    return Format(name, f"k = {k}", block, lambda m, coins: companded(m, coins, k, stochastic))


BF16 = Format("bf16", "bf16", 1, bfloat16, 2, 0)
DYNAMIC = Format("dynamic map, block 256", "dynamic map", 256, mapped)
MXINT8 = Format("MXINT8, block 32", "MXINT8", 32, microscaled, 1, 1)
SHADOWS = (
    BF16,
    *(power(k, 128) for k in (1, 2, 3, 4)),
    *(power(2, block) for block in (32, 64, 256, 2048)),
    *(power(4, block) for block in (64, 256)),
    *(power(k, 128, stochastic=True) for k in (1, 2, 4)),
    DYNAMIC,
    MXINT8,
)
TRAINED = (
    Format("float32", "float32", 1, float32, 4, 0),
    BF16,
    *(power(k, 128) for k in (1, 2, 4)),
    DYNAMIC,
    MXINT8,
)


def model_of(settings: argparse.Namespace) -> job.ByteTransformer:
    return job.ByteTransformer(settings.width, settings.layers, settings.heads, settings.context)


def sizes_of(settings: argparse.Namespace) -> list[int]:
    return [p.numel() for p in model_of(settings).parameters()]


def lion(
    text: Tensor, settings: argparse.Namespace, seed: int, stored: Format
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Train, yielding before each update the loss, the gradient and the momentum. Both are flat;
    each tensor begins a block of any size, and what is left of its last block stays 0."""
    torch.manual_seed(seed)
    model = model_of(settings)
    params = list(model.parameters())
    rooms = [-(-p.numel() // LARGEST_BLOCK) * LARGEST_BLOCK for p in params]
    flat, grad, m = (torch.zeros(sum(rooms)) for _ in range(3))
    for p, value, g in zip(params, flat.split(rooms), grad.split(rooms), strict=True):
        value[: p.numel()] = p.data.flatten()
        p.data, p.grad = value[: p.numel()].view_as(p), g[: p.numel()].view_as(p)
    batches, coins = Coins().manual_seed(seed), Coins().manual_seed(seed + 1000)
    last_start = len(text) - settings.context
    for step in tqdm(range(settings.steps), f"{stored.name}, seed {seed}", disable=None):
        starts = torch.randint(last_start, (settings.batch,), generator=batches)
        grad.zero_()
        loss = job.loss_of(model, job.windows(text, starts, settings.context))
        loss.backward()
        yield loss.item(), grad, m
        lr = settings.lr_lion * job.schedule(step, settings)
        flat.mul_(1 - lr * settings.weight_decay_lion).sub_(lr * interpolated(m, grad).sign())
        m = stored(updated(m, grad), coins)


def interpolated(m: Tensor, g: Tensor) -> Tensor:
    return BETA1 * m + (1 - BETA1) * g


def updated(m: Tensor, g: Tensor) -> Tensor:
    return BETA2 * m + (1 - BETA2) * g


def error_of(shadow: Tensor, m: Tensor) -> float:
    return ((shadow - m).norm() / m.norm()).item()


def left_by_decay(f: Format) -> float:
    """What steps without a gradient leave of a random momentum, over what float32 keeps: above 1
    the format is stuck, below 1 it shrinks by itself."""
    m = torch.randn(2**16, generator=Coins().manual_seed(2))
    coins, shadow = Coins().manual_seed(3), m
    for _ in range(DECAY_STEPS):
        m, shadow = BETA2 * m, f(BETA2 * shadow, coins)
    return (shadow @ m / (m @ m)).item()


def follow(text: Tensor, settings: argparse.Namespace) -> list[dict[str, object]]:
    """Section shadows: how far each format's momentum is from float32's."""
    sizes = sizes_of(settings)
    shadows: dict[str, Tensor] = {f.name: torch.zeros(()) for f in SHADOWS}
    tiny, coins = dict(shadows), {f.name: Coins().manual_seed(1) for f in SHADOWS}
    tiny_coins = {f.name: Coins().manual_seed(1) for f in SHADOWS}
    errors, signs, zeros = ({f.name: [] for f in SHADOWS} for _ in range(3))
    early: dict[str, tuple[float, float]] = {}
    for step, (_, g, m) in enumerate(lion(text, settings, 0, TRAINED[0])):
        left = settings.steps - step
        sampled = step > 0 and left <= LAST_STEPS and left % EVERY == 0
        sign = interpolated(m, g).sign()
        for f in SHADOWS:
            shadow = shadows[f.name]
            if step == TINY_STEPS:
                early[f.name] = error_of(shadow, m), error_of(tiny[f.name] / TINY, m)
            if sampled:
                differing = interpolated(shadow, g).sign() != sign
                errors[f.name].append(error_of(shadow, m))
                signs[f.name].append(differing.sum().item() / sum(sizes))
                lost = (shadow == 0) & (m != 0)
                zeros[f.name].append(lost.sum().item() / sum(sizes))
            shadows[f.name] = f(updated(shadow, g), coins[f.name])
            if step < TINY_STEPS:
                tiny[f.name] = f(updated(tiny[f.name], g * TINY), tiny_coins[f.name])
    return [
        {
            "format": f.name,
            "kind": f.kind,
            "block": f.block,
            "bytes_a_parameter": f.bytes_a_parameter(sizes),
            "momentum_error": mean(errors[f.name]),
            "sign_differences": mean(signs[f.name]),
            "lost_to_zero": mean(zeros[f.name]),
            "early_error": early[f.name][0],
            "early_error_tiny_gradients": early[f.name][1],
            "left_by_decay": left_by_decay(f),
        }
        for f in SHADOWS
    ]


def train(text: Tensor, settings: argparse.Namespace, seeds: int) -> list[dict[str, object]]:
    """Section training: the loss that each format reaches by itself."""
    rows, exact = [], []
    for f in TRAINED:
        finals = []
        for seed in range(seeds):
            losses = [loss for loss, _, _ in lion(text, settings, seed, f)]
            finals.append(mean(losses[-LOSS_STEPS:]))
        exact = exact or finals
        more = [a - b for a, b in zip(finals, exact, strict=True)]
        rows.append({"format": f.name, "losses": finals, "mean": mean(finals), "more": more})
    return rows


def table(cells: list[list[str]], names: list[str]) -> str:
    align = ["left"] + ["right"] * (len(names) - 1)
    return tabulate(cells, names, "pipe", disable_numparse=True, colalign=align)


def shadow_table(rows: list[dict[str, object]]) -> str:
    names = ["format", "bytes a parameter", "momentum error", "sign differences", "lost to zero"]
    names += [f"error, step {TINY_STEPS}", "same, gradients * 2^-30", "decay"]
    cells = [
        [row["format"], f"{row['bytes_a_parameter']:.3f}"]
        + [f"{100 * row[key]:.3f} %" for key in list(row)[4:]]
        for row in rows
    ]
    return table(cells, names)


def training_table(rows: list[dict[str, object]]) -> str:
    names = ["momentum", "loss, mean", "more than float32, mean", "its spread", "loss of each seed"]
    cells = []
    for row in rows:
        more = row["more"]
        spread = f"{stdev(more):.4f}" if len(more) > 1 else ""
        each = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        cells.append([row["format"], f"{row['mean']:.4f}", f"{mean(more):+.4f}", spread, each])
    return table(cells, names)


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Sign differences against bytes a parameter; bf16, far to the right, is a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    kinds = dict.fromkeys(row["kind"] for row in rows if row["kind"] != "bf16")
    colours = dict(zip(kinds, (*COLOURS, "black", "dimgrey"), strict=True))
    ticks = {}
    for row in rows:
        x, y = row["bytes_a_parameter"] - 1, 100 * row["sign_differences"]
        if row["kind"] == "bf16":
            axes.axhline(y, color="dimgrey", linestyle=":", linewidth=1)
            axes.text(0.21, y, "bf16, at 2 bytes", va="bottom", ha="right", color="dimgrey")
            continue
        ticks[f"{1 + x:.3f}"] = x
        colour, stochastic = colours[row["kind"]], row["format"].endswith("stochastic")
        axes.plot(x, y, "o", color=colour, markerfacecolor="none" if stochastic else colour)
        right = stochastic or x > 0.05
        place = {"xytext": (7 if right else -7, 0), "textcoords": "offset points"}
        place |= {"ha": "left" if right else "right", "va": "center", "fontsize": 9}
        label = "stochastic" if stochastic else row["format"].replace(", block", ",")
        axes.annotate(label, (x, y), color=colour, **place)
    axes.set(xscale="log", xlim=(1e-3, 0.22), ylim=(0, None), xlabel="bytes a parameter")
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.minorticks_off()
    axes.set_ylabel("signs of the step that differ from float32's, %")
    title = "Lion's momentum in 8 bits: format, block (a colour is a k; open: stochastic rounding)"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160, bbox_inches="tight")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of every run (default 300)")
    parser.add_argument("--seeds", type=int, default=3, help="runs a trained format (default 3)")
    out = timing.ROOT / "bench" / "results" / "momentum"
    parser.add_argument("--out", type=Path, default=out, help="path without .json, .md and .png")
    args = parser.parse_args()
    least = max(TINY_STEPS, LOSS_STEPS) + EVERY
    if args.steps < least or args.seeds < 1:
        parser.error(f"--steps must be at least {least}, --seeds at least 1")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    given = {"steps": args.steps, **MODEL}
    settings = job.parse_args([f"--{key}={value}" for key, value in given.items()])
    text, _ = job.load_text()
    about = {"parameters": sum(sizes_of(settings)), "seeds": args.seeds}
    head = timing.header() | given | about
    shadows = follow(text, settings)
    print(f"\n{shadow_table(shadows)}\n", flush=True)
    training = train(text, settings, args.seeds)
    print(f"\n{training_table(training)}\n", flush=True)
    timing.save(args.out.with_suffix(".json"), head, {"shadows": shadows, "training": training})
    lines = [
        "# Formats of Lion's momentum",
        ", ".join(f"{key} {value}" for key, value in head.items()),
        "Shadows of the float32 momentum from the same gradients: means over every "
        f"{EVERY}th of the last {LAST_STEPS} steps. Errors are norms over the float32 momentum's "
        "norm; the other shares are of all elements. Stochastic rounding is to one of the two "
        f"values around, without bias. Decay: what {DECAY_STEPS} steps without a gradient leave of "
        "a random momentum, float32 = 100 %.",
        shadow_table(shadows),
        f"Training with each format: loss in nats a byte, mean of the last {LOSS_STEPS} steps. "
        "A run is compared with the float32 run of its seed; the spread is the standard deviation "
        "over the seeds.",
        training_table(training),
    ]
    args.out.with_suffix(".md").write_text("\n\n".join(lines) + "\n")
    draw(shadows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
