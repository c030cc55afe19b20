"""Room 4, tally and elect, on every back end, against the oracle: bit-exact, every combination of
votes and blank words of up to 6 ballots, and of votes of 8."""

import functools
import itertools

import numpy as np
import pytest
import torch

import oracle
from common import bits_equal, blank_bits, generator, int32, random_words, step_of, words

SEED, STEP, FIRST_WORD = 9, 4, 1000
WORLDS = (1, 2, 3, 4, 5, 8, 16, 17, 64)
COINS = {"first_word": FIRST_WORD, "seed": SEED}
WEIGHTS = (3, 1, 2, 5, 1, 4)


@functools.cache
def ties(n):
    return oracle.coin(SEED, -1, STEP, FIRST_WORD * 32, n)


def every_combination(n, states):
    """Columns (n, states**n): each one combination of n of the states."""
    return np.array(list(itertools.product(states, repeat=n))).T


def by_word(columns):
    """Each column a word, and its opposite in some of the word's elements: votes (n, elements), and
    which words (n, words) are blank."""
    flip = 2 * torch.randint(0, 2, (32 * columns.shape[1],), generator=generator(1)).numpy() - 1
    return np.repeat(columns, 32, 1) * flip, columns == 0


def random_votes(n, n_words, gen, blanks=1 / 3, where=slice(None)):
    """Binary votes, and blank words among the words of ``where``."""
    votes = 2 * torch.randint(0, 2, (n, 32 * n_words), generator=gen).numpy() - 1
    is_blank = np.zeros((n, n_words), bool)
    is_blank[:, where] = torch.rand(n, n_words, generator=gen)[:, where] < blanks
    return np.where(np.repeat(is_blank, 32, 1), 0, votes), is_blank


def packed(integers, planes):
    """int32 planes (n, planes, words) of integers (n, elements)."""
    rows = [[oracle.pack((row >> b) & 1) for b in range(planes)] for row in integers]
    return int32(np.array(rows))


def unpacked(planes, n):
    """Planes (P, words) as integers."""
    bits = np.stack([oracle.unpack(words(plane)) for plane in planes]).astype(np.int64)
    return (bits << np.arange(len(bits))[:, None]).sum(0)[:n]


