"""Buffers that end where their tensors end, at every alignment: the same bits, no byte beyond.

`make sanitize` runs this file with AddressSanitizer, which sees each byte read or written outside
of a block of malloc. Torch's allocator gives more than it was asked for.
"""

import ctypes
import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch

import backends
import lion_kernels
from common import (
    STORAGE_DTYPES,
    bits_equal,
    blank_bits,
    generator,
    lr_of,
    random_words,
    step_of,
    trailers_of,
)
from lion_kernels.int8 import blocks_of
from lion_kernels.layout import BallotLayout, words_of
from lion_kernels.ops import ROUNDINGS, low_dtype

SIZES = (1, 31, 33, 95, 127, 129, 513, 1025)  # around words, blocks of int8 and a chunk of them
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)


def test_the_library_under_test_is_the_sanitized_one():
    folder = os.environ.get("LION_KERNELS_SANITIZED")
    if folder is None:
        pytest.skip("not make sanitize")
    assert Path(folder).resolve() in Path(lion_kernels.__file__).resolve().parents


def tight(t, offset=0):
    """A copy of ``t`` at ``offset`` bytes of a block of malloc that ends where the copy ends."""
    if t.numel() == 0:
        return t.clone()
    block = libc.malloc(offset + t.nbytes)
    buffer = (ctypes.c_char * (offset + t.nbytes)).from_address(block)
    weakref.finalize(buffer, libc.free, block)
    copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    return copy.copy_(t)


@pytest.fixture(params=backends.SIMD_LEVELS)
def level(request):
    """The ops on each SIMD level."""
    ops, restore = backends.select(request.param)
    yield ops
    restore()


# Bytes: the alignment of malloc; of the type alone; of nothing (bytes of a file in memory).
@pytest.fixture(params=["aligned", "of the type", "of nothing"])
def place(request):
    """place(t): a tight copy of a tensor."""
    offset = {"aligned": lambda t: 0, "of the type": lambda t: t.element_size()}
    return lambda t: tight(t, offset.get(request.param, lambda t: 1)(t))


def placed(x, place):
    if isinstance(x, (list, tuple)):
        return [placed(each, place) for each in x]
    return place(x) if isinstance(x, torch.Tensor) else x


def compare(op, arguments, place, words=(), **more):
    """Calls the op with tensors of torch's and with tight ones, and compares the bits of all. The
    arguments named in ``words`` are planes, which are never but at their type's alignment."""
    here, there = ({}, {})
    for name, value in {**arguments, **more}.items():
        own = tight if name in words else place
        here[name] = placed(value, torch.clone)
        there[name] = placed(value, own)
    op(**here)
    op(**there)
    for name, value in here.items():
        both = (value, there[name]) if isinstance(value, list) else ([value], [there[name]])
        for a, b in zip(*both, strict=True):
            assert not isinstance(a, torch.Tensor) or bits_equal(a, b), name


def floats(sizes, dtype, gen):
    return [torch.randn(n, generator=gen).to(dtype) for n in sizes]


def momenta(sizes, dtype, gen):
    """Momenta, and their scales where they are int8."""
    if dtype != torch.int8:
        return floats(sizes, dtype, gen), None
    integers = [torch.randint(-128, 128, (n,), generator=gen).to(torch.int8) for n in sizes]
    return integers, [torch.rand(blocks_of(n), generator=gen) for n in sizes]


MOMENTUM_DTYPES = (*STORAGE_DTYPES, torch.int8)


