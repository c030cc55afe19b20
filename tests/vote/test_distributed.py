"""What DistributedLion computes: with workers in this process, and, for the wire, over Gloo."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

import oracle
from common import Workers, array, bits_equal, exact, generator
from lion_kernels import DistributedLion, Lion
from lion_kernels.simulate import loopback
from voters import CHOICES, HYPER, SIZES, gradient, parameters, set_gradients


def train(rank, steps, options):
    params = parameters()
    opt = DistributedLion(params, **HYPER, **options)
    for step in range(steps):
        set_gradients(params, rank, step)
        opt.step()
    opt.verify_replicas()
    return [p.detach() for p in params], [opt.state[p]["exp_avg"] for p in params]


def together(n, steps, dtype=torch.float32, **options):
    """n workers in this process, after the steps of ``train``."""
    world = Workers([p.detach() for p in parameters(dtype=dtype)], n, **HYPER, **options)
    for step in range(steps):
        for rank, params in enumerate(world.params):
            set_gradients(params, rank, step, dtype)
        world.step()
    for opt in world.opts:
        opt.verify_replicas()
    return list(zip(world.params, world.exp_avgs, strict=True))


def expected_world(n, steps, vote):
    expected = oracle.World([array(p.flatten()) for p in parameters()], n, **vote, **HYPER, seed=7)
    for step in range(steps):
        rows = [
            [gradient(rank, step, t, size) for t, size in enumerate(SIZES)] for rank in range(n)
        ]
        expected.step([[None if g is None else array(g.flatten()) for g in row] for row in rows])
    return expected


def check(results, expected):
    for rank, (params, exp_avgs) in enumerate(results):
        for t, (p, m) in enumerate(zip(params, exp_avgs, strict=True)):
            np.testing.assert_array_equal(array(p.flatten()), expected.params[t])
            np.testing.assert_allclose(array(m.flatten()), expected.exp_avgs[rank][t], rtol=1e-6)


@pytest.mark.parametrize(("aggregation", "ballots", "ties", "exchange"), CHOICES)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_equals_the_oracle(n, aggregation, ballots, ties, exchange):
    vote = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    check(together(n, 4, **vote, exchange=exchange, seed=7), expected_world(n, 4, vote))


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_real_processes_equal_the_oracle(worlds, n, exchange):
    vote = {"aggregation": "majority", "ballots": "ternary", "ties": "zero"}
    results = worlds(n).run(train, 4, {**vote, "exchange": exchange, "seed": 7})
    check(results, expected_world(n, 4, vote))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregation", ["majority", "average"])
def test_half_precision_replicas_stay_identical(dtype, aggregation):
    results = together(4, 20, dtype, aggregation=aggregation)
    for params, _ in results[1:]:
        assert all(bits_equal(a, b) for a, b in zip(params, results[0][0], strict=True))
    momenta = [exp_avgs[0] for _, exp_avgs in results]
    assert not any(torch.equal(momenta[0], m) for m in momenta[1:])


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16"])
def test_groups_schedulers_and_momentum_dtype(momentum_dtype):
    expected = [p.detach().numpy() for p in parameters()]
    for step in range(3):
        for t in range(len(SIZES)):
            lr, decay = (1e-2, 0.3) if t < 2 else (0.25, 0.0)
            expected[t] = oracle.update(expected[t], np.ones(SIZES[t]), lr * 0.5**step, decay)
    rows, opts = [], []
    for end in loopback(3):
        rows.append(parameters())
        groups = [
            {"params": rows[-1][:2]},
            {"params": rows[-1][2:], "lr": 0.25, "weight_decay": 0.0},
        ]
        options = {"ballots": "ternary", "momentum_dtype": momentum_dtype}
        opts.append(DistributedLion(groups, **HYPER, **options, process_group=end))
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5) for opt in opts]
    for _ in range(3):
        for params, opt, scheduler in zip(rows, opts, schedulers, strict=True):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
            scheduler.step()
    for params, opt in zip(rows, opts, strict=True):
        wanted = torch.bfloat16 if momentum_dtype else torch.float32
        assert {opt.state[p]["exp_avg"].dtype for p in params} == {wanted}
        for p, want in zip(params, expected, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), want)


def train_alone(rank, options):
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    distributed, alone = parameters(), parameters()
    opt = DistributedLion(distributed, **HYPER, process_group=group, **options)
    lion = Lion(alone, **HYPER)
    for step in range(4):
        set_gradients(distributed, rank, step)
        set_gradients(alone, rank, step)
        opt.step()
        lion.step()
    assert opt.wire_bytes == 0
    opt.verify_replicas()
    return all(bits_equal(p, q) for p, q in zip(distributed, alone, strict=True))


@pytest.mark.parametrize("options", [{}, {"aggregation": "average", "ties": "coin"}])
def test_one_worker_is_lion_bit_for_bit(worlds, options):
    assert all(worlds(2).run(train_alone, options))


def train_in_subgroup(rank):
    """Ranks 1 and 3 take no part: a collective over the world would never end."""
    group = dist.new_group([2, 0])  # group ranks follow the sorted global ranks
    if rank in (1, 3):
        return None
    params = parameters(seed=rank)
    opt = DistributedLion(params, **HYPER, process_group=group, check_every=1)
    for step in range(2):
        set_gradients(params, rank, step)
        opt.step()
    return [p.detach() for p in params]


def test_never_the_world_where_a_group_was_given(worlds):
    results = worlds(4).run(train_in_subgroup)
    assert all(bits_equal(a, b) for a, b in zip(results[0], results[2], strict=True))


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
def test_int8_momenta_equal_the_oracle(exchange):
    """Each worker's momentum is stored in 8 bits between the steps."""
    vote = {"aggregation": "majority", "ballots": "ternary", "ties": "zero"}
    sizes = [math.prod(size) for size in SIZES]
    expected = oracle.World([array(p.flatten()) for p in parameters()], 3, **vote, **HYPER, seed=7)
    for step in range(4):
        rows = [[gradient(rank, step, t, (n,)) for t, n in enumerate(sizes)] for rank in range(3)]
        expected.step([[None if g is None else array(g) for g in row] for row in rows])
        for rank, row in enumerate(rows):
            for t, g in enumerate(row):
                if g is not None:
                    stored = oracle.quantize(expected.exp_avgs[rank][t])
                    expected.exp_avgs[rank][t] = oracle.dequantize(*stored)
    for params, exp_avgs in together(
        3, 4, **vote, exchange=exchange, seed=7, momentum_dtype="int8"
    ):
        assert {m.dtype for m in exp_avgs} == {torch.int8}
        for t, p in enumerate(params):
            np.testing.assert_array_equal(array(p.flatten()), expected.params[t])


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_variants_are_their_formulas(n, independent, cautious_decay, cautious):
    """Votes against the own gradient are zeros; decay only along delta; decay by lr / first lr."""
    options = {
        "cautious": cautious,
        "cautious_weight_decay": cautious_decay,
        "independent_weight_decay": independent,
    }
    start = torch.randn(300, generator=generator(0))
    world = Workers([start], n, **HYPER, ballots="ternary", **options)
    p, m, (beta1, beta2) = array(start), np.zeros((n, 300)), HYPER["betas"]
    for step in range(3):
        lr = HYPER["lr"] / (step + 1)
        for opt in world.opts:
            opt.param_groups[0]["lr"] = lr
        grads = [exact(300, generator(10 * step + rank)) for rank in range(n)]
        world.step([[g] for g in grads])
        g = np.stack([array(g) for g in grads])
        c = beta1 * m + (1 - beta1) * g
        votes = np.where((np.sign(c) == np.sign(g)) | (not cautious), np.sign(c), 0)
        delta = np.sign(votes.sum(0))
        decay = HYPER["weight_decay"] / (HYPER["lr"] if independent else 1)
        moved = oracle.update(p, delta, lr, decay)
        kept = oracle.update(p, delta, lr, 0.0)
        p = np.float64(np.where((delta * p < 0) & cautious_decay, kept, moved))
        m = beta2 * m + (1 - beta2) * g
    for (result,) in world.params:
        np.testing.assert_array_equal(array(result), p)
