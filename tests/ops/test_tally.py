"""Room 4, tally and elect, on every back end: bit-exact, every combination of votes for N <= 8."""

import itertools

import numpy as np
import pytest
import torch

import oracle
from common import generator, step_of, words
from lion_kernels import reference

SEED, STEP, FIRST_WORD = 9, 4, 1000
WORLDS = (1, 2, 3, 4, 5, 8, 16, 17, 64)


def every_combination(n, states):
    """Integers (n, states**n): each column one combination of n votes of 0 .. states - 1."""
    return torch.tensor(list(itertools.product(range(states), repeat=n))).T


def padded(integers, planes):
    """Ballots (n, planes, words) with words a multiple of 4."""
    n_words = -(-integers.shape[1] // 128) * 4
    ballots = torch.zeros(integers.shape[0], planes, n_words, dtype=torch.int32)
    packed = reference.pack(integers, planes)
    ballots[:, :, : packed.shape[2]] = packed
    return ballots


def unpacked(planes, n):
    """Planes (P, words) as integers, through numpy."""
    bits = np.stack([oracle.unpack(words(plane)) for plane in planes]).astype(np.int64)
    return (bits << np.arange(len(bits))[:, None]).sum(0)[:n]


def check(backend, integers, planes, per_ballot_scale):
    n_ballots, n = integers.shape
    scale = n_ballots * per_ballot_scale
    ballots = padded(integers, planes)
    total = integers.sum(0).numpy()

    tally = torch.full((scale.bit_length(), ballots.shape[2]), -1, dtype=torch.int32)
    backend.tally(ballots, tally, scale)
    np.testing.assert_array_equal(unpacked(tally, n), total)
    assert not unpacked(tally, tally.shape[1] * 32)[n:].any()

    for verdict_planes in (1, 2) if scale % 2 == 0 else (1,):
        verdict = torch.full((verdict_planes, ballots.shape[2]), -1, dtype=torch.int32)
        backend.elect(ballots, verdict, scale, FIRST_WORD, SEED, step_of(STEP))
        coins = oracle.coin(SEED, -1, STEP, FIRST_WORD * 32, n)
        if verdict_planes == 1:
            want = np.where(2 * total == scale, coins, 2 * total > scale)
        else:
            want = 1 + np.sign(2 * total - scale)
        np.testing.assert_array_equal(unpacked(verdict, n), want)


@pytest.mark.parametrize("n", range(1, 9))
def test_every_binary_combination(backend, n):
    check(backend, every_combination(n, 2), planes=1, per_ballot_scale=1)


@pytest.mark.parametrize("n", range(1, 9))
def test_every_ternary_combination(backend, n):
    check(backend, every_combination(n, 3), planes=2, per_ballot_scale=2)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("n", [*WORLDS, 1024])
def test_random_ballots(backend, n, planes):
    votes = torch.randint(0, planes + 1, (n, 3000), generator=generator(n))
    votes[:, :64] = planes  # unanimous: the largest sum
    votes[: n // 2, 64:128] = 0
    votes[n // 2 :, 64:128] = planes  # a tie where n is even
    check(backend, votes, planes, per_ballot_scale=planes)


@pytest.mark.parametrize("n_words", [4, 8, 12, 16, 20, 252, 256, 260, 508, 512, 516, 5000])
def test_tile_edges(backend, n_words):
    votes = torch.randint(0, 2, (9, n_words * 32), generator=generator(n_words))
    check(backend, votes, planes=1, per_ballot_scale=1)


def test_a_tally_of_tallies_is_a_tally(backend):
    """Two levels, as between nodes: 3 nodes of 5 ranks."""
    votes = torch.randint(0, 2, (15, 1000), generator=generator(1))
    ballots = padded(votes, 1)
    nodes = torch.empty(3, 3, ballots.shape[2], dtype=torch.int32)
    for node in range(3):
        backend.tally(ballots[5 * node : 5 * node + 5], nodes[node], 5)
    both, flat = (torch.empty(4, ballots.shape[2], dtype=torch.int32) for _ in range(2))
    backend.tally(nodes, both, 15)
    backend.tally(ballots, flat, 15)
    assert torch.equal(both, flat)
    verdicts = torch.empty(2, 1, ballots.shape[2], dtype=torch.int32)
    backend.elect(nodes, verdicts[0], 15, 0, 0, step_of(0))
    backend.elect(ballots, verdicts[1], 15, 0, 0, step_of(0))
    assert torch.equal(*verdicts)


def test_strided_chunks(backend):
    """Ballots as they lie in received chunks: planes, then flags that are no votes."""
    votes = torch.randint(0, 3, (6, 640), generator=generator(2))
    ballots = padded(votes, 2)
    chunks = torch.full((6, 2 * ballots.shape[2] + 4), -1, dtype=torch.int32)
    view = chunks[:, : 2 * ballots.shape[2]].unflatten(1, (2, ballots.shape[2]))
    view.copy_(ballots)
    tally = torch.empty(4, ballots.shape[2], dtype=torch.int32)
    backend.tally(view, tally, 12)
    np.testing.assert_array_equal(unpacked(tally, 640), votes.sum(0).numpy())


@pytest.mark.parametrize("n_words", [0, 1, 2, 3, 5, 7, 1023])
def test_words_that_fill_no_vector(backend, n_words):
    """Ballots of any length: the layout's padding is no condition of the kernels."""
    gen = generator(n_words)
    ballots = torch.randint(-(2**31), 2**31, (9, 1, n_words), generator=gen).to(torch.int32)
    tally = torch.full((4, n_words), -1, dtype=torch.int32)
    backend.tally(ballots, tally, 9)
    wanted = sum(oracle.unpack(words(b[0])).astype(np.int64) for b in ballots)
    np.testing.assert_array_equal(unpacked(tally, 32 * n_words), wanted)
    verdict = torch.full((1, n_words), -1, dtype=torch.int32)
    backend.elect(ballots, verdict, 9, 0, 0, step_of(0))
    np.testing.assert_array_equal(unpacked(verdict, 32 * n_words), wanted > 4)
