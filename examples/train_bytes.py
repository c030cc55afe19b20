"""The training job: one small byte-level transformer, trained four times with the same seed,
batches and schedule, and what each way of updating it costs on the wire.

Distributed Lion (majority, then average) sends votes; Lion and AdamW average their gradients over
the ranks in bfloat16. The text is the Python standard library's own source. Run it with
`make train`; what is measured, and how it is written down, is bytes_report.py's.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":
    # Before torch starts threads, which inherit the mask: only the watcher takes these signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lion_kernels  # noqa: E402
from bytes_report import CurvePoint, MethodRun, Report, WireCounter  # noqa: E402

METHODS = {
    "majority": "Distributed Lion, majority",
    "average": "Distributed Lion, average",
    "lion": "Lion, bf16 all-reduce",
    "adamw": "AdamW, bf16 all-reduce",
}
# Libraries that are not the same on every machine, or hardly text.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# How long the ranks have to agree on a last step before each leaves by itself.
GRACE_S = 10.0


class Block(nn.Module):
    """Pre-norm causal attention and a GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ByteTransformer(nn.Module):
    """Bytes (batch, time) to logits of the next byte (batch, time, 256). Each position embeds its
    byte and the two before it, which spares a short run the learning of attention to them."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.earlier = nn.ModuleList([nn.Embedding(256, width) for _ in range(2)])
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        std = 0.02 * math.sqrt(768 / width)  # GPT-2's, which is for a width of 768
        for name, p in self.named_parameters():
            if p.dim() == 2:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * layers) if ends_branch else std)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bytes(x) + self.positions.weight[: x.shape[1]]
        for back, embedding in enumerate(self.earlier, start=1):
            h = h + F.pad(embedding(x[:, :-back]), (0, 0, back, 0))
        return F.linear(self.norm(self.blocks(h)), self.bytes.weight)


def load_text() -> tuple[Tensor, Tensor]:
    """The standard library's sources as uint8 (training, validation), split by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not EXCLUDED_FOLDERS.intersection(name.split("/")):
            parts[zlib.crc32(name.encode()) % 20 == 0].append((root / name).read_bytes())
    train, val = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, val


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """int64 (len(starts), context + 1): inputs, and targets one byte later."""
    return text[starts.unsqueeze(1) + torch.arange(context + 1)].long()


def draw_batch(text: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """This rank's own random windows; the same for every method."""
    key = zlib.crc32(f"{args.seed} {dist.get_rank()} {step}".encode())
    generator = torch.Generator().manual_seed(key)
    starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator)
    return windows(text, starts, args.context)


