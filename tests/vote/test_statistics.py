"""vote_statistics(), against a count from the oracle's votes."""

import itertools
import logging

import numpy as np
import pytest
import torch

import oracle
from common import Dispatched, array, exact, generator
from lion_kernels import DistributedLion
from lion_kernels.simulate import loopback
from lion_kernels.vote.statistics import popcount
from voters import CHOICES
from voters import parameters as voters_parameters

HYPER = {"seed": 5, "lr": 2.0**-7, "betas": (0.5, 0.75)}
SIZES = (200, 33, 600)


def gradients(n, step):
    """Integers, with zeros alone and by words, and absent ones."""
    gen = generator(100 * n + step)
    common = [exact(size, gen) for size in SIZES]
    rows = [
        [exact(size, gen) + 2 * c for size, c in zip(SIZES, common, strict=True)] for _ in range(n)
    ]
    for rank, row in enumerate(rows):
        row[0][torch.rand(SIZES[0], generator=gen) < 0.3] = 0.0
        row[2][: 64 * (rank + 1)] = 0.0
        row[1] = None if (rank + step) % 3 == 0 else row[1]
    return rows


def workers(n, start, per_group, **options):
    """Optimizers over a loopback, with groups of so many tensors."""
    found = []
    for end in loopback(n):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        rest, groups = list(params), []
        for size in per_group:
            groups.append({"params": rest[:size]})
            rest = rest[size:]
        found.append((params, DistributedLion(groups, process_group=end, **HYPER, **options)))
    return found


def stepped(world, grads):
    for (params, opt), mine in zip(world, grads, strict=True):
        for p, g in zip(params, mine, strict=True):
            p.grad = g
        opt.step()


class Count:
    """What a World of the oracle's voted and decided in a step, element by element."""

    def __init__(self, world, grads, before):
        step, n, first = world.steps - 1, world.n, 0
        self.tensors = []
        for t, p in enumerate(world.params):
            votes = []
            for rank in range(n):
                g, m = grads[rank][t], before[rank][t]
                c = np.zeros(len(p)) if g is None else oracle.interpolate(m, array(g), 0.5)
                coins = oracle.zero_coin(world.seed, rank, step, first, len(p))
                votes.append(oracle.votes(c, world.ballots, coins))
            votes = np.stack(votes)
            total = (votes * np.array(world.weights)[:, None]).sum(0)
            blank = np.stack([oracle.blank(v) for v in votes]).all(0)
            coins = oracle.coin(world.seed, -1, step, first, len(p))
            self.tensors.append((votes, np.sign(world._direction(total, blank, coins))))
            first += oracle.room(len(p))


@pytest.mark.parametrize("per_group", [(3,), (1, 2)])
@pytest.mark.parametrize(("aggregation", "ballots", "ties", "exchange"), CHOICES)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_share_is_the_oracle_s(n, aggregation, ballots, ties, exchange, per_group):
    gen = generator(1)
    start = [torch.randn(size, generator=gen) for size in SIZES]
    votes = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    world = oracle.World([array(p) for p in start], n, **votes, **HYPER, weight_decay=0.0)
    ours = workers(n, start, per_group, **votes, exchange=exchange, statistics_every=1)
    counts = []
    for step in range(3):
        grads = gradients(n, step)
        before = [[np.array(m) for m in row] for row in world.exp_avgs]
        world.step([[None if g is None else array(g) for g in row] for row in grads])
        counts.append(Count(world, grads, before))
        stepped(ours, grads)
    *_, found = (opt.vote_statistics() for _, opt in ours)
    everything = [pair for count in counts for pair in count.tensors]
    votes_of = np.concatenate([v for v, _ in everything], 1)
    went = np.concatenate([d for _, d in everything])
    had = (votes_of != 0) & (went != 0)
    agreement = ((votes_of == went) & had).sum(1) / had.sum(1)
    np.testing.assert_allclose(found.agreement, agreement, rtol=1e-12)
    assert found.steps == 3 and len(found.groups) == len(per_group)
    begin = 0
    for group, size in zip(found.groups, per_group, strict=True):
        mine = range(begin, begin + size)
        v = np.concatenate([c.tensors[t][0] for c in counts for t in mine], 1)
        d = [np.concatenate([c.tensors[t][1] for t in mine]) for c in counts]
        shares = (group.unanimous, group.tied, group.abstaining)
        wanted = ((abs(v.sum(0)) == n).mean(), (np.concatenate(d) == 0).mean(), (v == 0).mean())
        np.testing.assert_allclose(shares, wanted, rtol=1e-12)
        turned = sum((a * b < 0).sum() for a, b in itertools.pairwise(d))
        could = sum((a * b != 0).sum() for a, b in itertools.pairwise(d))
        np.testing.assert_allclose(group.flipped, turned / could, rtol=1e-12)
        begin += size


