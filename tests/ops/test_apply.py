"""Room 3, apply, on every back end, against the oracle."""

import numpy as np
import pytest
import torch

import oracle
from common import (
    SIZES,
    STORAGE_DTYPES,
    array,
    bits_equal,
    blank_bits,
    generator,
    lr_of,
    step_of,
    stored,
    trailers_of,
)
from lion_kernels import reference
from lion_kernels.layout import DIGEST, STATUS, BallotLayout, blank_words

# Of an integer of a verdict: its word is blank.
BLANK = -1
LR, WD, STEP = 3e-3, 0.7, 7
SCALES = [(1, 1), (2, 2), (2, 3), (4, 8), (8, 128), (11, 1024)]  # planes, scale


def verdict_of(integers, planes, shards=1, first_word=0, behind=0):
    """A verdict of integers[t] of 0 .. scale or BLANK, one vector a tensor, as planes and blank
    bits. Old bits lie before ``first_word``, in blank words and behind the tensors."""
    numels = [32 * first_word, *map(len, integers), behind]
    layout = BallotLayout(tuple(numels), planes, shards)
    n_words = layout.words_per_shard
    flat = torch.randint(0, 2**planes, (shards * n_words * 32,), generator=generator(3))
    is_blank = np.random.default_rng(4).integers(0, 2, shards * n_words)
    for v in integers:
        room = slice(first_word, first_word + oracle.room(len(v)) // 32)
        mine = flat[32 * room.start :][: len(v)]
        mine.copy_(torch.where(v == BLANK, mine, v))
        is_blank[room][: -(-len(v) // 32)] = (v[::32] == BLANK).numpy()
        first_word = room.stop
    verdict = reference.pack(flat.view(shards, -1), planes)
    return verdict, blank_bits(is_blank.reshape(shards, n_words), blank_words(n_words))


def run(
    backend, params, integers, planes, scale, *, shards=1, around=(0, 0), present=None, ranks=3,
    has_blanks=False, first_flag=0, lr=None, found_inf=None, **more,
):  # fmt: skip
    """Applies integers[t] of 0 .. scale, one vector a tensor."""
    first_word = oracle.room(around[0]) // 32
    verdict, blanks = verdict_of(integers, planes, shards, first_word, around[1])
    flags = [True] * first_flag + (present or [True] * len(params)) + [True]
    step = step_of(STEP)
    backend.apply(
        params, verdict, blanks if has_blanks else None, trailers_of(flags, ranks), scale,
        lr_of(LR) if lr is None else lr, WD, step, found_inf, first_word=first_word,
        first_flag=first_flag, **more,
    )  # fmt: skip
    assert step.item() == (STEP if found_inf is not None and found_inf.item() else STEP + 1)


def want(p, v, scale):
    total = np.where(v == BLANK, 0, 2 * v.numpy() - scale)
    if scale <= 2:
        new = oracle.update(array(p), total / scale, LR, WD)
    else:
        new = oracle.average_update(array(p), total, scale, LR, WD)
    return stored(new, p.dtype)


@pytest.mark.parametrize(("planes", "scale"), SCALES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_verdicts_of_every_kind(backend, dtype, planes, scale):
    gen = generator(scale)
    p = torch.randn(4000, generator=gen).to(dtype)
    v = torch.randint(0, scale + 1, (4000,), generator=gen)
    expected = want(p, v, scale)
    run(backend, [p], [v], planes, scale)
    np.testing.assert_array_equal(array(p), expected)


@pytest.mark.parametrize("n", SIZES)
def test_sizes(backend, n):
    gen = generator(n)
    room = torch.randn(n + 64, generator=gen)
    p = room[32 : 32 + n]
    before, v = room.clone(), torch.randint(0, 2, (n,), generator=gen)
    expected = want(p, v, 1)
    run(backend, [p], [v], 1, 1)
    np.testing.assert_array_equal(array(p), expected)
    assert bits_equal(room[:32], before[:32])
    assert bits_equal(room[32 + n :], before[32 + n :])


def with_blanks(v, gen):
    """The integers, a third of their words blank."""
    is_blank = torch.rand(len(v) // 32 + 1, generator=gen).repeat_interleave(32)[: len(v)] < 1 / 3
    return torch.where(is_blank, BLANK, v)


@pytest.mark.parametrize(("planes", "scale"), [(1, 1), (2, 3), (3, 5), (7, 127)])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_blank_words_do_not_move(backend, dtype, planes, scale):
    """But for the decay; whatever the planes say. A word of padding, in an octet, is not read."""
    gen = generator(scale)
    numels, room = (4000, 31, 300, 1), torch.randn(5000, generator=gen).to(dtype)
    params = list(room[:4332].split(numels))
    integers = [with_blanks(torch.randint(0, scale + 1, (n,), generator=gen), gen) for n in numels]
    integers[1][:] = BLANK
    expected = [want(p, v, scale) for p, v in zip(params, integers, strict=True)]
    run(backend, params, integers, planes, scale, has_blanks=True)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


@pytest.mark.parametrize("around", [(0, 0), (300, 1000)])
@pytest.mark.parametrize("has_blanks", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 17])
def test_lists_shards_and_presence(backend, shards, has_blanks, around):
    """The words and flags of others lie around."""
    gen = generator(shards)
    numels = (33, 0, 5000, 1, 32, 700)
    present = [True, True, False, True, False, True]
    params = [torch.randn(n, generator=gen).to(STORAGE_DTYPES[i % 3]) for i, n in enumerate(numels)]
    scale = 1 if has_blanks else 2
    integers = [torch.randint(0, scale + 1, (n,), generator=gen) for n in numels]
    if has_blanks:
        integers = [with_blanks(v, gen) for v in integers]
    expected = [
        want(p, v, scale) if here else array(p)
        for p, v, here in zip(params, integers, present, strict=True)
    ]
    run(
        backend, params, integers, scale, scale, shards=shards, around=around, present=present,
        has_blanks=has_blanks, first_flag=40 if around[0] else 0,
    )  # fmt: skip
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("place", [STATUS, DIGEST, DIGEST + 1])
def test_nothing_is_written_unless_all_are_ready_and_agree(backend, place, row):
    """Whichever rank has another status, or another digest in either word."""
    p, step = torch.randn(100, generator=generator(1)), step_of(STEP)
    before = p.clone()
    verdict, blanks = verdict_of([torch.ones(100, dtype=torch.int64)], 1)
    trailers = trailers_of([True])
    for value in (1, -1, 1 << 30, -(1 << 31)):
        trailers[row, place] ^= value
        backend.apply([p], verdict, blanks, trailers, 1, lr_of(LR), WD, step)
        trailers[row, place] ^= value
        assert bits_equal(p, before) and step.item() == STEP
    backend.apply([p], verdict, blanks, trailers, 1, lr_of(LR), WD, step)
    assert not bits_equal(p, before) and step.item() == STEP + 1


def test_one_rank_agrees_with_itself(backend):
    p = torch.randn(100, generator=generator(1))
    v = with_blanks(torch.ones(100, dtype=torch.int64), generator(2))
    expected = want(p, v, 1)
    run(backend, [p], [v], 1, 1, ranks=1, has_blanks=True)
    np.testing.assert_array_equal(array(p), expected)


def test_a_tie_keeps_the_sign_of_a_zero(backend):
    p = torch.tensor([-0.0, 0.0] * 50)
    expected = p.clone()
    run(backend, [p], [torch.ones(100, dtype=torch.int64)], 2, 2)
    assert bits_equal(p, expected)


@pytest.mark.parametrize("n", [20_000, 70_001])
def test_whole_tiles_across_shards(backend, n):
    """A tile of the GPU's that needs no mask, but whose words do not follow one another; and what
    two threads of the CPU share."""
    gen = generator(6)
    params = [torch.randn(size, generator=gen) for size in (5, n)]
    integers = [with_blanks(torch.randint(0, 2, (p.numel(),), generator=gen), gen) for p in params]
    expected = [want(p, v, 1) for p, v in zip(params, integers, strict=True)]
    run(backend, params, integers, 1, 1, shards=3, has_blanks=True)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


@pytest.mark.parametrize("lr", [lr_of(LR), lr_of(LR).view(1)])
def test_tensor_lr(backend, lr):
    p = torch.randn(100, generator=generator(1))
    v = torch.randint(0, 2, (100,), generator=generator(2))
    expected = want(p, v, 1)
    run(backend, [p], [v], 1, 1, lr=lr)
    np.testing.assert_array_equal(array(p), expected)


@pytest.mark.parametrize("has_blanks", [False, True])
@pytest.mark.parametrize(("planes", "scale"), [(1, 1), (2, 2), (2, 3), (4, 8)])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_cautious_decay(backend, dtype, planes, scale, has_blanks):
    """A blank word has no direction that decay could stand against."""
    gen = generator(scale)
    p = torch.randn(2000, generator=gen).to(dtype)
    p[:100] = 0.0
    v = torch.randint(0, scale + 1, (2000,), generator=gen)
    v = with_blanks(v, gen) if has_blanks else v
    total = np.where(v == BLANK, 0, 2 * v.numpy() - scale)
    decayed = want(p, v, scale)
    kept = stored(oracle.average_update(array(p), total, scale, LR, 0.0), dtype)
    expected = np.where(total * array(p) < 0, kept, decayed)
    run(backend, [p], [v], planes, scale, has_blanks=has_blanks, cautious_decay=True)
    np.testing.assert_array_equal(array(p), expected)


def test_found_inf_changes_nothing(backend):
    p = torch.randn(100, generator=generator(1))
    before, v = p.clone(), torch.randint(0, 2, (100,), generator=generator(2))
    run(backend, [p], [v], 1, 1, found_inf=torch.ones(1))
    assert bits_equal(p, before)
    expected = want(p, v, 1)
    run(backend, [p], [v], 1, 1, found_inf=torch.zeros(1))
    np.testing.assert_array_equal(array(p), expected)


@pytest.mark.parametrize("ranks", [3, 32, 33, 70])
def test_more_tensors_than_one_flag_word(backend, ranks):
    """And, from 33 on, more ranks than a program of the GPU's reads."""
    gen = generator(3)
    params = [torch.randn(3, generator=gen) for _ in range(70)]
    present = [i % 3 == 0 for i in range(70)]
    integers = [torch.randint(0, 2, (3,), generator=gen) for _ in range(70)]
    expected = [
        want(p, v, 1) if here else array(p)
        for p, v, here in zip(params, integers, present, strict=True)
    ]
    run(backend, params, integers, 1, 1, present=present, ranks=ranks)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


def test_transposed_parameter(backend):
    """Bits follow storage order, not logical order."""
    base = torch.randn(6, 50, generator=generator(4))
    p = base.clone().t()
    v = torch.randint(0, 2, (300,), generator=generator(5))
    expected = want(base.flatten(), v, 1)
    run(backend, [p], [v], 1, 1)
    np.testing.assert_array_equal(array(p.t().flatten()), expected)
