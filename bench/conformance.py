"""Judges every Lion at hand by lion_kernels.conformance and prints the tables as Markdown, with the
versions and the date:

    python bench/conformance.py > bench/results/conformance-cpu.md

What is not installed has no column. sdnq is GPL, is imported only here, and would bring diffusers
and transformers along: `pip install --no-deps sdnq==0.2.8`.
"""

import datetime
import importlib
import importlib.metadata

import torch

from lion_kernels import conformance

# Distributions and their classes, which are judged side by side.
PEERS = {
    "lion-pytorch": "lion_pytorch:Lion",
    "torch-optimi": "optimi:Lion",
    "pytorch_optimizer": "pytorch_optimizer:Lion",
    "bitsandbytes": "bitsandbytes.optim:Lion",
    "adv_optm": "adv_optm:Lion_adv",
    "sdnq": "sdnq.optim:Lion",
}
# Classes of one distribution and their options.
ALONE = [
    ("lion_kernels", ["lion_kernels:Lion", "rounding=stochastic", "nonfinite=skip"]),
    ("lion_kernels", ["lion_kernels:Lion", "rounding=compensated", "nonfinite=skip"]),
    (
        "lion_kernels",
        ["lion_kernels:Lion", "momentum_dtype=int8", "rounding=stochastic", "nonfinite=skip"],
    ),
    ("bitsandbytes", ["bitsandbytes.optim:Lion8bit", "min_8bit_size=1"]),
    ("sdnq", ["sdnq.optim:Lion", "clip_threshold=(1e9,1e-3,1e-3)"]),
]
NOTES = """\
What a class fails because it is meant so is a row like any other: momenta in 8 bits are not the
float32 formula, sdnq clips every gradient to [-1, 1] unless told otherwise (its last table), and
rounding to nearest loses small steps."""


def is_here(target: str) -> bool:
    module, _, name = target.partition(":")
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def table(classes: list[str], options: list[str]) -> None:
    words = f"'{' '.join(options)}'" if "(" in "".join(options) else " ".join(options)
    print(f"\n    python -m lion_kernels.conformance {' '.join(classes)}", end="")
    print(f" --kwargs {words}\n" if options else "\n")
    conformance.main([*classes, *(["--kwargs", *options] if options else [])])


def main() -> None:
    peers = {name: target for name, target in PEERS.items() if is_here(target)}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in peers)
    print(
        f"# Conformance on a CPU\n\ntorch {torch.__version__}, {versions}; {datetime.date.today()}."
    )
    print(NOTES)
    table(["lion_kernels:Lion", *peers.values()], [])
    for name, (target, *options) in ALONE:
        if name in ("lion_kernels", *peers):
            table([target], options)


if __name__ == "__main__":
    main()