def test_steps_that_are_counted_and_what_was_read():
    world = workers(2, [torch.zeros(64)], (1,), statistics_every=3)
    for step in range(7):
        stepped(world, [[torch.ones(64)], [torch.full((64,), 1.0 if step > 3 else -1.0)]])
    *_, found = (opt.vote_statistics() for _, opt in world)
    assert found.steps == 2 and found.groups[0].tied == 0.5
    *_, found = (opt.vote_statistics() for _, opt in world)
    assert found.steps == 0 and found.agreement == (1.0, 1.0)


def test_float64_has_an_election_of_its_own():
    start = [torch.zeros(64), torch.zeros(640, dtype=torch.float64)]
    world = workers(2, start, (2,), statistics_every=1)
    ones = [torch.ones_like(p) for p in start]
    stepped(world, [ones, [ones[0], -ones[1]]])
    *_, found = (opt.vote_statistics() for _, opt in world)
    (group,) = found.groups
    assert group.unanimous == 64 / 704 and group.tied == 640 / 704


@pytest.mark.parametrize("every", [0, 1])
def test_nothing_waits_for_the_device(every):
    """Counting reads nothing back: the scalars that a step reads are the same."""
    world = workers(2, [torch.zeros(640)], (1,), statistics_every=every)
    grads = [[torch.randn(640, generator=generator(r))] for r in range(2)]
    for _ in range(2):
        stepped(world, grads)
    with Dispatched() as seen:
        stepped(world, grads)
    assert "aten::_local_scalar_dense" not in seen.names


def inverted(rank):
    params = voters_parameters(sizes=((200, 100),))
    opt = DistributedLion(params, lr=0.01, statistics_every=1)
    common = torch.randn(200, 100, generator=generator(1))
    for step in range(2):
        own = torch.randn(200, 100, generator=generator(10 * step + rank))
        params[0].grad = (common + own) * (-1 if rank == 2 else 1)
        opt.step()
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("lion_kernels").addHandler(handler)
    found = opt.vote_statistics()
    logging.getLogger("lion_kernels").removeHandler(handler)
    return found.suspects, found.agreement[2] < 0.45 < 0.8 < found.agreement[0], logged


def test_a_rank_with_another_sign_is_named(worlds):
    seen = worlds(4).run(inverted)
    assert [found[:2] for found in seen] == [((2,), True)] * 4
    assert len(seen[0][2]) == 1 and "vote against most of what is decided: 2 (" in seen[0][2][0]
    assert not any(found[2] for found in seen[1:])


def test_popcount():
    gen = generator(3)
    words = torch.randint(-(2**31), 2**31, (1000,), generator=gen).to(torch.int32)
    words[:3] = torch.tensor([0, -1, -(2**31)])
    wanted = [oracle.unpack(np.array([w], np.int32).view("<u4")).sum() for w in words.numpy()]
    assert popcount(words).tolist() == wanted


def test_one_rank_has_no_statistics():
    opt = DistributedLion([torch.nn.Parameter(torch.zeros(3))], process_group=loopback(1)[0])
    with pytest.raises(RuntimeError, match="vote_statistics needs at least two ranks"):
        opt.vote_statistics()