@pytest.mark.parametrize("m_dtype", MOMENTUM_DTYPES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_step(level, place, dtype, m_dtype):
    gen = generator(1)
    p, g = floats(SIZES, dtype, gen), floats(SIZES, dtype, gen)
    m, block_scales = momenta(SIZES, m_dtype, gen)
    count = {"grads": g, "exp_avgs": m, "block_scales": block_scales}
    compare(
        level.count_agreeing, count, place, agreeing=torch.zeros(len(SIZES), dtype=torch.int64),
        beta1=0.9, maximize=True, words=("agreeing",),
    )  # fmt: skip
    rest = {"lr": lr_of(1e-3), "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "maximize": False}
    rest |= {"params": p, "step": step_of(3), **count}
    low = low_dtype(dtype)
    lows = [torch.zeros(n, dtype=low) if low else torch.zeros(0) for n in SIZES]
    skip = {"nonfinite": torch.zeros(1, dtype=torch.int64), "cautious": True}
    for more in ({}, skip):
        for rounding in ROUNDINGS:
            kept = {"lows": lows} if rounding == "compensated" else {}
            scalars = ("lr", "step", "nonfinite")
            compare(level.lion_step, rest, place, scalars, rounding=rounding, **kept, **more)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("m_dtype", MOMENTUM_DTYPES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_encode(level, place, dtype, m_dtype, planes):
    """First words of two octets that are left as they are."""
    gen = generator(2)
    g = floats(SIZES, dtype, gen)
    m, block_scales = momenta(SIZES, m_dtype, gen)
    g[2] = None  # abstains
    g[5][64:96], m[5][64:96] = 0.0, 0  # blank
    for shards in (1, 3):
        layout = BallotLayout((300, *SIZES), planes, shards)
        n_words = layout.words_per_shard
        trailer = random_words(layout.trailer_words, gen=gen)
        chunk = {
            "ballot": random_words(shards, planes, n_words, gen=gen),
            "blanks": random_words(shards, words_of(n_words), gen=gen) if planes == 1 else None,
            "trailers": random_words(shards, len(trailer), gen=gen),
            "trailer": trailer,
            "shared": torch.arange(3),
        }
        for cautious in (False, True):
            compare(
                level.encode,
                {"grads": g, "exp_avgs": m, "block_scales": block_scales, **chunk},
                place,
                (*chunk, "step", "nonfinite"),
                beta1=0.9, beta2=0.99, maximize=False, seed=5, rank=1, step=step_of(3),
                nonfinite=torch.zeros(1, dtype=torch.int64), cautious=cautious, first_word=16,
            )  # fmt: skip


@pytest.mark.parametrize("planes", [1, 2, 5])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_apply(level, place, dtype, planes):
    gen = generator(3)
    p = floats(SIZES, dtype, gen)
    low = low_dtype(dtype)
    lows = [torch.zeros(n, dtype=low) if low else torch.zeros(0) for n in SIZES]
    for shards in (1, 3):
        layout = BallotLayout((300, *SIZES), planes, shards)
        n_words = layout.words_per_shard
        words = {
            "verdict": random_words(shards, planes, n_words, gen=gen),
            "blanks": random_words(shards, words_of(n_words), gen=gen) if planes % 2 else None,
            "trailers": trailers_of([True, False, *[True] * (len(SIZES) - 1)]),  # all but the first
        }
        for rounding in ROUNDINGS:
            kept = {"lows": lows} if rounding == "compensated" else {}
            for cautious in (False, True):
                compare(
                    level.apply,
                    {"params": p, **words, **kept},
                    place,
                    (*words, "lr", "step"),
                    scale=(1 << planes) - 1, lr=lr_of(1e-3), weight_decay=0.1, step=step_of(3),
                    rounding=rounding, cautious_decay=cautious, first_word=16, first_flag=1,
                )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, planes", [(1, 1), (3, 1), (8, 2), (9, 2), (17, 1), (64, 2)])
def test_tally(level, n, planes, weighted):
    """Words at every alignment that int32 have, around the blocks and tiles of the kernels."""
    gen = generator(n)
    weights = torch.randint(1, 9, (n,), generator=gen).int() if weighted else None
    scale = ((1 << planes) - 1) * (int(weights.sum()) if weighted else n)
    rest = {"scale": scale, "first_word": 7, "seed": 5, "step": step_of(3), "weights": weights}
    for n_words in (1, 3, 15, 17, 1023, 1025, 2049):
        ballots = random_words(n, planes, n_words, gen=gen)
        blanks = [None]
        if planes == 1:
            is_blank = torch.randint(0, 2, (n, n_words), generator=gen).numpy()
            is_blank[:, : min(n_words, 1000)] = 0  # a strip that has none
            blanks.append(blank_bits(is_blank, words_of(n_words)))
        for of_ballots, offset in itertools.product(blanks, (0, 4, 8)):
            where = lambda t, offset=offset: tight(t, offset)  # noqa: E731
            for op, out, k in outputs(level, scale):
                says_zero = k == 2 if out == "verdict" else scale % 2 == 0
                needs_blanks = of_ballots is not None and not says_zero
                call = {
                    "ballots": ballots, "blanks": of_ballots,
                    out: torch.zeros(k, n_words, dtype=torch.int32),
                    "out_blanks": torch.zeros_like(of_ballots[:1]) if needs_blanks else None,
                }  # fmt: skip
                compare(op, call, where, ("step",), **rest)


def outputs(level, scale):
    """The counts of a scale, what they write, and its planes."""
    yield level.tally, "tally", scale.bit_length()
    yield level.elect, "verdict", 1
    if scale % 2 == 0:
        yield level.elect, "verdict", 2
