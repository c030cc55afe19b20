"""Both exchanges against the oracle, bit for bit, in worlds of up to 64 ranks in one process."""

import itertools

import numpy as np
import pytest
import torch

import oracle
from common import Workers, array, exact, generator, words
from lion_kernels.vote.buffers import Buffers
from lion_kernels.vote.exchange import choose
from lion_kernels.vote.poll import Poll

WORLDS = (1, 2, 3, 4, 5, 8, 16, 17, 64)
OPTIONS = list(itertools.product(("majority", "average"), ("binary", "ternary"), ("zero", "coin")))
HYPER = {"seed": 5, "lr": 1e-2, "betas": (0.5, 0.75)}


def check(numels, n, aggregation, ballots, ties, steps=2):
    gen = generator(n)
    params = [torch.randn(size, generator=gen) for size in numels]
    vote = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    # One worker is a Lion, whose zero votes are zeros.
    counted = vote if n > 1 else {"aggregation": "majority", "ballots": "ternary", "ties": "zero"}
    expected = oracle.World([array(p) for p in params], n, **counted, **HYPER, weight_decay=0.3)
    simulated = [
        Workers(params, n, **vote, **HYPER, weight_decay=0.3, exchange=name)
        for name in ("allgather", "sharded")
    ]
    for _ in range(steps):
        grads = [[exact(size, gen) for size in numels] for _ in range(n)]
        for t in range(1, len(numels)):  # missing on some ranks; tensor 0 everywhere present
            for rank in range(n):
                if torch.rand((), generator=gen) < 0.3:
                    grads[rank][t] = None
        if len(numels) > 2:  # missing everywhere
            for rank in range(n):
                grads[rank][2] = None
        expected.step([[None if g is None else array(g) for g in row] for row in grads])
        for world in simulated:
            world.step(grads)
            for rank in range(n):
                for p, want in zip(world.params[rank], expected.params, strict=True):
                    np.testing.assert_array_equal(array(p), want)
    return simulated


@pytest.mark.parametrize(("aggregation", "ballots", "ties"), OPTIONS)
@pytest.mark.parametrize("n", WORLDS)
def test_exchanges_equal_the_oracle(n, aggregation, ballots, ties):
    worlds = check((200, 33, 50, 0, 1), n, aggregation, ballots, ties)
    if n > 1:
        one, two = (next(iter(w.opts[0]._mover._booths.values())).buffers for w in worlds)
        flat = [b.verdict_planes.transpose(0, 1).flatten(1) for b in (one, two)]
        used = one.layout.n_words
        np.testing.assert_array_equal(words(flat[0][:, :used]), words(flat[1][:, :used]))


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1021])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_boundary(n, size):
    for aggregation, ballots in itertools.product(("majority", "average"), ("binary", "ternary")):
        check((size,), n, aggregation, ballots, "zero", steps=1)


def storages(buffers):
    """Bytes of the distinct storages behind buffers."""
    tensors = (buffers.ballot, buffers.received, buffers.verdict, buffers.verdict_planes)
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16, 64])
def test_buffers_take_less_than_half_a_byte_a_parameter(n, is_sharded):
    """Under allgather, for as many ranks as it is chosen for."""
    size = 1_000_000
    for ties in ("coin", "zero") if is_sharded or n <= 3 else ():
        buffers = Buffers.allocate((size,), Poll(n, ties=ties), is_sharded, 0, torch.device("cpu"))
        slack = n * 128  # padding and trailers
        assert storages(buffers) <= 0.4 * size + slack


def test_auto():
    assert [choose(n) for n in (1, 2, 3, 4, 5, 64)] == ["allgather"] * 3 + ["sharded"] * 3
