"""Room 1, encode, on every back end, against the oracle."""

import numpy as np
import pytest
import torch

import oracle
from common import (
    SIZES,
    STORAGE_DTYPES,
    array,
    bits_equal,
    exact,
    generator,
    no_counts,
    step_of,
    stored,
    words,
)
from lion_kernels import reference
from lion_kernels.layout import BallotLayout, pack_flags

SEED, RANK, STEP = 11, 3, 5


def garbage(layout):
    """A ballot buffer full of old bits: encode must write every word."""
    return torch.full((layout.shards, layout.chunk_words), -1, dtype=torch.int32)


def run(backend, grads, exp_avgs, planes, shards=1, betas=(0.5, 0.75), maximize=False, **amp):
    layout = BallotLayout(tuple(m.numel() for m in exp_avgs), planes, shards)
    chunks, counts = garbage(layout), no_counts()
    ballot = layout.planes_of(chunks)
    flags = layout.flags_of(chunks)
    backend.encode(
        grads, exp_avgs, ballot, flags, *betas, maximize, SEED, RANK, step_of(STEP), counts, **amp
    )
    present = pack_flags([g is not None for g in grads], layout.flag_words)
    assert flags.tolist() == [present] * shards
    flat = ballot.transpose(0, 1).reshape(planes, -1)  # word space, plane by plane
    return words(flat), counts.item()


def expected(grads, exp_avgs, planes, n_words, betas=(0.5, 0.75), maximize=False):
    """Planes of the oracle's votes, and its momenta, in word space."""
    v = np.zeros(n_words * 32, np.int64)
    first, momenta = 0, []
    for g, m in zip(grads, exp_avgs, strict=True):
        n = m.numel()
        c = np.zeros(n) if g is None else oracle.interpolate(array(m), array(g), betas[0], maximize)
        coins = oracle.coin(SEED, RANK, STEP, first, n)
        vote = oracle.votes(c, "binary" if planes == 1 else "ternary", coins)
        v[first : first + n] = (vote + 1) // 2 if planes == 1 else vote + 1
        new = None if g is None else oracle.interpolate(array(m), array(g), betas[1], maximize)
        momenta.append(array(m) if g is None else np.where(np.isfinite(c), new, array(m)))
        first += -(-n // 32) * 32
    return np.stack([oracle.pack((v >> b) & 1) for b in range(planes)]), momenta


def check_exact(backend, grads, exp_avgs, planes, **kwargs):
    shards = kwargs.pop("shards", 1)
    layout = BallotLayout(tuple(m.numel() for m in exp_avgs), planes, shards)
    want, momenta = expected(
        grads, exp_avgs, planes, layout.words_per_shard * layout.shards, **kwargs
    )
    got, counts = run(backend, grads, exp_avgs, planes, shards, **kwargs)
    np.testing.assert_array_equal(got, want)
    for m, new in zip(exp_avgs, momenta, strict=True):
        np.testing.assert_array_equal(array(m), stored(new, m.dtype))
    return counts


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("n", SIZES)
def test_bit_exact_on_exact_inputs(backend, n, planes):
    gen = generator(n)
    g, m = exact(n, gen), exact(n, gen)
    assert check_exact(backend, [g], [m], planes) == 0


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("m_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("g_dtype", STORAGE_DTYPES)
def test_dtypes(backend, g_dtype, m_dtype, planes):
    gen = generator(1)
    g, m = exact(1000, gen, g_dtype), exact(1000, gen, m_dtype)
    check_exact(backend, [g], [m], planes)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 17])
def test_lists_and_shards(backend, shards, planes):
    gen = generator(2)
    numels = (33, 0, 5000, 1, 32, 700)
    grads = [exact(n, gen, STORAGE_DTYPES[i % 3]) for i, n in enumerate(numels)]
    exp_avgs = [exact(n, gen) for n in numels]
    grads[2] = None
    check_exact(backend, grads, exp_avgs, planes, shards=shards)


@pytest.mark.parametrize("planes", [1, 2])
def test_whole_tiles_across_shards(backend, planes):
    """A tile of the GPU's that needs no mask, but whose words do not follow one another."""
    gen = generator(8)
    numels = (5, 20_000)
    grads, exp_avgs = ([exact(n, gen) for n in numels] for _ in range(2))
    check_exact(backend, grads, exp_avgs, planes, shards=3)


@pytest.mark.parametrize("planes", [1, 2])
def test_maximize(backend, planes):
    gen = generator(3)
    check_exact(backend, [exact(999, gen)], [exact(999, gen)], planes, maximize=True)


