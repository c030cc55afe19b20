"""Room 1, encode, on every back end, against the oracle: all bits of a chunk, also those that it
must leave as they were."""

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
    exact,
    generator,
    int32,
    no_counts,
    random_words,
    step_of,
    stored,
    words,
)
from lion_kernels.layout import BallotLayout

SEED, RANK, STEP = 11, 3, 5


def inputs(n, gen, g_dtype=torch.float32, m_dtype=torch.float32):
    """Exact gradients and momenta. In a third of the words all votes are zero, in others some."""
    g, m = exact(n, gen, g_dtype), exact(n, gen, m_dtype)
    is_zero = torch.rand(n // 32 + 1, generator=gen).repeat_interleave(32)[:n] < 1 / 3
    is_zero |= torch.rand(n, generator=gen) < 0.1
    g[is_zero], m[is_zero] = 0, 0
    return g, m


def garbage(layout):
    """Chunks of old bits."""
    return random_words(layout.shards, layout.chunk_words, gen=generator(77))


def run(backend, layout, chunks, grads, exp_avgs, **how):
    """Encodes into chunks; returns how many elements are not finite."""
    counts = no_counts()
    how = {"beta1": 0.5, "beta2": 0.75, "maximize": False, "rank": RANK, "step": STEP, **how}
    backend.encode(
        grads, exp_avgs, layout.planes_of(chunks), layout.blanks_of(chunks),
        **{**how, "step": step_of(how["step"])}, seed=SEED, nonfinite=counts,
    )  # fmt: skip
    return counts.item()


def expected(
    chunks, layout, grads, exp_avgs, *, first_word=0, beta1=0.5, beta2=0.75, maximize=False,
    cautious=False,
):  # fmt: skip
    """``chunks`` with the oracle's votes in their place, and its momenta."""
    n_planes, shards, kind = layout.planes, layout.shards, ("binary", "ternary")[layout.planes - 1]
    # Word space, plane by plane, and a blank bit a word.
    planes = words(layout.planes_of(chunks).transpose(0, 1)).reshape(n_planes, -1)
    blanks = layout.blanks_of(chunks)
    blank = np.zeros((shards, layout.words_per_shard)) if blanks is None else unpacked(blanks)
    n_words = layout.words_per_shard
    is_blank, momenta = blank[:, :n_words].flatten(), []
    for g, m in zip(grads, exp_avgs, strict=True):
        n, new = m.numel(), array(m)
        c = np.zeros(n) if g is None else oracle.interpolate(array(m), array(g), beta1, maximize)
        if g is not None:
            moved = oracle.interpolate(array(m), array(g), beta2, maximize)
            new = np.where(np.isfinite(c), moved, array(m))
        if cautious:
            c = np.where(np.sign(c) == np.sign(array(g)) * (-1 if maximize else 1), c, 0)
        coins = oracle.zero_coin(SEED, RANK, STEP, 32 * first_word, n)
        vote, v = oracle.votes(c, kind, coins), np.zeros(oracle.room(n), np.int64)
        v[:n] = (vote + 1) // 2 if n_planes == 1 else vote + 1
        place = slice(first_word, first_word + len(v) // 32)
        for b in range(n_planes):
            planes[b, place] = oracle.pack((v >> b) & 1)
        is_blank[place] = 0
        is_blank[first_word : first_word - (-n // 32)] = oracle.blank(vote)[::32]
        momenta.append(new)
        first_word = place.stop
    out = chunks.clone()
    by_shard = int32(planes).view(n_planes, shards, n_words).transpose(0, 1)
    layout.planes_of(out).copy_(by_shard)
    if blanks is not None:
        blank[:, :n_words] = is_blank.reshape(shards, n_words)
        layout.blanks_of(out).copy_(blank_bits(blank, layout.blank_words))
    return out, momenta


def unpacked(blanks):
    return np.stack([oracle.unpack(row) for row in words(blanks)])


def check(backend, grads, exp_avgs, planes, shards=1, around=(0, 0), **how):
    """``around``: elements of word space before the tensors and behind them."""
    numels = tuple(m.numel() for m in exp_avgs)
    layout = BallotLayout((around[0], *numels, around[1]), planes, shards)
    chunks, how["first_word"] = garbage(layout), oracle.room(around[0]) // 32
    want, momenta = expected(chunks, layout, grads, exp_avgs, **how)
    counts = run(backend, layout, chunks, grads, exp_avgs, **how)
    np.testing.assert_array_equal(words(chunks), words(want))
    for m, new in zip(exp_avgs, momenta, strict=True):
        np.testing.assert_array_equal(array(m), stored(new, m.dtype))
    return counts


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("n", SIZES)
def test_bit_exact_on_exact_inputs(backend, n, planes):
    g, m = inputs(n, generator(n))
    assert check(backend, [g], [m], planes) == 0


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("m_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("g_dtype", STORAGE_DTYPES)
def test_dtypes(backend, g_dtype, m_dtype, planes):
    g, m = inputs(1000, generator(1), g_dtype, m_dtype)
    check(backend, [g], [m], planes)


@pytest.mark.parametrize("around", [(0, 0), (300, 1000)])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 17])
def test_lists_and_shards(backend, shards, planes, around):
    """Shards cut tensors, and words of others lie around: an octet shares its byte with none."""
    gen = generator(2)
    numels = (33, 0, 5000, 1, 32, 3000, 700)
    pairs = [inputs(n, gen, STORAGE_DTYPES[i % 3]) for i, n in enumerate(numels)]
    grads, exp_avgs = map(list, zip(*pairs, strict=True))
    grads[4] = grads[5] = None
    check(backend, grads, exp_avgs, planes, shards, around)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("n", [20_000, 70_001])
def test_whole_tiles_across_shards(backend, n, planes):
    """A tile of the GPU's that needs no mask, but whose words do not follow one another; and what
    two threads of the CPU share."""
    gen = generator(8)
    pairs = [inputs(size, gen) for size in (5, n)]
    check(backend, *map(list, zip(*pairs, strict=True)), planes, shards=3)


def test_words_of_every_kind(backend):
    """By hand. Word 0: all votes are zero, though the momentum moves; 1: one is not; 2: none is;
    3, the tensor's tail: all zero. The rest of the octet is padding."""
    g = torch.ones(100)
    m = -g
    g[40], m[40] = 3.0, 1.0
    g[64:96], m[64:96] = -2.0, 0.0
    layout = BallotLayout((100, 500), 1, 1)
    chunks = garbage(layout)
    before = chunks.clone()
    run(backend, layout, chunks, [g], [m])
    got, old = (layout.planes_of(each).flatten() for each in (chunks, before))
    coins = oracle.zero_coin(SEED, RANK, STEP, 32, 32)
    coins[8] = 1
    assert got[:8].tolist() == [0, int32(oracle.pack(coins)).item(), 0, 0, 0, 0, 0, 0]
    assert torch.equal(got[8:], old[8:])
    blanks, old_blanks = (layout.blanks_of(each).flatten() for each in (chunks, before))
    assert blanks[0].item() & 0xFF == 0b1001
    assert torch.equal(blanks >> 8, old_blanks >> 8) and torch.equal(blanks[1:], old_blanks[1:])
    assert (m[:32] == -0.5).all() and torch.equal(layout.trailers_of(chunks), before[:, -8:])


def test_without_a_gradient_every_word_is_blank(backend):
    layout = BallotLayout((70, 0, 300), 1, 1)
    chunks = garbage(layout)
    momenta = [torch.ones(n) for n in layout.numels]
    run(backend, layout, chunks, [None] * 3, momenta)
    assert not layout.planes_of(chunks)[0, 0, :24].any()
    assert unpacked(layout.blanks_of(chunks))[0, :24].tolist() == [1] * 3 + [0] * 5 + [1] * 10 + (
        [0] * 6
    )
    assert all((m == 1).all() for m in momenta)
    layout = BallotLayout((70, 0, 300), 2, 1)
    chunks = garbage(layout)
    run(backend, layout, chunks, [None] * 3, momenta)
    assert not layout.planes_of(chunks)[0, 1, :24].any()  # ones: zero votes
    assert oracle.unpack(words(layout.planes_of(chunks)[0, 0]))[:768].sum() == 370


@pytest.mark.parametrize("planes", [1, 2])
def test_maximize(backend, planes):
    g, m = inputs(999, generator(3))
    check(backend, [g], [m], planes, maximize=True)


@pytest.mark.parametrize("planes", [1, 2])
def test_not_finite_abstains(backend, planes):
    """A word where nothing is finite is blank."""
    g, m = inputs(1000, generator(4))
    g[3], g[500], g[999], m[31], m[600] = torch.nan, torch.inf, -torch.inf, torch.nan, -torch.inf
    g[64:96] = torch.nan
    g[128:160], m[128:160] = 0.0, 0.0
    g[130] = torch.inf
    assert check(backend, [g], [m], planes) == 38
    assert torch.isnan(m[31])
    assert torch.isfinite(m[[3, 64, 130, 500, 999]]).all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_cautious_votes(backend, planes, maximize):
    """A vote that is not the gradient's sign is a zero vote; the momentum moves all the same. A
    word where none is, is blank."""
    g, m = inputs(2000, generator(9))
    g[320:352] = -1.0 if maximize else 1.0
    m[320:352] = -50.0
    check(backend, [g], [m], planes, maximize=maximize, cautious=True)


def tosses(backend, rank, step, n_words=2000):
    """The coins of words where one element alone votes."""
    layout, g = BallotLayout((32 * n_words,), 1, 1), torch.zeros(32 * n_words)
    g[::32] = 1.0
    chunks = garbage(layout)
    run(backend, layout, chunks, [g], [torch.zeros_like(g)], rank=rank, step=step)
    bits = oracle.unpack(words(layout.planes_of(chunks)))[: len(g)].reshape(n_words, 32)
    assert bits[:, 0].all()
    return bits[:, 1:]


def test_zero_votes_are_fair_coins_that_cancel(backend):
    """Those of two steps, and of a rank and the next one, are each other's opposites."""
    first = tosses(backend, rank=0, step=4)
    for rank, step in ((1, 4), (0, 5), (3, 4), (2, 5)):
        np.testing.assert_array_equal(tosses(backend, rank, step), 1 - first)
    for rank, step in ((1, 5), (2, 4)):
        np.testing.assert_array_equal(tosses(backend, rank, step), first)
    slack = 4 * 0.5 / first.size**0.5
    assert abs(first.mean() - 0.5) < slack
    assert abs(first.mean(0) - 0.5).max() < 5 * 0.5 / len(first) ** 0.5
    for step in (3, 6, 7):  # of other pairs of steps
        assert abs((tosses(backend, 0, step) == first).mean() - 0.5) < slack


@pytest.mark.parametrize("planes", [1, 2])
def test_grad_scale_and_found_inf(backend, planes):
    g, m = inputs(1000, generator(7))
    layout, before = BallotLayout((1000,), planes, 1), m.clone()
    chunks = garbage(layout)
    want, momenta = expected(chunks, layout, [g], [m])
    amp = {"grad_scale": torch.tensor([2.0**16]), "found_inf": torch.zeros(1)}
    run(backend, layout, chunks, [g * 2**16], [m], **amp)
    np.testing.assert_array_equal(words(chunks), words(want))
    np.testing.assert_array_equal(array(m), momenta[0])
    m.copy_(before)
    g[3] = torch.nan
    amp = {"grad_scale": torch.ones(1), "found_inf": torch.tensor(2.0)}
    assert run(backend, layout, chunks, [g], [m], **amp) == 0
    assert bits_equal(m, before) and bits_equal(chunks, want)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("shared", [[], [7], [0, -1, 2**62, -(2**63), 5]])
@pytest.mark.parametrize("shards", [1, 3])
def test_trailers(backend, shards, shared, found_inf):
    """Every chunk ends with the trailer, whose digest takes up what is shared: also in a step that
    is not taken, where nothing else is written."""
    g, m = inputs(1000, generator(7))
    layout = BallotLayout((1000,), 1, shards)
    chunks, trailer = garbage(layout), random_words(layout.trailer_words, gen=generator(5))
    want, momenta = expected(chunks, layout, [g], [m])
    if found_inf:
        want, momenta = chunks.clone(), [array(m)]
    low, high = (int(word) for word in words(trailer)[-2:])
    digest = oracle.sealed(low | high << 32, shared)
    sealed = trailer.clone()
    sealed[-2:] = int32(np.array([digest & 0xFFFFFFFF, digest >> 32], np.uint32))
    layout.trailers_of(want).copy_(sealed)
    given, kept = torch.tensor(shared, dtype=torch.int64), trailer.clone()
    run(
        backend, layout, chunks, [g], [m], trailers=layout.trailers_of(chunks), trailer=trailer,
        shared=given, found_inf=None if found_inf is None else torch.tensor([found_inf]),
    )  # fmt: skip
    np.testing.assert_array_equal(words(chunks), words(want))
    np.testing.assert_array_equal(array(m), momenta[0])
    assert torch.equal(trailer, kept) and given.tolist() == shared


@pytest.mark.parametrize("planes", [1, 2])
def test_channels_last(backend, planes):
    gen, shape = generator(5), (4, 6, 5, 3)
    g, m = (t.view(shape).to(memory_format=torch.channels_last) for t in inputs(360, gen))
    flat_g, flat_m = g.permute(0, 2, 3, 1).flatten(), m.permute(0, 2, 3, 1).flatten()
    layout = BallotLayout((360,), planes, 1)
    chunks = garbage(layout)
    want, momenta = expected(chunks, layout, [flat_g], [flat_m])
    run(backend, layout, chunks, [g], [m])
    np.testing.assert_array_equal(words(chunks), words(want))
    np.testing.assert_array_equal(array(m.permute(0, 2, 3, 1).flatten()), momenta[0])


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_bounded_on_random_floats(backend, dtype):
    """Signs differ from float64 only where |c| is within a few ulp of zero."""
    gen = generator(6)
    g, m = torch.randn(100_000, generator=gen).to(dtype), torch.randn(100_000, generator=gen)
    c = oracle.interpolate(array(m), array(g), 0.9)
    scale = 0.9 * np.abs(array(m)) + 0.1 * np.abs(array(g))
    far = np.abs(c) > 4 * 2.0**-24 * scale
    layout = BallotLayout((100_000,), 1, 1)
    chunks = garbage(layout)
    run(backend, layout, chunks, [g], [m], beta1=0.9, beta2=0.99)
    sign = oracle.unpack(words(layout.planes_of(chunks)))[:100_000]
    np.testing.assert_array_equal(sign[far], (c > 0)[far])
    assert far.mean() > 0.999
