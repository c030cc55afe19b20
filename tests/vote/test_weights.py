"""Ranks whose votes count more than once, against the oracle, bit for bit."""

import itertools

import numpy as np
import pytest
import torch

import oracle
from common import array, exact, generator
from lion_kernels import DistributedLion
from lion_kernels.simulate import loopback
from lion_kernels.vote.poll import Poll

HYPER = {"seed": 5, "lr": 2.0**-7, "betas": (0.5, 0.75), "weight_decay": 0.25}
SIZES = (200, 33, 600)
CHOICES = list(itertools.product(("majority", "average"), ("binary", "ternary"), ("zero", "coin")))


def gradients(n, step, sparse):
    """Exact integers; where ``sparse``, with zeros, alone and by words, and absent tensors."""
    gen = generator(100 * n + step)
    rows = [[exact(size, gen) for size in SIZES] for _ in range(n)]
    for rank, row in enumerate(rows if sparse else ()):
        row[0][torch.rand(SIZES[0], generator=gen) < 0.3] = 0.0
        row[2][: 64 * (rank + 1)] = 0.0
        row[1] = None if (rank + step) % 3 == 0 else row[1]
    return rows


def build(rank, params, end, weights, options):
    return DistributedLion(params, process_group=end, weight=weights[rank], **HYPER, **options)


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize(("aggregation", "ballots", "ties"), CHOICES)
@pytest.mark.parametrize("weights", [(3, 1), (1, 2, 4), (5, 5, 1), (7, 2, 1, 255), (2, 2, 2, 2, 3)])
def test_weighted_votes_equal_the_oracle(weights, aggregation, ballots, ties, exchange):
    n, gen = len(weights), generator(1)
    start = [torch.randn(size, generator=gen) for size in SIZES]
    votes = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    wanted = oracle.World([array(p) for p in start], n, **votes, **HYPER, weights=list(weights))
    rows = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(n)]
    options = {**votes, "exchange": exchange}
    pairs = enumerate(zip(rows, loopback(n), strict=True))
    opts = [build(rank, row, end, weights, options) for rank, (row, end) in pairs]
    for step in range(3):
        grads = gradients(n, step, sparse=True)
        wanted.step([[None if g is None else array(g) for g in row] for row in grads])
        for row, mine, opt in zip(rows, grads, opts, strict=True):
            for p, g in zip(row, mine, strict=True):
                p.grad = g
            opt.step()
        for p, want in zip(rows[0], wanted.params, strict=True):
            np.testing.assert_array_equal(array(p), want)


def weighted(rank, weights):
    params = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    opt = build(rank, params, None, weights, {})
    for step in range(2):
        for p, g in zip(params, gradients(len(weights), step, sparse=False)[rank], strict=True):
            p.grad = g
        opt.step()
    opt.verify_replicas()
    return [p.detach() for p in params]


def test_weights_are_agreed_on_by_real_processes(worlds):
    """The rank that outweighs all others together decides."""
    weights = (1, 9, 2)
    alone = torch.zeros(SIZES[0])
    for step in range(2):
        m = gradients(3, 0, sparse=False)[1][0] * 0.25 * step
        c = 0.5 * m + 0.5 * gradients(3, step, sparse=False)[1][0]
        alone = alone * (1 - HYPER["lr"] * 0.25) - HYPER["lr"] * c.sign()
    for params in worlds(3).run(weighted, weights):
        is_vote = alone != 0
        assert torch.equal(params[0].sign()[is_vote], alone.sign()[is_vote])


@pytest.mark.parametrize("weight", [0, -1, 256, 1.5, "2", True])
def test_weights_out_of_range(weight):
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight must be an integer in \[1, 255\], got"):
        DistributedLion([p], process_group=loopback(2)[0], weight=weight)


def test_more_weight_than_can_be_counted():
    Poll(257, weights=(255,) * 257)
    with pytest.raises(ValueError, match="at most 65535 votes can be counted, got 65790"):
        Poll(258, weights=(255,) * 258)
