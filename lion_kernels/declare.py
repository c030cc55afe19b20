"""How an op is declared: to PyTorch by its schema and its fake, to callers as a function by
keyword; and what every op does around its kernels: version counters, negative views, the type of
what it raises. Knows no op.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from ._namespace import NAMESPACE

_P = ParamSpec("_P")
if hasattr(getattr(torch.ops, NAMESPACE), "lion_step"):
    raise ImportError(
        f"another lion_kernels has its ops in torch.ops.{NAMESPACE} already: two in one process "
        "need two namespaces, see _namespace.py"
    )
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
SCHEMAS: dict[str, str] = {}
CHECKS: dict[str, Callable[..., None]] = {}


# An op, and what raises the version counters of what it has written, so that a backward pass over a
# graph that saved the old values raises, as after a step of torch.optim. Dynamo traces torch's own
# function for that, and leaves it in its graph.
_CALL = """
def call({names}):
    try:
        packet({names})
    except RuntimeError as error:
        refusal = refusal_in(error)
        if refusal is None:
            raise
        raise ValueError(refusal) from None
    increment_version = traced_increment if is_tracing() else plain_increment
    {raised}
"""


def op(schema: str) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Declares an op of the name and with the arguments of the function below it, whose body is the
    check that every back end makes first, and all that the op does with fake tensors.

    What the name stands for afterwards is the op itself, called by keyword. torch.ops takes 0.2 us
    for each keyword of its own, a Python function in front of it 0.05 (AMD EPYC, lion_step of one
    tensor of 64 elements: 5.1 us without keywords, 8.1 with 16, 5.5 so; 2026-11-26)."""

    def declare(check: Callable[_P, None]) -> Callable[_P, None]:
        name, names = check.__name__, ", ".join(inspect.signature(check).parameters)
        SCHEMAS[name], CHECKS[name] = schema, check
        _library.define(name + schema)
        # The ops return nothing: a fake only has to refuse what the kernels refuse.
        torch.library.register_fake(f"{NAMESPACE}::{name}")(check)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        _library.impl(name, functools.partial(_resolve_negatives, packet), "Negative")
        scope: dict[str, Any] = {
            "packet": packet,
            "refusal_in": refusal_in,
            "traced_increment": torch.autograd.graph.increment_version,
            # Without its test of types, which takes 0.4 us.
            "plain_increment": torch._C._increment_version,
            "is_tracing": torch.compiler.is_dynamo_compiling,
        }
        raised = "\n    ".join(map(_raising, written_by(packet)))
        exec(_CALL.format(names=names, raised=raised), scope)
        call = scope["call"]
        call.__defaults__ = check.__defaults__
        return functools.wraps(check)(call)

    return declare


# What each compiled library refused last in this thread, or "": libraries put their function here.
REFUSALS: list[Callable[[], str]] = []


def refusal_in(error: RuntimeError) -> str | None:
    """The message of the ValueError that an op threw, of which torch 2.15 makes a RuntimeError with
    that message first; None where it is another error."""
    refusals = [refusal for take in REFUSALS if (refusal := take())]
    return next((r for r in refusals if str(error).startswith(r)), None)


def written_by(packet: Any) -> list[Any]:
    """The arguments in the schema of an op that it writes."""
    arguments = packet.default._schema.arguments
    return [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _raising(argument: Any) -> str:
    kind, name = str(argument.type), argument.name
    raising = f"increment_version({name if 'List' in kind else f'({name},)'})"
    return f"if {name} is not None: {raising}" if kind.startswith("Optional") else raising


def _resolve_negatives(packet: Any, *args: Any) -> None:
    """An op where any tensor is a negative view, whose storage holds other values."""
    CHECKS[packet.__name__](*args)
    written = {argument.name for argument in written_by(packet)}
    resolved = []
    for argument, value in zip(packet.default._schema.arguments, args, strict=False):
        tensors = value if isinstance(value, (list, tuple)) else [value]
        negative = [isinstance(t, Tensor) and t.is_neg() for t in tensors]
        if argument.name in written and any(negative):
            raise ValueError(f"{argument.name} is written, and must hold no negative view")
        tensors = [t.resolve_neg() if n else t for t, n in zip(tensors, negative, strict=True)]
        resolved.append(tensors if isinstance(value, (list, tuple)) else tensors[0])
    packet(*resolved)


def checked(computes: Callable[_P, None]) -> Callable[_P, None]:
    """A function with the name and the arguments of an op, behind that op's check."""
    check = CHECKS[computes.__name__]

    @functools.wraps(computes)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        check(*args, **kwargs)
        computes(*args, **kwargs)

    return call
