"""Chunks that were damaged on their way: an error, or another vote; never a crash."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from common import Workers, bits_equal, generator, lr_of, random_words, step_of
from lion_kernels import reference
from lion_kernels.layout import SEAL_WORDS, BallotLayout

HYPER = {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.1}
SIZES = (700, 0, 33)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def damaged(monkeypatch, world, rank, change):
    """Changes what a worker has received before it looks at it."""
    roll_call = world.opts[rank]._electorate.roll_call
    check = roll_call.check

    def changed(buffers):
        change(buffers)
        yield from check(buffers)

    monkeypatch.setattr(roll_call, "check", changed)


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize("ballots", ["binary", "ternary"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bits_of_a_chunk(ballots, exchange, data):
    """A bit of a seal is an error, and nothing is written there; others give numbers as always."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = Workers([torch.ones(n) for n in SIZES], 3, **HYPER, exchange=exchange,
                        ballots=ballots, check_every=0)  # fmt: skip
        grads = [[torch.randn(n, generator=generator(r)) for n in SIZES] for r in range(3)]
        world.step(grads)
        before = [[p.detach().clone() for p in row] for row in world.params]
        received = next(iter(world.opts[1]._electorate._booths.values())).buffers.received
        n_bits = 32 * received.shape[1]
        flips = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, n_bits - 1)),
                                   min_size=1, max_size=20, unique=True))  # fmt: skip

        def change(buffers):
            for rank, bit in flips:
                buffers.received[rank, bit // 32] ^= 1 << bit % 32 if bit % 32 < 31 else -(2**31)

        damaged(monkeypatch, world, 1, change)
        if any(bit >= n_bits - 32 * SEAL_WORDS for _, bit in flips):
            with pytest.raises(RuntimeError, match=r"damaged on its way|of a loopback must do the"):
                world.step(grads)
            assert all(map(torch.equal, world.params[1], before[1]))
        else:
            world.step(grads)
            for row, old in zip(world.params, before, strict=True):
                for p, q in zip(row, old, strict=True):
                    assert p.shape == q.shape and ((p - q * 0.95).abs() <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("name", [*backends.SIMD_LEVELS])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 20),
    octets=st.integers(0, 40),
    planes=st.sampled_from([1, 2]),
)
def test_any_bits_in_the_ops(name, seed, n, octets, planes):
    """Counts are those of the specification; a verdict of any bits is applied as it says."""
    ops, undo = backends.select(name)
    gen, step = generator(seed), step_of(3)
    try:
        ballots = random_words(n, planes, 8 * octets, gen=gen)
        blanks = random_words(n, octets // 4 + 1, gen=gen) if planes == 1 else None
        scale = n if planes == 1 else 3 * n
        outs = []
        for backend in (reference, ops):
            tally = zeros(scale.bit_length(), 8 * octets)
            out_blanks = zeros(1, octets // 4 + 1) if planes == 1 and scale % 2 else None
            backend.tally(ballots, tally, scale, 8, 1, step, blanks, out_blanks)
            outs.append(tally)
        assert bits_equal(*outs)
        layout = BallotLayout((256 * octets,), 1, 1)
        trailers = random_words(3, layout.trailer_words, gen=gen)
        if seed % 2:
            trailers[:, -4:] = torch.tensor([0, 2, 7, 7], dtype=torch.int32)
        verdict = random_words(1, 2, 8 * octets, gen=gen)
        params = []
        for backend in (reference, ops):
            p = torch.ones(256 * octets)
            backend.apply([p], verdict, None, trailers, 2, lr_of(0.5), 0.1, step_of(3))
            params.append(p)
        assert bits_equal(*params) and params[0].isfinite().all()
    finally:
        undo()