def ballots_of(votes, planes, is_blank=None):
    """Ballots, with garbage in blank words; and their blank bits, with a word of padding."""
    ballots = packed((votes + 1) // 2 if planes == 1 else votes + 1, planes)
    if is_blank is None:
        return ballots, None
    old = random_words(*ballots.shape, gen=generator(2))
    ballots = torch.where(torch.from_numpy(is_blank).unsqueeze(1), old, ballots).contiguous()
    return ballots, blank_bits(is_blank, -(-is_blank.shape[1] // 32) + 1)


def count(backend, op, out_planes, ballots, scale, blanks, out_blanks, weights):
    """The op's planes; out_blanks: whether it writes them. Buffers are full of old bits."""
    out = random_words(out_planes, ballots.shape[2], gen=generator(3))
    of_out = random_words(1, blanks.shape[1], gen=generator(4)) if out_blanks else None
    weights = None if weights is None else torch.tensor(weights, dtype=torch.int32)
    getattr(backend, op)(
        ballots, out, scale, **COINS, step=step_of(STEP), blanks=blanks, out_blanks=of_out,
        weights=weights,
    )  # fmt: skip
    return out, of_out


def check(backend, votes, planes, is_blank=None, weights=None):
    """tally and elect of votes (n, elements) of -1, 0 and 1, of which binary ballots say 0 only in
    blank words; of a scale that fits them."""
    n = votes.shape[1]
    scale = planes * (len(votes) if weights is None else sum(weights))
    ballots, blanks = ballots_of(votes, planes, is_blank)
    total = np.dot([1] * len(votes) if weights is None else weights, votes)
    all_blank = np.zeros(n // 32, bool) if is_blank is None else is_blank.all(0)
    is_none = np.repeat(all_blank, 32)
    counts = [("tally", scale.bit_length()), ("elect", 1), ("elect", 2)]
    for op, out_planes in counts if scale % 2 == 0 else counts[:2]:
        says_zero = scale % 2 == 0 if op == "tally" else out_planes == 2
        has_blanks = blanks is not None and not says_zero
        out, out_blanks = count(
            backend, op, out_planes, ballots, scale, blanks, has_blanks, weights
        )
        if op == "tally" and planes == 1:
            v = (oracle.rounded(total, scale, is_none, ties(n)) + scale) // 2
        elif op == "tally":
            v = total + scale // 2
        else:
            direction = oracle.majority(total, says_zero, is_none, ties(n))
            v = direction + 1 if says_zero else (direction + 1) // 2
        if has_blanks:
            v = np.where(is_none, 0, v)
            if ballots.shape[2]:  # without words nothing is launched
                assert bits_equal(out_blanks, blank_bits(all_blank[None], blanks.shape[1]))
        np.testing.assert_array_equal(unpacked(out, n), v)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", range(1, 7))
def test_every_combination_with_blank_words(backend, n, weighted):
    """A blank bit is a word's: a word for each of the 3**n combinations."""
    votes, is_blank = by_word(every_combination(n, (-1, 0, 1)))
    check(backend, votes, 1, is_blank, WEIGHTS[:n] if weighted else None)


OTHER_WEIGHTS = [(1, 1), (2, 2), (1, 2), (7, 1, 1), (4, 4, 1), (100, 27, 300), (65533, 1, 1)]


@pytest.mark.parametrize("weights", OTHER_WEIGHTS)
def test_every_combination_of_other_weights(backend, weights):
    """Even and odd sums, weights that outvote the others together, and the largest scale."""
    votes, is_blank = by_word(every_combination(len(weights), (-1, 0, 1)))
    check(backend, votes, 1, is_blank, weights)


def padded(columns):
    """Columns (n, combinations), one an element, with zeros up to whole octets."""
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % 256)), constant_values=-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", range(1, 9))
def test_every_binary_combination(backend, n, weighted):
    weights = (*WEIGHTS, 1, 6)[:n] if weighted else None
    check(backend, padded(every_combination(n, (-1, 1))), 1, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", range(1, 9))
def test_every_ternary_combination(backend, n, weighted):
    weights = (*WEIGHTS, 1, 6)[:n] if weighted else None
    check(backend, padded(every_combination(n, (-1, 0, 1))), 2, weights=weights)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("n", [*WORLDS, 1024])
def test_random_ballots(backend, n, planes):
    votes = torch.randint(0, planes + 1, (n, 3072), generator=generator(n)).numpy()
    votes = votes - 1 if planes == 2 else 2 * votes - 1
    votes[:, :64] = 1  # unanimous: the largest sum
    votes[: n // 2, 64:128] = -1
    votes[n // 2 :, 64:128] = 1  # a tie where n is even
    check(backend, votes, planes)
    if n <= 64:
        weights = torch.randint(1, 200, (n,), generator=generator(n)).tolist()
        check(backend, votes, planes, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [*WORLDS, 33, 70])
def test_random_ballots_with_blank_words(backend, n, weighted):
    gen = generator(n)
    votes, is_blank = random_votes(n, 96, gen)
    votes[:, :256], is_blank[:, :8] = 0, True
    votes[1:, 256:512], is_blank[1:, 8:16] = 0, True  # all but one
    weights = torch.randint(1, 200, (n,), generator=gen).tolist() if weighted else None
    check(backend, votes, 1, is_blank, weights)


@pytest.mark.parametrize("n", [3, 8, 17, 70])
@pytest.mark.parametrize("n_words", [1016, 1024, 1032, 2056])
@pytest.mark.parametrize("where", [slice(0, 5), slice(1008, 1016), slice(-8, None), slice(0, 0)])
def test_blank_words_in_one_strip(backend, n, n_words, where):
    """The CPU counts 1024 words at a time, and those strips that have no blank word another way."""
    votes, is_blank = random_votes(n, n_words, generator(n_words), 0.9, where)
    check(backend, votes, 1, is_blank)


@pytest.mark.parametrize("n_words", [4, 8, 12, 16, 20, 252, 256, 260, 508, 512, 516, 5000])
def test_tile_edges(backend, n_words):
    votes, _ = random_votes(9, n_words, generator(n_words), 0)
    check(backend, votes, 1)


@pytest.mark.parametrize("n_words", [0, 1, 2, 3, 5, 7, 1023])
def test_words_that_fill_no_vector(backend, n_words):
    """Ballots of any length: the layout's padding is no condition of the kernels."""
    votes, is_blank = random_votes(9, n_words, generator(n_words))
    check(backend, np.where(votes == 0, 1, votes), 1)
    check(backend, votes, 1, is_blank)
    check(backend, votes, 1, is_blank, range(1, 10))


@pytest.mark.parametrize("n_words", [5, 1023])
def test_blank_bits_behind_the_words_are_not_read(backend, n_words):
    """What follows the words in a ballot's blank bits says nothing, and becomes 0."""
    votes, is_blank = random_votes(3, n_words, generator(5))
    ballots, blanks = ballots_of(votes, 1, is_blank)
    noise = blank_bits(np.arange(32 * blanks.shape[1])[None] >= n_words, blanks.shape[1])
    for op, planes in (("tally", 2), ("elect", 1)):
        want, got = (
            count(backend, op, planes, ballots, 3, each, True, None)
            for each in (blanks, blanks | noise)
        )
        assert bits_equal(want[0], got[0]) and bits_equal(want[1], got[1])


@pytest.mark.parametrize("planes", [1, 2])
def test_a_weight_counts_as_so_many_ballots(backend, planes):
    gen, weights = generator(6), (3, 1, 2, 1, 4)
    votes, is_blank = random_votes(5, 104, gen)
    votes[:, :320], is_blank[:, :10] = 0, True
    scale = planes * sum(weights)
    ballots, blanks = ballots_of(votes, planes, is_blank if planes == 1 else None)
    for op, out_planes in (("tally", scale.bit_length()), ("elect", 1)):
        has_blanks = planes == 1  # 11: odd
        weighted = count(backend, op, out_planes, ballots, scale, blanks, has_blanks, weights)
        repeated = [None if t is None else often(t, weights) for t in (ballots, blanks)]
        alike = count(backend, op, out_planes, repeated[0], scale, repeated[1], has_blanks, None)
        assert bits_equal(weighted[0], alike[0])
        assert not has_blanks or bits_equal(weighted[1], alike[1])


def often(t, weights):
    return t.repeat_interleave(torch.tensor(weights), 0)


@pytest.mark.parametrize("weights", [None, (2, 1, 3, 1, 1, 1)])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_in_place(backend, n, weights):
    """A tally or verdict may lie where the first planes of the first ballots did."""
    votes, is_blank = random_votes(n, 1032, generator(n))
    weights = None if weights is None else weights[:n]
    scale = n if weights is None else sum(weights)
    ballots, blanks = ballots_of(votes, 1, is_blank)
    counts = [("tally", scale.bit_length()), ("elect", 1), ("elect", 2)]
    for op, planes in counts if scale % 2 == 0 else counts[:2]:
        if planes > n:
            continue
        has_blanks = planes == 1 if op == "elect" else scale % 2 == 1
        want = count(backend, op, planes, ballots, scale, blanks, has_blanks, weights)
        mine, of_mine = ballots.clone(), blanks.clone()
        getattr(backend, op)(
            mine, mine[:planes, 0], scale, **COINS, step=step_of(STEP), blanks=of_mine,
            out_blanks=of_mine[:1] if has_blanks else None,
            weights=None if weights is None else torch.tensor(weights, dtype=torch.int32),
        )  # fmt: skip
        assert bits_equal(mine[:planes, 0], want[0]) and bits_equal(mine[planes:], ballots[planes:])
        assert not has_blanks or bits_equal(of_mine[:1], want[1])
        assert bits_equal(of_mine[1:], blanks[1:])


def test_a_tally_of_tallies_is_a_tally(backend):
    """Two levels, as between nodes: 3 nodes of 5 ranks."""
    votes, _ = random_votes(15, 32, generator(1), 0)
    ballots, _ = ballots_of(votes, 1)
    rest = {**COINS, "step": step_of(STEP)}
    nodes = torch.empty(3, 3, 32, dtype=torch.int32)
    for node in range(3):
        backend.tally(ballots[5 * node : 5 * node + 5], nodes[node], 5, **rest)
    both, flat = (torch.empty(4, 32, dtype=torch.int32) for _ in range(2))
    backend.tally(nodes, both, 15, **rest)
    backend.tally(ballots, flat, 15, **rest)
    assert torch.equal(both, flat)
    verdicts = torch.empty(2, 1, 32, dtype=torch.int32)
    backend.elect(nodes, verdicts[0], 15, **rest)
    backend.elect(ballots, verdicts[1], 15, **rest)
    assert torch.equal(*verdicts)


@pytest.mark.parametrize("planes", [1, 2])
def test_strided_chunks(backend, planes):
    """Ballots as they lie in received chunks: planes, blank bits, then trailers that are none."""
    votes, is_blank = random_votes(6, 24, generator(2))
    ballots, blanks = ballots_of(votes, planes, is_blank if planes == 1 else None)
    end = planes * 24
    chunks = random_words(6, end + 2 + 9, gen=generator(3))
    view = chunks[:, :end].unflatten(1, (planes, 24))
    view.copy_(ballots)
    of_view = None if blanks is None else chunks[:, end : end + 2].copy_(blanks)
    scale = 6 * planes
    for op, out in (("tally", scale.bit_length()), ("elect", 2), ("elect", 1)):
        has_blanks = planes == out == 1
        want = count(backend, op, out, ballots, scale, blanks, has_blanks, None)
        got = count(backend, op, out, view, scale, of_view, has_blanks, None)
        assert bits_equal(got[0], want[0]) and (not has_blanks or bits_equal(got[1], want[1]))
