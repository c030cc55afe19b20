"""Buffers that end where their tensors end, at every alignment: the same bits, no byte beyond.

`make sanitize` runs this file with AddressSanitizer, which sees each byte read or written outside
of a block of malloc. Torch's allocator gives more than it was asked for.
"""

import ctypes
import os
import weakref
from pathlib import Path

import pytest
import torch

import backends
import lion_kernels
from common import STORAGE_DTYPES, bits_equal, generator, lr_of, step_of
from lion_kernels.int8 import blocks_of
from lion_kernels.layout import BallotLayout
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
    gen = generator(2)
    g = floats(SIZES, dtype, gen)
    m, block_scales = momenta(SIZES, m_dtype, gen)
    g[2] = None  # abstains
    for shards in (1, 3):
        layout = BallotLayout(SIZES, planes, shards)
        ballot = torch.zeros(shards, planes, layout.words_per_shard, dtype=torch.int32)
        flags = torch.zeros(shards, layout.flag_words, dtype=torch.int32)
        for cautious in (False, True):
            compare(
                level.encode,
                {
                    "grads": g, "exp_avgs": m, "block_scales": block_scales, "ballot": ballot,
                    "flags": flags,
                },
                place,
                ("ballot", "flags", "step", "nonfinite"),
                beta1=0.9, beta2=0.99, maximize=False, seed=5, rank=1, step=step_of(3),
                nonfinite=torch.zeros(1, dtype=torch.int64), cautious=cautious,
            )  # fmt: skip


@pytest.mark.parametrize("planes", [1, 2, 5])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_apply(level, place, dtype, planes):
    gen = generator(3)
    p = floats(SIZES, dtype, gen)
    low = low_dtype(dtype)
    lows = [torch.zeros(n, dtype=low) if low else torch.zeros(0) for n in SIZES]
    for shards in (1, 3):
        layout = BallotLayout(SIZES, planes, shards)
        bits = torch.randint(
            -(2**31), 2**31, (shards, planes, layout.words_per_shard), generator=gen
        )
        presence = torch.full((2, layout.flag_words), -2, dtype=torch.int32)  # all but the first
        for rounding in ROUNDINGS:
            kept = {"lows": lows} if rounding == "compensated" else {}
            for cautious in (False, True):
                compare(
                    level.apply,
                    {"params": p, "verdict": bits.to(torch.int32), "presence": presence, **kept},
                    place,
                    ("verdict", "presence", "lr", "step"),
                    scale=(1 << planes) - 1, lr=lr_of(1e-3), weight_decay=0.1, step=step_of(3),
                    rounding=rounding, cautious_decay=cautious,
                )  # fmt: skip


@pytest.mark.parametrize("n, planes", [(1, 1), (3, 1), (8, 2), (9, 2), (17, 1), (64, 2)])
def test_tally(level, n, planes):
    """Words at every alignment that int32 have, around the blocks and tiles of the kernels."""
    scale = n * ((1 << planes) - 1)
    for n_words in (1, 3, 15, 17, 1023, 1025, 2049):
        bits = torch.randint(-(2**31), 2**31, (n, planes, n_words), generator=generator(n))
        call = {"ballots": bits.to(torch.int32), "scale": scale}
        tally = torch.zeros(scale.bit_length(), n_words, dtype=torch.int32)
        coins = {"first_word": 7, "seed": 5, "step": step_of(3)}
        for offset in (0, 4, 8):
            where = lambda t, offset=offset: tight(t, offset)  # noqa: E731
            compare(level.tally, {**call, "tally": tally}, where)
            for k in (1, 2) if scale % 2 == 0 else (1,):
                compare(level.elect, {**call, "verdict": tally[:k]}, where, ("step",), **coins)
