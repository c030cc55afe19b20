"""What zero votes do to users' weights: padding rows, unused rows, masked and pruned weights."""

import numpy as np
import pytest
import torch

from common import Workers, generator

HYPER = {"lr": 2.0**-6, "betas": (0.5, 0.75)}
STEPS = 20


def embedding_gradients(n, step, rows, width, tokens):
    """Of each rank, the gradient of an embedding whose rank saw these tokens."""
    gen = generator(step)
    found = []
    for rank in range(n):
        g = torch.zeros(rows, width)
        seen = tokens(rank)
        g[seen] = torch.randn(len(seen), width, generator=gen)
        found.append([g])
    return found


@pytest.mark.parametrize("ties", ["zero", "coin"])
@pytest.mark.parametrize("aggregation", ["majority", "average"])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_rows_of_whole_words_stay_for_any_number_of_ranks(n, aggregation, ties):
    """A padding row (0), and rows of tokens that nobody saw (5 and up), 64 wide."""
    start = torch.randn(8, 64, generator=generator(1))
    world = Workers([start], n, **HYPER, aggregation=aggregation, ties=ties)
    for step in range(STEPS):
        world.step(embedding_gradients(n, step, 8, 64, lambda rank: [1, 2, 3, 4]))
    p = world.params[0][0]
    assert torch.equal(p[0], start[0]) and torch.equal(p[5:], start[5:])
    assert (p[1:5] != start[1:5]).any(1).all()


@pytest.mark.parametrize("aggregation", ["majority", "average"])
def test_a_row_that_one_of_eight_ranks_saw_follows_that_rank(aggregation):
    world = Workers([torch.zeros(4, 64)], 8, lr=1.0, betas=(0.0, 0.0), aggregation=aggregation)
    g = torch.randn(64, generator=generator(2))
    grads = [[torch.zeros(4, 64)] for _ in range(8)]
    grads[5][0][2] = g
    world.step(grads)
    p, delta = world.params[0][0], -g.sign()
    assert not p[[0, 1, 3]].any()
    if aggregation == "majority":
        assert torch.equal(p[2], delta)
    else:  # one vote of eight, an eighth: seven that abstain leave a half, which is a coin's
        assert set((p[2] * delta).tolist()) <= {0.0, 0.25} and (p[2] != 0).float().mean() > 0.2


@pytest.mark.parametrize("aggregation", ["majority", "average"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_single_zeros_stay_for_an_even_number_of_ranks(n, aggregation):
    """Masked or pruned weights among others in a word: their coins cancel."""
    is_kept = torch.rand(1000, generator=generator(3)) < 0.5
    start = torch.randn(1000, generator=generator(4)) * is_kept
    world = Workers([start], n, **HYPER, aggregation=aggregation)
    for step in range(STEPS):
        gen = generator(step)
        world.step([[torch.randn(1000, generator=gen) * is_kept] for _ in range(n)])
    p = world.params[0][0]
    assert not p[~is_kept].any() and (p[is_kept] != start[is_kept]).float().mean() > 0.5


@pytest.mark.parametrize("n", [3, 5])
def test_single_zeros_never_drift_for_an_odd_number_of_ranks(n):
    """One coin is left over, which the next step takes back: never further away than one lr."""
    is_kept = torch.arange(1024) % 2 == 0
    world = Workers([torch.zeros(1024)], n, **HYPER)
    for step in range(STEPS):
        gen = generator(step)
        world.step([[torch.randn(1024, generator=gen) * is_kept] for _ in range(n)])
        away = world.params[0][0][~is_kept].abs()
        assert away.eq(0 if step % 2 else HYPER["lr"]).all()
    moved = world.params[0][0][is_kept]
    assert moved.abs().max() > 2 * HYPER["lr"]


def test_which_way_a_left_over_coin_goes_first_is_fair():
    world = Workers([torch.zeros(64_000)], 3, lr=1.0)
    g = torch.zeros(64_000)
    g[::32] = 1.0  # a vote in every word
    world.step([[g]] * 3)
    went = world.params[0][0].detach().view(-1, 32)[:, 1:]
    assert abs((went > 0).float().mean() - 0.5) < 4 * 0.5 / went.numel() ** 0.5
    assert np.isin(went.numpy(), (-1.0, 1.0)).all()


def test_weights_decay_where_nobody_votes():
    """A blank word's verdict is no move, as Lion's sign(0) is 0; decay is no vote."""
    world = Workers([torch.ones(64)], 3, lr=0.5, weight_decay=0.5)
    world.step([[torch.zeros(64)]] * 3)
    assert torch.equal(world.params[0][0], torch.full((64,), 0.75))


def test_an_absent_layer_abstains():
    """One rank of two has no gradient: the other decides, every element of it."""
    for absent in (0, 1):
        world = Workers([torch.zeros(1000)], 2, lr=1.0)
        g = torch.randn(1000, generator=generator(5))
        world.step([[None if rank == absent else g] for rank in range(2)])
        assert torch.equal(world.params[0][0], -g.sign())
