"""Workers of a loopback are ranks of a process group, bit for bit, and fail as they do."""

import pytest
import torch

from common import Workers, bits_equal, generator
from lion_kernels import DistributedLion
from lion_kernels.simulate import loopback

SHAPES = ((40, 30), (7,), (33,), (3, 5))
RUNS = [
    {"exchange": "sharded", "rounding": "stochastic"},
    {"exchange": "allgather", "ballots": "ternary", "aggregation": "average"},
    {"ties": "coin", "momentum_dtype": "int8", "cautious": True},
]


def tensors():
    """The last in float64: a ballot of its own."""
    gen = generator(2)
    *most, last = (torch.randn(shape, generator=gen) for shape in SHAPES)
    return [most[0].bfloat16(), *most[1:], last.double()]


def gradients(rank, step):
    gen = generator(100 * rank + step)
    rows = [torch.randn(t.shape, generator=gen).to(t.dtype) for t in tensors()]
    if (rank + step) % 2 == 0:
        rows[1] = None
    return rows


def trained(rank, options):
    params = [torch.nn.Parameter(t) for t in tensors()]
    opt = DistributedLion(params, lr=0.01, weight_decay=0.1, seed=3, check_every=2, **options)
    for step in range(3):
        for p, g in zip(params, gradients(rank, step), strict=True):
            p.grad = g
        opt.step()
    kept = [t for p in params for t in opt.state[p].values()]
    return [p.detach() for p in params] + kept, opt.wire_bytes


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("n", [2, 3])
def test_equal_real_processes(worlds, n, options):
    world = Workers(tensors(), n, lr=0.01, weight_decay=0.1, seed=3, check_every=2, **options)
    for step in range(3):
        world.step([gradients(rank, step) for rank in range(n)])
    for rank, (bits, sent) in enumerate(worlds(n).run(trained, options)):
        mine, opt = world.params[rank], world.opts[rank]
        kept = [t for p in mine for t in opt.state[p].values()]
        assert all(bits_equal(*pair) for pair in zip([*mine, *kept], bits, strict=True))
        assert opt.wire_bytes == sent > 0


def test_the_last_call_ends_the_step():
    world = Workers([torch.zeros(40)], 3, lr=0.5)
    for mine, opt in zip(world.params, world.opts, strict=True):
        assert not any(p.any() for row in world.params for p in row)
        mine[0].grad = torch.ones(40)
        opt.step()
    assert all(torch.equal(row[0], torch.full((40,), -0.5)) for row in world.params)


def test_gradients_that_go_too_early_are_noticed():
    """Or, in a later step, were read in time."""
    for early in (0, 1):
        world = Workers([torch.zeros(40)], 2, lr=0.5)
        if early:
            world.step([[torch.ones(40)]] * 2)
        world.params[0][0].grad = world.params[1][0].grad = torch.ones(40)
        world.opts[0].step()
        world.opts[0].zero_grad()
        if early:
            world.opts[1].step()
            assert all(torch.equal(row[0], torch.full((40,), -1.0)) for row in world.params)
        else:
            with pytest.raises(RuntimeError, match="gradients must stay until the step of every"):
                world.opts[1].step()


def test_construction_is_the_group_s():
    ends, gen = loopback(3), generator(0)
    rows = [[torch.nn.Parameter(torch.randn(5, generator=gen))] for _ in ends]
    first = rows[0][0].detach().clone()
    for row, end in zip(rows, ends, strict=True):
        DistributedLion(row, process_group=end)
    assert all(torch.equal(row[0], first) for row in rows)  # broadcast
    ends = loopback(2)
    DistributedLion([torch.nn.Parameter(torch.ones(5))], process_group=ends[0])
    with pytest.raises(RuntimeError, match=r"shape of parameter 0 of group 0: \(5,\) on rank 0"):
        DistributedLion([torch.nn.Parameter(torch.ones(6))], process_group=ends[1])


def test_replicas_that_differ_are_named():
    world = Workers([torch.zeros(40)], 2, lr=0.5, check_every=1)
    world.params[1][0].data[3] = 7.0
    with pytest.raises(RuntimeError, match="replicas differ: parameter 0 of group 0"):
        world.step([[torch.ones(40)]] * 2)


def test_workers_that_do_something_else_are_named():
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    world.params[0][0].grad = torch.ones(40)
    world.opts[0].step()
    with pytest.raises(RuntimeError, match="must do the same, got rank 0: more, rank 1: the end"):
        world.opts[1].verify_replicas()
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    world.step([[torch.ones(40)]] * 2)
    world.opts[0].step()
    with pytest.raises(RuntimeError, match="must do the same, got rank 0: all_gather, rank 1: val"):
        world.opts[1].verify_replicas()


def test_a_worker_that_fails_leaves_the_others_waiting():
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    world.params[0][0].grad = torch.ones(40)
    world.opts[0].step()
    world.params[1][0].grad = torch.ones(40)
    world.opts[1].param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        world.opts[1].step()
    assert not any(row[0].any() for row in world.params)
    world.opts[1].param_groups[0]["lr"] = 0.5
    world.opts[1].step()
    assert all(torch.equal(row[0], torch.full((40,), -0.5)) for row in world.params)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_how_many_workers(n):
    with pytest.raises(ValueError, match="n must be an integer at least 1, got"):
        loopback(n)
