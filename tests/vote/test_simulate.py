"""Workers of a loopback are ranks of a process group, bit for bit, and fail as they do."""

import numpy as np
import pytest
import torch

from common import Workers, bits_equal, exact, generator
from lion_kernels import DistributedLion, Lion
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
    """Before and after the first step."""
    for steps, does in ((0, "asks which parameters take part"), (1, "steps")):
        world = Workers([torch.zeros(40)], 2, lr=0.5)
        for _ in range(steps):
            world.step([[torch.ones(40)]] * 2)
        world.params[0][0].grad = torch.ones(40)
        world.opts[0].step()
        named = f"ranks do not do the same: rank 0 {does}; rank 1 verifies the replicas"
        with pytest.raises(RuntimeError, match=named):
            world.opts[1].verify_replicas()


def test_a_worker_that_fails_is_every_worker_s_error():
    """Which the last one's call raises; the step can be made good."""
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    grads = [[torch.ones(40)]] * 2
    for steps in range(2):
        world.opts[1].param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"lr must be .*, got -1.0 \(on rank 1\)"):
            world.step(grads)
        assert all(torch.equal(row[0], torch.full((40,), -0.5 * steps)) for row in world.params)
        world.opts[1].param_groups[0]["lr"] = 0.5
        world.step(grads)
        assert all(
            torch.equal(row[0], torch.full((40,), -0.5 - 0.5 * steps)) for row in world.params
        )


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_how_many_workers(n):
    with pytest.raises(ValueError, match="n must be an integer at least 1, got"):
        loopback(n)


def test_compensations_are_compared_after_the_step():
    world = Workers([torch.ones(40).bfloat16()], 2, rounding="compensated", check_every=1)
    for step in range(2):
        world.step([[exact(40, generator(10 * step + rank), torch.bfloat16)] for rank in range(2)])
    del world.opts[1].state[world.params[1][0]]["compensation"]
    world.opts[0].verify_replicas()
    with pytest.raises(
        RuntimeError, match="replicas differ: parameters and compensations are 2 on"
    ):
        world.opts[1].verify_replicas()


def test_a_grad_scaler_is_agreed_on_from_the_first_step():
    """Which takes away what it found when a worker's step has returned."""
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in world.opts]
    for step in range(3):
        for rank, (mine, opt, scaler) in enumerate(
            zip(world.params, world.opts, scalers, strict=True)
        ):
            opt.zero_grad()
            scaler.scale(mine[0].sum()).backward()
            if step == 1 and rank == 0:
                mine[0].grad[3] = torch.inf
        for opt, scaler in zip(world.opts, scalers, strict=True):
            scaler.step(opt)
            scaler.update()
    assert all(torch.equal(row[0], torch.full((40,), -1.0)) for row in world.params)


def test_schedulers_may_step_before_the_next_worker():
    """Options of all groups are read before a step waits for anything."""
    ends, rows, opts = loopback(2), [], []
    for end in ends:
        rows.append([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)])
        groups = [{"params": [p]} for p in rows[-1]]
        opts.append(DistributedLion(groups, lr=0.5, process_group=end, check_every=1))
    for _ in range(2):
        for row, opt in zip(rows, opts, strict=True):
            for p in row:
                p.grad = torch.ones(3)
            opt.step()
            for group in opt.param_groups:
                group["lr"] = 0.25
    assert all(torch.equal(p, torch.full((3,), -0.75)) for row in rows for p in row)


def work(wire, done, fails=False):
    if fails:
        raise ValueError("at its begin")
    yield wire.largest(torch.zeros(1))
    done.append(wire.rank)


def test_an_error_of_a_worker_that_waits_leaves_the_others_theirs():
    ends, done = loopback(3), []
    for end in ends[:2]:
        end.drive(work(end, done))
        end.drive(work(end, done, fails=end.rank == 0))
    with pytest.raises(ValueError, match="at its begin"):
        ends[2].drive(work(ends[2], done))
    assert done == [0, 1, 2]
    for end in (ends[0], ends[2]):  # the work of rank 1 waits as far as it came
        end.drive(work(end, done))
    assert done == [0, 1, 2, 0, 1, 2]


def test_what_comes_behind_an_error_is_begun():
    ends, done = loopback(2), []
    for fails in (False, True, False):
        ends[0].drive(work(ends[0], done, fails))
    with pytest.raises(ValueError, match="at its begin"):
        ends[1].drive(work(ends[1], done))
    ends[1].drive(work(ends[1], done))
    assert done == [0, 1, 0, 1]


def test_steps_are_counted_and_not_calls_of_hooks():
    class Mine(DistributedLion):
        def step(self, closure=None):
            return super().step(closure)

    Lion([torch.nn.Parameter(torch.zeros(1))])  # from here on torch wraps Lion.step, too
    p, compared = torch.nn.Parameter(torch.zeros(3)), []
    opt = Mine([p], check_every=2, process_group=loopback(1)[0])
    compare = opt._compare_replicas
    opt._compare_replicas = lambda: compared.append(1) or compare()
    for _ in range(4):
        p.grad = torch.ones(3)
        opt.step()
    assert len(compared) == 2


def test_a_compiled_step_may_check_replicas():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = DistributedLion([p], lr=0.5, check_every=1, process_group=loopback(1)[0])
    step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        p.grad = torch.ones(3)
        step()
    assert torch.equal(p, torch.full((3,), -1.5))


def test_a_counter_that_is_missing_starts_anew():
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    world.step([[torch.ones(40)]] * 2)
    for opt in world.opts:
        del opt.param_groups[0]["step"]
    world.step([[torch.ones(40)]] * 2)
    assert all(opt.param_groups[0]["step"] == 1 for opt in world.opts)


def test_equal_options_of_other_types_agree():
    ends = loopback(2)
    one, two = ({"seed": np.int64(3), "broadcast": 1}, {"seed": 3, "broadcast": True})
    for end, options in zip(ends, (one, two), strict=True):
        DistributedLion([torch.nn.Parameter(torch.zeros(3))], process_group=end, **options)