def loss_of(model: nn.Module, batch: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(
    model: nn.Module, text: Tensor, args: argparse.Namespace, device: torch.device
) -> float:
    """Bits per byte over fixed windows of the validation text, split over the ranks."""
    last = len(text) - args.context - 1
    starts = torch.linspace(0, last, args.eval_windows, dtype=torch.float64).long()
    own = windows(text, starts[dist.get_rank() :: dist.get_world_size()], args.context)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in own.split(16):
        total += loss_of(model, batch.to(device), reduction="sum")
    dist.all_reduce(total)
    return total.item() / (math.log(2) * len(starts) * args.context)


def average_gradients(params: list[nn.Parameter], flat: Tensor, counter: WireCounter) -> None:
    """Replace the gradients by their mean over the ranks, sent as one bfloat16 buffer."""
    flat.copy_(torch.cat([p.grad.flatten() for p in params]) / dist.get_world_size())
    with counter:
        dist.all_reduce(flat)
    for p, mean in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(mean.view_as(p))


def build_optimizer(
    method: str, params: list[nn.Parameter], args: argparse.Namespace
) -> torch.optim.Optimizer:
    lr = getattr(args, f"lr_{method}")
    if method == "adamw":
        betas, weight_decay = tuple(args.betas_adamw), args.weight_decay_adamw
        return torch.optim.AdamW(params, lr, betas, weight_decay=weight_decay, fused=True)
    betas, weight_decay = tuple(args.betas_lion), args.weight_decay_lion
    if method == "lion":
        return lion_kernels.Lion(params, lr, betas, weight_decay)
    return lion_kernels.DistributedLion(
        params, lr, betas, weight_decay, aggregation=method, seed=args.seed,
        statistics_every=10 if args.tensorboard else 0,
    )  # fmt: skip


def schedule(step: int, args: argparse.Namespace) -> float:
    """The factor on lr: linear warm-up, then a cosine to 0."""
    if step < args.warmup:
        return (step + 1) / (args.warmup + 1)
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def log_votes(votes: lion_kernels.DistributedLion, method: str, run: MethodRun, folder: str) -> int:
    """Writes how ranks voted since the last time, for TensorBoard. Returns the bytes it sent."""
    from torch.utils.tensorboard import SummaryWriter

    before = votes.wire_bytes
    counts = votes.vote_statistics()
    if counts is not None and dist.get_rank() == 0:
        with SummaryWriter(f"{folder}/{method}") as writer:
            writer.add_scalar("validation bits a byte", run.curve[-1].val_bits_per_byte, run.steps)
            for rank, share in enumerate(counts.agreement):
                writer.add_scalar(f"agreement/rank {rank}", share, run.steps)
            for name, share in vars(counts.groups[0]).items():
                writer.add_scalar(f"votes/{name}", share, run.steps)
    return votes.wire_bytes - before


def stop_agreed(loss: Tensor, stop: threading.Event, parent: int) -> tuple[float, bool]:
    """The mean loss, and whether any rank was asked to stop, so that all stop at one step. A rank
    whose launcher died asks too."""
    asked = stop.is_set() or os.getppid() != parent
    facts = torch.stack([loss.detach(), torch.full_like(loss, float(asked))])
    dist.all_reduce(facts)
    return facts[0].item() / dist.get_world_size(), facts[1].item() > 0


def train(
    method: str,
    text: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    device: torch.device,
    stop: threading.Event,
    run: MethodRun,
) -> bool:
    """Train anew with one method, writing into ``run``; False when asked to stop before the end."""
    torch.manual_seed(args.seed)
    model = ByteTransformer(args.width, args.layers, args.heads, args.context).to(device)
    params = list(model.parameters())
    optimizer = build_optimizer(method, params, args)
    votes = isinstance(optimizer, lion_kernels.DistributedLion)
    flat = torch.empty(sum(p.numel() for p in params), dtype=torch.bfloat16, device=device)
    counter, world, parent = WireCounter(dist.get_world_size()), dist.get_world_size(), os.getppid()
    base_lr, stopped = optimizer.param_groups[0]["lr"], False
    with progress_bar(METHODS[method], args.steps) as bar:
        for step in range(args.steps):
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = base_lr * schedule(step, args)
            batch = draw_batch(text[0], args, step).to(device)
            loss = loss_of(model, batch)
            loss.backward()
            if not votes:
                average_gradients(params, flat, counter)
            with counter if votes else contextlib.nullcontext():
                optimizer.step()
            if votes and step == 0:
                # In the first step ranks agree on who votes, and compare a hash of gradients:
                # a few bytes that are no votes.
                beside = counter.bytes_sent - optimizer.wire_bytes
            optimizer.zero_grad()
            # Eight bytes for the progress bar and for Ctrl-C, the same for all: not counted.
            mean_loss, stopped = stop_agreed(loss, stop, parent)
            run.seconds += time.perf_counter() - start
            run.steps, run.bytes_sent = step + 1, counter.bytes_sent
            run.tokens_per_s = run.steps * world * args.batch * args.context / run.seconds
            if stopped:
                break
            if run.steps % args.eval_every == 0 or run.steps == args.steps:
                bits = evaluate(model, text[1], args, device)
                run.curve.append(CurvePoint(run.steps, bits, counter.bytes_sent))
                if votes and args.tensorboard:
                    beside -= log_votes(optimizer, method, run, args.tensorboard)
            show(bar, mean_loss, run)
    if votes:
        # In each step ranks may tell which of this program's optimizers they step: eight bytes.
        others = counter.bytes_sent - optimizer.wire_bytes - beside
        if not (0 <= others <= 8 * world * run.steps and beside < 10_000):
            raise RuntimeError(
                f"{METHODS[method]}: counted {counter.bytes_sent} bytes at the collectives, "
                f"the optimizer says {optimizer.wire_bytes}, and {beside} others in the first step"
            )
        optimizer.verify_replicas()
    run.finished = not stopped
    return run.finished


def progress_bar(label: str, steps: int) -> tqdm:
    """On rank 0 alone; a line now and then where nobody watches a terminal."""
    look = {"desc": f"{label:<26}", "unit": "step", "dynamic_ncols": True}
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, disable=dist.get_rank() != 0, mininterval=interval, **look)


def show(bar: tqdm, mean_loss: float, run: MethodRun) -> None:
    facts = {"loss": f"{mean_loss / math.log(2):.2f} b/B", "tok/s": f"{run.tokens_per_s:,.0f}"}
    if run.curve:
        facts["val"] = f"{run.curve[-1].val_bits_per_byte:.3f}"
    bar.set_postfix(facts, refresh=False)
    bar.update()


def watch(stop: threading.Event, report: Report) -> None:
    """Wait for Ctrl-C. Before training, leave at once. After, ask the training loop to stop with
    the other ranks; if it hangs because one of them is gone, save what there is and leave."""
    number = signal.sigwait(STOP_SIGNALS)
    stop.set()
    if report.started:
        time.sleep(GRACE_S)
        with contextlib.suppress(Exception):
            report.publish()
    os._exit(128 + number)


