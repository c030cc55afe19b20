"""DistributedLion over real Gloo processes: what the vote computes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

import oracle
from common import array, bits_equal, exact, generator
from lion_kernels import DistributedLion, Lion
from voters import CHOICES, HYPER, SIZES, gradient, parameters, set_gradients


def train(rank, steps, dtype, options):
    params = parameters(dtype=dtype)
    opt = DistributedLion(params, **HYPER, **options)
    for step in range(steps):
        set_gradients(params, rank, step, dtype)
        opt.step()
    opt.verify_replicas()
    return (
        [p.detach() for p in params],
        [opt.state[p]["exp_avg"] for p in params],
        opt.wire_bytes,
    )


@pytest.mark.parametrize(("aggregation", "ballots", "ties", "exchange"), CHOICES)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_equals_the_oracle(worlds, n, aggregation, ballots, ties, exchange):
    vote = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    expected = oracle.World([array(p.flatten()) for p in parameters()], n, **vote, **HYPER, seed=7)
    for step in range(4):
        rows = [
            [gradient(rank, step, t, size) for t, size in enumerate(SIZES)] for rank in range(n)
        ]
        expected.step([[None if g is None else array(g.flatten()) for g in row] for row in rows])
    options = {**vote, "exchange": exchange, "seed": 7}
    results = worlds(n).run(train, 4, torch.float32, options)
    for rank, (params, exp_avgs, _) in enumerate(results):
        for t, (p, m) in enumerate(zip(params, exp_avgs, strict=True)):
            np.testing.assert_array_equal(p.flatten().numpy(), expected.params[t])
            np.testing.assert_allclose(array(m.flatten()), expected.exp_avgs[rank][t], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregation", ["majority", "average"])
def test_half_precision_replicas_stay_identical(worlds, dtype, aggregation):
    results = worlds(4).run(train, 20, dtype, {"aggregation": aggregation})
    for params, _, _ in results[1:]:
        assert all(bits_equal(a, b) for a, b in zip(params, results[0][0], strict=True))
    momenta = [exp_avgs[0] for _, exp_avgs, _ in results]
    assert not any(torch.equal(momenta[0], m) for m in momenta[1:])


def train_two_groups(rank, momentum_dtype):
    params = parameters()
    opt = DistributedLion(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "weight_decay": 0.0}],
        **HYPER, ballots="ternary", momentum_dtype=momentum_dtype,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        scheduler.step()
    return [p.detach() for p in params], {opt.state[p]["exp_avg"].dtype for p in params}


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16"])
def test_groups_schedulers_and_momentum_dtype(worlds, momentum_dtype):
    expected = [p.detach().numpy() for p in parameters()]
    for step in range(3):
        for t in range(len(SIZES)):
            lr, decay = (1e-2, 0.3) if t < 2 else (0.25, 0.0)
            expected[t] = oracle.update(expected[t], np.ones(SIZES[t]), lr * 0.5**step, decay)
    for params, dtypes in worlds(3).run(train_two_groups, momentum_dtype):
        assert dtypes == {torch.bfloat16 if momentum_dtype else torch.float32}
        for p, want in zip(params, expected, strict=True):
            np.testing.assert_array_equal(p.numpy(), want)


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
def test_int8_momenta_equal_the_oracle(worlds, exchange):
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
    options = {**vote, "exchange": exchange, "seed": 7, "momentum_dtype": "int8"}
    for params, exp_avgs, _ in worlds(3).run(train, 4, torch.float32, options):
        assert {m.dtype for m in exp_avgs} == {torch.int8}
        for t, p in enumerate(params):
            np.testing.assert_array_equal(p.flatten().numpy(), expected.params[t])


def vote_with(rank, steps, options):
    p = torch.nn.Parameter(torch.randn(300, generator=generator(0)))
    opt = DistributedLion([p], **HYPER, ballots="ternary", **options)
    for step in range(steps):
        p.grad = exact(300, generator(10 * step + rank))
        opt.param_groups[0]["lr"] = HYPER["lr"] / (step + 1)
        opt.step()
    opt.verify_replicas()
    return p.detach()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_variants_are_their_formulas(worlds, n, independent, cautious_decay, cautious):
    """Votes against the own gradient are zeros; decay only along delta; decay by lr / first lr."""
    options = {
        "cautious": cautious,
        "cautious_weight_decay": cautious_decay,
        "independent_weight_decay": independent,
    }
    p = array(torch.randn(300, generator=generator(0)))
    m, (beta1, beta2) = np.zeros((n, 300)), HYPER["betas"]
    for step in range(3):
        lr = HYPER["lr"] / (step + 1)
        g = np.stack([array(exact(300, generator(10 * step + rank))) for rank in range(n)])
        c = beta1 * m + (1 - beta1) * g
        votes = np.where((np.sign(c) == np.sign(g)) | (not cautious), np.sign(c), 0)
        delta = np.sign(votes.sum(0))
        decay = HYPER["weight_decay"] / (HYPER["lr"] if independent else 1)
        moved = oracle.update(p, delta, lr, decay)
        kept = oracle.update(p, delta, lr, 0.0)
        p = np.float64(np.where((delta * p < 0) & cautious_decay, kept, moved))
        m = beta2 * m + (1 - beta2) * g
    for result in worlds(n).run(vote_with, 3, options):
        np.testing.assert_array_equal(array(result), p)
