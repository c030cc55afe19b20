"""The forms of what ranks say to each other: whether a value that another rank sent, which JSON may
make anything, is what was asked for. Nothing else looks into a value before its form was tried.
"""

from collections.abc import Callable
from typing import Any

Form = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_integer(value: Any) -> bool:
    """Of 64 bits, with a sign or without; true and false are none."""
    return type(value) is int and -(2**63) <= value < 2**64


def below(end: int, first: int = 0) -> Form:
    """An integer of ``first`` to ``end - 1``."""
    return lambda value: type(value) is int and first <= value < end


def list_of(form: Form, length: int | None = None) -> Form:
    """A list of so many; None: of any number."""
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(map(form, value))
    )


def row_of(*forms: Form) -> Form:
    """A list with one of each."""
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(forms)
        and all(form(each) for form, each in zip(forms, value, strict=True))
    )


is_fact = list_of(is_text, 2)
is_facts = list_of(is_fact)


def is_report(value: Any) -> bool:
    """What agreement.Report.value() gives."""
    return (
        isinstance(value, dict)
        and is_text(value.get("does"))
        and (value.get("error") is None or is_fact(value["error"]))
        and is_facts(value.get("facts"))
    )


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    try:
        return repr(value)[:80]
    except RecursionError:
        return "what is nested too deeply"
