"""The border to torch (csrc/stable): arguments arrive as they are and are given back, and what the
stable ABI lacks agrees with torch's own."""

import ctypes
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import lr_of, trailers_of
from lion_kernels import native, ops

OPTIONAL = {"grad_scale": torch.ones(1), "found_inf": torch.zeros(1)}


def ints(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def calls():
    """A call of each op with every argument that it can have, and its tensors."""
    p, g, m = (torch.ones(40).bfloat16() for _ in range(3))
    q, scale = ints(40, dtype=torch.int8), torch.ones(1)
    low, step, count = ints(40, dtype=torch.int16), ints(1, dtype=torch.int64), ints(1).long()
    lr, words, blanks, trailers = lr_of(0.1), ints(2, 1, 8), ints(2, 1), trailers_of([True])
    kept = {"rounding": "compensated", "lows": [low], "seed": 3}
    yield "lion_step", {
        "params": [p], "grads": [g], "exp_avgs": [q], "lr": lr, "beta1": 0.9, "beta2": 0.99,
        "weight_decay": 0.1, "maximize": False, "nonfinite": count, **OPTIONAL, **kept,
        "step": step, "cautious": True, "cautious_decay": True, "block_scales": [scale],
        "agreeing": count, "uniform": True,
    }  # fmt: skip
    yield "count_agreeing", {
        "grads": [g], "exp_avgs": [q], "agreeing": count, "beta1": 0.9, "maximize": False,
        "grad_scale": OPTIONAL["grad_scale"], "block_scales": [scale],
    }  # fmt: skip
    yield "encode", {
        "grads": [g, None], "exp_avgs": [q, m], "ballot": ints(1, 1, 24), "blanks": ints(1, 1),
        "beta1": 0.9, "beta2": 0.99, "maximize": False, "seed": 0, "rank": 0, "step": step,
        "nonfinite": count, **OPTIONAL, "cautious": True, "block_scales": [scale, scale],
        "first_word": 8, "trailers": ints(1, 8), "trailer": ints(8), "shared": ints(2).long(),
    }  # fmt: skip
    place = {"scale": 3, "first_word": 0, "seed": 0, "step": step}
    more = {"blanks": blanks, "out_blanks": ints(1, 1), "weights": torch.tensor([1, 2]).int()}
    yield "tally", {"ballots": words, "tally": ints(2, 8), **place, **more}
    yield "elect", {"ballots": words, "verdict": ints(1, 8), **place, **more}
    yield "apply", {
        "params": [p], "verdict": words, "blanks": blanks, "trailers": trailers, "scale": 1,
        "lr": lr, "weight_decay": 0.1, "step": step, "found_inf": OPTIONAL["found_inf"], **kept,
        "cautious_decay": True, "first_word": 8, "first_flag": 0,
    }  # fmt: skip


def tensors_of(arguments):
    lists = (value if isinstance(value, list) else [value] for value in arguments.values())
    return [t for values in lists for t in values if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_arguments_are_given_back(name, is_refused):
    """Also by a call that raises: a tensor that nothing holds any longer is gone."""
    arguments = dict(calls())[name]
    first = next(iter(arguments))
    if is_refused:
        arguments[first] = (
            [torch.ones(40).double()] if isinstance(arguments[first], list) else torch.ones(1)
        )
        with pytest.raises(ValueError):
            getattr(ops, name)(**arguments)
    else:
        getattr(ops, name)(**arguments)
    uses = [t._use_count() for t in tensors_of(arguments)]
    for _ in range(3):
        try:
            getattr(ops, name)(**arguments)
        except ValueError:
            assert is_refused
    assert [t._use_count() for t in tensors_of(arguments)] == uses
    t = arguments[first]
    gone = weakref.ref(t[0] if isinstance(t, list) else t)
    del arguments, t
    assert gone() is None


def bytes_in_use():
    """What malloc has given out and not got back; a GNU libc counts it."""
    kinds = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    sizes = [(kind, ctypes.c_size_t) for kind in (*kinds, "fordblks", "keepcost")]
    found = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is None:
        pytest.skip("this libc does not count what is allocated")
    found.restype = type("Mallinfo2", (ctypes.Structure,), {"_fields_": sizes})
    info = found()
    return info.uordblks + info.hblkhd


@pytest.mark.parametrize("rounding", ["compensated", "x" * 500_000])
def test_what_holds_arguments_is_given_back(rounding):
    """Lists, cells of optional values and strings: 20 calls that kept the smallest of them, 20,000
    pointers, would keep 3 MB. The second kind is refused."""
    n = 20_000
    p, low = torch.empty(0).bfloat16(), torch.empty(0, dtype=torch.int16)
    step, tensors = torch.zeros(1, dtype=torch.int64), {"lows": [low] * n, "step": None}

    def call():
        try:
            ops.lion_step(
                [p] * n, [p] * n, [p] * n, lr_of(0.1), 0.9, 0.99, 0.0, False, step, None, None,
                rounding, **tensors, block_scales=[OPTIONAL["found_inf"]] * n,
            )  # fmt: skip
        except ValueError:
            assert rounding != "compensated"

    for _ in range(3):
        call()
    before = bytes_in_use()
    for _ in range(20):
        call()
    assert bytes_in_use() - before < 1_000_000


def run(program):
    """In a process of its own: what fails may crash it, or keep it waiting."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_an_op_of_other_arguments_is_refused():
    """Before any is taken, which would crash."""
    done = run("""
import torch
from lion_kernels import native
others = torch.library.Library("other_ops", "FRAGMENT")
others.define("tally(Tensor ballots) -> ()")
native._C.register_ops("other_ops")
try:
    torch.ops.other_ops.tally(torch.zeros(1, 1, 8, dtype=torch.int32))
except RuntimeError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "was built for an op of 9 arguments, got 1: build it again" in done.stdout


def test_what_torch_refuses_is_said():
    p, g, m = (torch.ones(5) for _ in range(3))
    torch._C._set_throw_on_mutable_data_ptr(p)
    with pytest.raises(RuntimeError, match="torch refused data of a tensor") as raised:
        ops.lion_step([p], [g], [m], lr_of(0.1), 0.9, 0.99, 0.0, False)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # which says why
        assert "Cannot access data pointer" in str(raised.value)


@st.composite
def strided(draw):
    dims = draw(st.integers(0, 4))
    sizes = draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims))
    if draw(st.booleans()):  # a permutation, perhaps with gaps
        order, strides, reach = draw(st.permutations(range(dims))), [0] * dims, 1
        for d in order:
            strides[d] = reach
            reach *= max(sizes[d], 1) + draw(st.integers(0, 5)) // 5
    else:
        strides = draw(st.lists(st.integers(0, 12), min_size=dims, max_size=dims))
    return sizes, strides


