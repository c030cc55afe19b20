"""Room 3, apply, on every back end, against the oracle."""

import numpy as np
import pytest
import torch

import oracle
from common import SIZES, STORAGE_DTYPES, array, bits_equal, generator, lr_of, step_of, stored
from lion_kernels import reference
from lion_kernels.layout import BallotLayout, pack_flags

LR, WD = 3e-3, 0.7


def run(
    backend,
    params,
    integers,
    planes,
    scale,
    shards=1,
    present=None,
    lr=None,
    found_inf=None,
    ranks=3,
    **more,
):
    """Applies integers[t] of 0 .. scale, one vector a tensor."""
    layout = BallotLayout(tuple(p.numel() for p in params), planes, shards)
    flat = torch.zeros(shards * layout.words_per_shard * 32, dtype=torch.int64)
    first = 0
    for v in integers:
        flat[first : first + len(v)] = v
        first += -(-len(v) // 32) * 32
    verdict = reference.pack(flat.view(shards, -1), planes)
    flags = torch.zeros(ranks, layout.flag_words, dtype=torch.int32)
    flags[ranks // 2] = torch.tensor(pack_flags(present or [True] * len(params), layout.flag_words))
    step = step_of(7)
    lr = lr_of(LR) if lr is None else lr
    backend.apply(params, verdict, flags, scale, lr, WD, step, found_inf, **more)
    assert step.item() == (7 if found_inf is not None and found_inf.item() else 8)


def want(p, v, scale):
    total = 2 * v.numpy() - scale
    if scale <= 2:
        new = oracle.update(array(p), total / scale, LR, WD)
    else:
        new = oracle.average_update(array(p), total, scale, LR, WD)
    return stored(new, p.dtype)


@pytest.mark.parametrize(
    ("planes", "scale"), [(1, 1), (2, 2), (2, 3), (4, 8), (8, 128), (11, 1024)]
)
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


@pytest.mark.parametrize("shards", [1, 2, 3, 17])
def test_lists_shards_and_presence(backend, shards):
    gen = generator(shards)
    numels = (33, 0, 5000, 1, 32, 700)
    present = [True, True, False, True, False, True]
    params = [torch.randn(n, generator=gen).to(STORAGE_DTYPES[i % 3]) for i, n in enumerate(numels)]
    integers = [torch.randint(0, 3, (n,), generator=gen) for n in numels]
    expected = [
        want(p, v, 2) if here else array(p)
        for p, v, here in zip(params, integers, present, strict=True)
    ]
    run(backend, params, integers, 2, 2, shards, present)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


def test_a_tie_keeps_the_sign_of_a_zero(backend):
    p = torch.tensor([-0.0, 0.0] * 50)
    expected = p.clone()
    run(backend, [p], [torch.ones(100, dtype=torch.int64)], 2, 2)
    assert bits_equal(p, expected)


def test_whole_tiles_across_shards(backend):
    """A tile of the GPU's that needs no mask, but whose words do not follow one another."""
    gen = generator(6)
    params = [torch.randn(n, generator=gen) for n in (5, 20_000)]
    integers = [torch.randint(0, 3, (p.numel(),), generator=gen) for p in params]
    expected = [want(p, v, 2) for p, v in zip(params, integers, strict=True)]
    run(backend, params, integers, 2, 2, shards=3)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), e)


@pytest.mark.parametrize("lr", [lr_of(LR), lr_of(LR).view(1)])
def test_tensor_lr(backend, lr):
    p = torch.randn(100, generator=generator(1))
    v = torch.randint(0, 2, (100,), generator=generator(2))
    expected = want(p, v, 1)
    run(backend, [p], [v], 1, 1, lr=lr)
    np.testing.assert_array_equal(array(p), expected)


@pytest.mark.parametrize(("planes", "scale"), [(1, 1), (2, 2), (4, 8)])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_cautious_decay(backend, dtype, planes, scale):
    gen = generator(scale)
    p = torch.randn(2000, generator=gen).to(dtype)
    p[:100] = 0.0
    v = torch.randint(0, scale + 1, (2000,), generator=gen)
    total = 2 * v.numpy() - scale
    decayed = want(p, v, scale)
    kept = stored(oracle.average_update(array(p), total, scale, LR, 0.0), dtype)
    expected = np.where(total * array(p) < 0, kept, decayed)
    run(backend, [p], [v], planes, scale, cautious_decay=True)
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