@pytest.mark.parametrize("planes", [1, 2])
def test_not_finite_abstains(backend, planes):
    gen = generator(4)
    g, m = exact(1000, gen), exact(1000, gen)
    g[3], g[500], g[999], m[31], m[600] = torch.nan, torch.inf, -torch.inf, torch.nan, -torch.inf
    assert check_exact(backend, [g], [m], planes) == 5
    assert torch.isnan(m[31])
    assert torch.isfinite(m[[3, 500, 999]]).all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_cautious_votes(backend, planes, maximize):
    """A vote that is not the gradient's sign is a zero vote; the momentum moves all the same."""
    gen = generator(9)
    g, m = exact(2000, gen), exact(2000, gen)
    c = oracle.interpolate(array(m), array(g), 0.5, maximize)
    agrees = np.sign(c) == np.sign(array(g)) * (-1 if maximize else 1)
    coins = oracle.coin(SEED, RANK, STEP, 0, 2000)
    vote = oracle.votes(np.where(agrees, c, 0), "binary" if planes == 1 else "ternary", coins)
    v = np.zeros(2048, np.int64)
    v[:2000] = (vote + 1) // 2 if planes == 1 else vote + 1
    new_m = oracle.interpolate(array(m), array(g), 0.75, maximize)
    got, _ = run(backend, [g], [m], planes, maximize=maximize, cautious=True)
    want = np.stack([oracle.pack((v >> b) & 1) for b in range(planes)])
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    np.testing.assert_array_equal(array(m), new_m)


def test_zero_votes_are_fair_coins_that_differ_by_rank_and_step(backend):
    layout = BallotLayout((64000,), 1, 1)
    tosses = []
    for rank, step in ((0, 0), (1, 0), (0, 1)):
        chunks = garbage(layout)
        zeros = torch.zeros(64000)
        backend.encode(
            [zeros], [zeros.clone()], layout.planes_of(chunks), layout.flags_of(chunks), 0.9, 0.99,
            False, 0, rank, step_of(step), no_counts(),
        )  # fmt: skip
        tosses.append(oracle.unpack(words(layout.planes_of(chunks)[0, 0]))[:64000])
    slack = 4 * 0.5 / 64000**0.5
    assert all(abs(toss.mean() - 0.5) < slack for toss in tosses)
    assert abs((tosses[0] == tosses[1]).mean() - 0.5) < slack
    assert abs((tosses[0] == tosses[2]).mean() - 0.5) < slack


@pytest.mark.parametrize("planes", [1, 2])
def test_grad_scale_and_found_inf(backend, planes):
    gen = generator(7)
    g, m = exact(1000, gen), exact(1000, gen)
    want, momenta = expected([g], [m], planes, BallotLayout((1000,), planes, 1).words_per_shard)
    amp = {"grad_scale": torch.tensor([2.0**16]), "found_inf": torch.zeros(1)}
    before = m.clone()
    got, _ = run(backend, [g * 2**16], [m], planes, **amp)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(array(m), momenta[0])
    layout = BallotLayout((1000,), planes, 1)
    chunks, counts = garbage(layout), no_counts()
    m.copy_(before)
    g[3] = torch.nan
    backend.encode(
        [g], [m], layout.planes_of(chunks), layout.flags_of(chunks), 0.5, 0.75, False, SEED, RANK,
        step_of(STEP), counts, torch.ones(1), torch.tensor(2.0),
    )  # fmt: skip
    assert bits_equal(m, before) and counts.item() == 0


def test_channels_last(backend):
    gen = generator(5)
    shape = (4, 6, 5, 3)
    g = exact(360, gen).view(shape).contiguous(memory_format=torch.channels_last)
    m = exact(360, gen).view(shape).contiguous(memory_format=torch.channels_last)
    flat_g, flat_m = g.permute(0, 2, 3, 1).flatten(), m.permute(0, 2, 3, 1).flatten().clone()
    got, _ = run(backend, [g], [m], 2)
    want, _ = run(reference, [flat_g], [flat_m], 2)
    np.testing.assert_array_equal(got, want)
    assert bits_equal(m.permute(0, 2, 3, 1).flatten(), flat_m)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_bounded_on_random_floats(backend, dtype):
    """Signs differ from float64 only where |c| is within a few ulp of zero."""
    gen = generator(6)
    g, m = torch.randn(100_000, generator=gen).to(dtype), torch.randn(100_000, generator=gen)
    c = oracle.interpolate(array(m), array(g), 0.9)
    scale = 0.9 * np.abs(array(m)) + 0.1 * np.abs(array(g))
    far = np.abs(c) > 4 * 2.0**-24 * scale
    got, _ = run(backend, [g], [m], 1, betas=(0.9, 0.99))
    sign = oracle.unpack(got[0])[:100_000]
    np.testing.assert_array_equal(sign[far], (c > 0)[far])
    assert far.mean() > 0.999