@settings(max_examples=300, deadline=None)
@given(strided())
def test_dense_is_what_torch_calls_so(layout):
    sizes, strides = layout
    reach = 1 + sum(max(n - 1, 0) * s for n, s in zip(sizes, strides, strict=True))
    p = torch.zeros(reach).as_strided(sizes, strides)
    arguments = ([p], [p.clone()], [torch.zeros_like(p)], lr_of(0.1), 0.9, 0.99, 0.0, False)
    if torch.ops.aten.is_non_overlapping_and_dense(p):
        m = torch.zeros(reach).as_strided(sizes, strides)
        ops.lion_step([p], [m.clone()], [m], *arguments[3:])
    else:
        with pytest.raises(ValueError, match=r"params\[0\] must be dense"):
            ops.lion_step(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.float32])
def test_a_rate_of_any_dtype(dtype):
    p, q = torch.zeros(3), torch.zeros(3)
    for t, lr in ((p, torch.tensor(2, dtype=dtype)), (q, lr_of(2.0))):
        ops.lion_step([t], [torch.ones(3)], [torch.zeros(3)], lr, 0.9, 0.99, 0.0, False)
    assert torch.equal(p, q) and p[0] == -2.0


def test_threads():
    """Ops end under Python's lock, which other threads want at the same time."""
    tensors = [[torch.zeros(70) for _ in range(50)] for _ in range(12)]
    grads = [torch.ones(70) for _ in range(50)]

    def work(params, momenta):
        for _ in range(40):
            ops.lion_step(params, grads, momenta, lr_of(1.0), 0.9, 0.99, 0.0, False)

    threads = [threading.Thread(target=work, args=tensors[i : i + 2]) for i in range(0, 12, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moved = [p for params in tensors[::2] for p in params]
    assert all(torch.equal(p, torch.full((70,), -40.0)) for p in moved)


def test_identity_knows_what_tells_tensors_apart():
    t = torch.zeros(4, 6)
    numbers = native.identity([t], [])[1]
    others = [
        t.T, t[:2], t.view(24), t.view(torch.int32), torch.zeros(4, 6), t.view(6, 4),
        t.as_strided((4, 6), (1, 4)),
    ]  # fmt: skip
    assert native.identity([t.detach()], [])[1] == numbers
    assert all(native.identity([other], [])[1] != numbers for other in others)
    assert native.identity([None], [])[1] != numbers


def test_identity_of_gradients_knows_their_addresses_apart():
    base = torch.zeros(64)
    places = [base[:4], base[16:20], base[1:5]]
    (first, a), (second, b), (third, c) = (native.identity([], [g]) for g in places)
    assert first != second and a == b  # elsewhere, as well aligned
    assert third != first and c != a
    assert native.identity([], [None])[0] == bytes(8)


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to("meta")])
def test_a_tensor_without_data_has_no_identity(make):
    with pytest.raises(RuntimeError):
        native.identity([make(torch.eye(3))], [])


def test_odd_gradients():
    p, q = torch.zeros(4, 6), torch.zeros(5)
    known = native.identity([p, q], [])[1]

    def odd(*grads):
        return native.odd_gradients(known, [p, q], grads)

    plain = torch.ones(4, 6), torch.ones(5)
    assert odd(*plain) == [] and odd(None, None) == []
    assert odd(torch.ones(6, 4).T, None) == [0]
    for strange in (torch.ones(4), torch.ones(4, 6).double(), torch.ones(24)):
        assert odd(strange, plain[1]) == [-1]
    base = torch.zeros(8)  # at one address, and the last stride alone is another
    assert native.odd_gradients(native.identity([base[:4]], [])[1], [base[::2]], []) == [-1]
    p.data = torch.zeros(4, 6)
    assert odd(*plain) == [-1]
    assert native.odd_gradients(known[:-8], [q], []) == [-1]
    with pytest.raises(TypeError):
        native.odd_gradients(known, 3, [])


def test_two_threads_may_ask_first():
    """Asking for torch runs Python, which lets the other thread run: it must not wait for the first
    with Python's lock in its hands."""
    done = run("""
import builtins, threading, time
import torch
from lion_kernels import native
plain, asking = builtins.__import__, threading.Event()

def slow(name, *args, **kwargs):
    if name == "torch":
        asking.set()
        time.sleep(0.5)
    return plain(name, *args, **kwargs)

def ask():
    found.append(native.identity(tensors, []))

found, tensors = [], [torch.zeros(3)]
builtins.__import__ = slow
threads = [threading.Thread(target=ask) for _ in range(2)]
threads[0].start()
assert asking.wait(10)
threads[1].start()
for thread in threads:
    thread.join()
assert found[0] == found[1]
""")
    assert done.returncode == 0, done.stderr