def number(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a number that keeps the rule."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="train_bytes.py [options]",
        description="Train a byte-level transformer on the Python standard library's sources with "
        "Distributed Lion (majority, average), Lion and AdamW, and compare validation loss and "
        "bytes sent. Run it under torchrun, or as `make train ARGS='...'`; without a launcher "
        "it trains on one rank. On CUDA machines each rank takes one GPU. Ctrl-C stops all ranks "
        "and keeps what was measured.",
        epilog=Report.NOTE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = number(int, "at least 1", lambda x: x >= 1)
    natural = number(int, "in [0, 2**63)", lambda x: 0 <= x < 2**63)
    rate = number(float, "more than 0", lambda x: 0 < x < math.inf)
    decay = number(float, "at least 0", lambda x: 0 <= x < math.inf)
    beta = number(float, "in [0, 1)", lambda x: 0 <= x < 1)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to train with")
    add("--out", type=Path, default=Path("runs/train_bytes"), help="folder of the results")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--seed", type=natural, default=0, help="of weights, batches and coins")
    add("--steps", type=count, default=500, help="training steps per method")
    add("--warmup", type=natural, default=40, help="steps of linear warm-up")
    add("--batch", type=count, default=2, help="windows per rank and step")
    add(
        "--context",
        type=number(int, "at least 3", lambda x: x >= 3),
        default=64,
        help="bytes a window",
    )
    add("--width", type=count, default=192, help="of the residual stream")
    add("--layers", type=count, default=4, help="transformer blocks")
    add("--heads", type=count, default=3, help="attention heads a block")
    add("--eval-every", type=count, default=50, help="steps between validations")
    add("--eval-windows", type=count, default=256, help="validation windows, over all ranks")
    add("--lr-majority", type=rate, default=2e-4, help="learning rate, Distributed Lion majority")
    add("--lr-average", type=rate, default=2e-4, help="learning rate, Distributed Lion average")
    add("--lr-lion", type=rate, default=2e-4, help="learning rate, Lion")
    add("--lr-adamw", type=rate, default=1.5e-3, help="learning rate, AdamW")
    add("--betas-lion", type=beta, nargs=2, default=[0.9, 0.99], help="of the three Lions")
    add("--betas-adamw", type=beta, nargs=2, default=[0.9, 0.98], help="of AdamW")
    add("--weight-decay-lion", type=decay, default=0.3, help="of the three Lions")
    add("--weight-decay-adamw", type=decay, default=0.1, help="of AdamW")
    add("--tensorboard", metavar="DIR", default="", help="log there how ranks vote")
    args = parser.parse_args(argv)
    if args.tensorboard and find_spec("tensorboard") is None:
        parser.error("--tensorboard needs tensorboard: pip install tensorboard")
    if args.tensorboard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        parser.error("--tensorboard is for votes, of two ranks or more")
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    return args


@contextlib.contextmanager
def process_group(device_option: str) -> Iterator[torch.device]:
    """Join the launcher's ranks, NCCL on GPUs and Gloo on CPUs; yields this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = device_option == "cuda" or (device_option == "auto" and torch.cuda.is_available())
    if use_cuda:
        gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if ranks > gpus:
            sys.exit(f"{ranks} ranks need as many GPUs, got {gpus}; or give --device cpu")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        print("no launcher: training on one rank, which sends nothing; see `make train`")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    dist.destroy_process_group()


def describe(args: argparse.Namespace, device: torch.device, text: tuple[Tensor, Tensor]) -> dict:
    """What summary.json says of the run beside its results."""
    model = ByteTransformer(args.width, args.layers, args.heads, args.context)
    return {
        "settings": {key: str(v) if key == "out" else v for key, v in vars(args).items()},
        "versions": {
            "lion_kernels": lion_kernels.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": dist.get_backend(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_bytes": len(text[0]),
        "validation_bytes": len(text[1]),
    }


def count_reference(n_parameters: int, device: torch.device) -> int:
    """Bytes that one bfloat16 all-reduce of the gradients sends, counted like all others."""
    with WireCounter(dist.get_world_size()) as counter:
        dist.all_reduce(torch.zeros(n_parameters, dtype=torch.bfloat16, device=device))
    return counter.bytes_sent


def main() -> int:
    rank = int(os.environ.get("RANK", 0))
    with contextlib.redirect_stderr(sys.stderr if rank == 0 else open(os.devnull, "w")):
        args = parse_args()
    if rank == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"--out: {error}")
    report, stop = Report(args.out, args.methods, writes=rank == 0), threading.Event()
    threading.Thread(target=watch, args=(stop, report), daemon=True).start()
    try:
        with process_group(args.device) as device:
            text = load_text()
            report.about = describe(args, device, text)
            report.reference_bytes = count_reference(report.about["parameters"], device)
            report.started = True
            for method in args.methods:
                run = report.begin(method, METHODS[method])
                if not train(method, text, args, device, stop, run):
                    break
                report.save()
    except Exception:
        if report.started:
            report.publish()
        # Ranks that were asked to stop a moment earlier break the collectives of the others.
        if not stop.is_set():
            raise
    report.publish()
    return 0 if report.finished else 130


if __name__ == "__main__":
    sys.exit(main())
