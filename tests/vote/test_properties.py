"""Properties of the vote, on inputs that hypothesis chooses."""

import numpy as np
import pytest
import torch

from common import Workers, bits_equal, lr_of, no_counts

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

HYPER = {"seed": 3, "lr": 2.0**-6, "betas": (0.5, 0.75), "weight_decay": 0.25}
VOTE = {"aggregation": "majority", "ballots": "ternary", "ties": "zero", "exchange": "sharded"}


@st.composite
def gradients(draw, max_workers=6):
    """Integers in [-3, 3] with many zeros and ties, (workers, steps, elements)."""
    n, steps, size = (
        draw(st.integers(1, max_workers)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 70)),
    )
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(-3, 4, (n, steps, size)).astype(np.float32)


def train(grads, **options):
    """The parameters after voting on grads (workers, steps, elements), all replicas equal."""
    n, steps, size = grads.shape
    world = Workers([torch.linspace(-1, 1, size)], n, **{**VOTE, **HYPER, **options})
    for step in range(steps):
        world.step([[torch.from_numpy(grads[rank, step].copy())] for rank in range(n)])
    assert all(bits_equal(world.params[0][0], p[0]) for p in world.params)
    return world.params[0][0].detach()


@settings(max_examples=50, deadline=None)
@given(gradients(), st.randoms(), st.sampled_from(["majority", "average"]))
def test_the_order_of_workers_does_not_matter(grads, random, aggregation):
    order = list(range(len(grads)))
    random.shuffle(order)
    assert bits_equal(
        train(grads, aggregation=aggregation), train(grads[order], aggregation=aggregation)
    )


@settings(max_examples=50, deadline=None)
@given(gradients(), st.sampled_from(["majority", "average"]))
def test_odd_symmetry(grads, aggregation):
    """Without decay, opposite gradients move opposite ways: by exact steps of lr."""
    options = {"aggregation": aggregation, "weight_decay": 0.0, "lr": 2.0**-4}
    start = np.linspace(-1, 1, grads.shape[2]).astype(np.float32)
    up, down = train(grads, **options).numpy(), train(-grads, **options).numpy()
    np.testing.assert_allclose(up - start, -(down - start), atol=2.0**-20)


@settings(max_examples=50, deadline=None)
@given(gradients(), st.integers(-8, 8))
def test_scale_invariance(grads, exponent):
    assert bits_equal(train(grads), train(grads * np.float32(2.0**exponent)))


@settings(max_examples=50, deadline=None)
@given(gradients(max_workers=1), st.integers(2, 7), st.sampled_from(["majority", "average"]))
def test_agreement_equals_one_lion(grads, n, aggregation):
    """Workers with equal gradients are one Lion (zeros included, with ternary ballots)."""
    p, m = torch.linspace(-1, 1, grads.shape[2]), torch.zeros(grads.shape[2])
    for step in range(grads.shape[1]):
        torch.ops.lion_kernels.lion_step(
            [p], [torch.from_numpy(grads[0, step].copy())], [m], lr_of(HYPER["lr"]),
            *HYPER["betas"], HYPER["weight_decay"], False, no_counts(),
        )  # fmt: skip
    together = train(np.repeat(grads, n, axis=0), aggregation=aggregation)
    if aggregation == "majority":
        assert bits_equal(together, p)
    else:  # lr / N rounds
        torch.testing.assert_close(together, p, rtol=0, atol=2.0**-20)


@settings(max_examples=50, deadline=None)
@given(gradients(), st.sampled_from(["binary", "ternary"]))
def test_average_and_majority_agree_in_sign(grads, ballots):
    options = {"weight_decay": 0.0, "ballots": ballots}
    one = grads[:, :1]
    start = np.linspace(-1, 1, grads.shape[2]).astype(np.float32)
    majority = train(one, aggregation="majority", **options).numpy() - start
    average = train(one, aggregation="average", **options).numpy() - start
    if ballots == "ternary":
        np.testing.assert_array_equal(np.sign(majority), np.sign(average))
    else:  # an odd number of ranks that left a word blank leaves half a vote, which falls to a coin
        assert (np.sign(majority) * np.sign(average) >= 0).all()


@settings(max_examples=30, deadline=None)
@given(gradients(), st.integers(0, 1000))
def test_a_minority_of_adversaries_cannot_flip_a_unanimous_element(grads, seed):
    """2k + 1 workers, k of them arbitrary: where the honest ones agree, their sign wins."""
    k = len(grads)
    honest = np.ones((k + 1, 1, grads.shape[2]), np.float32)
    lies = np.random.default_rng(seed).choice([-1e30, np.nan, np.inf, -np.inf], honest[:k].shape)
    lies = lies.astype(np.float32)
    mixed = train(np.concatenate([lies, honest]), ballots="binary")
    assert bits_equal(mixed, train(honest, ballots="binary"))
