"""The command line: classes by name, a table of their outcomes."""

import argparse
import ast
import copy
import functools
import importlib
import sys
from typing import Any

import torch

from .checks import CHECKS, judge
from .common import Make


def maker(target: str, kwargs: dict[str, Any]) -> Make:
    """What builds ``module:Class`` with ``kwargs``."""
    module, _, name = target.partition(":")
    if not name:
        sys.exit(f"a Lion is named as module:Class, got {target!r}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        sys.exit(f"{target} cannot be imported: {error}")

    @functools.wraps(cls)  # for its signature
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return cls(params, **options, **copy.deepcopy(kwargs))

    return make


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lion_kernels.conformance")
    parser.add_argument("lion", nargs="+", help="module:Class, one or several")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="for every class named"
    )
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda needs a CUDA device, and torch has none")
    if wrong := [text for text in args.kwargs if "=" not in text]:
        sys.exit(f"--kwargs takes KEY=VALUE, got {wrong[0]!r}")
    kwargs = {key: _literal(value) for key, _, value in (t.partition("=") for t in args.kwargs)}
    found = {target: judge(maker(target, kwargs), args.device) for target in args.lion}
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [
        [name, *(f"{words[o[name][0]]}: {o[name][1]}" for o in found.values())] for name in CHECKS
    ]
    passed = [sum(ok is True for ok, _ in o.values()) for o in found.values()]
    asked = [sum(ok is not None for ok, _ in o.values()) for o in found.values()]
    rows.append(["passed", *(f"{p} of {a}" for p, a in zip(passed, asked, strict=True))])
    try:
        from tabulate import tabulate
    except ImportError:
        for row in [["", *found], *rows]:
            print("\t".join(row))
    else:
        print(tabulate(rows, headers=["", *found], disable_numparse=True, tablefmt="github"))
    return int(passed != asked)
