"""fused_backward: the path of an ordinary Lion, with one gradient at a time."""

import copy
import gc
import logging
import weakref

import pytest
import torch

from common import bits_equal, generator
from lion_kernels import Lion, release
from ranks import World

pytestmark = pytest.mark.slow
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(12)]
    return torch.nn.Sequential(*layers).to(dtype)


def backward(net, seed, dtype=torch.float32):
    x = torch.randn(8, 16, generator=generator(seed)).to(dtype)
    net(x).float().square().sum().backward()


def same(a, b):
    return all(bits_equal(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_path_as_an_ordinary_lion(dtype, rounding):
    net = model(dtype)
    twin = copy.deepcopy(net)
    fused = Lion(net.parameters(), **OPTIONS, rounding=rounding, fused_backward=True)
    plain = Lion(twin.parameters(), **OPTIONS, rounding=rounding)
    for seed in range(4):
        backward(net, seed, dtype)
        backward(twin, seed, dtype)
        assert all(p.grad is None for p in net.parameters())
        fused.step()
        plain.step()
        plain.zero_grad()
        assert same(net.parameters(), twin.parameters())


def test_stochastic_rounding_draws_anew_for_every_parameter():
    params = [torch.nn.Parameter(torch.full((4096,), 0.5, dtype=torch.bfloat16)) for _ in range(2)]
    opt = Lion(params, lr=1e-3, rounding="stochastic", fused_backward=True)
    sum(p.float().sum() for p in params).backward()
    opt.step()
    assert not torch.equal(params[0], params[1])
    moved = 0.5 - torch.cat([p.detach().double() for p in params]).mean().item()
    assert abs(moved - 1e-3) < 2e-4


@pytest.mark.parametrize(
    ("bucket", "wanted"), [(1, 4 * 16 * 16), (3000, 4 * (3 * 16 * 16 + 3 * 16))]
)
def test_a_bucket_of_gradients_at_a_time(monkeypatch, bucket, wanted):
    """Bytes of gradients that live together: those of a bucket, here the largest parameter or three
    layers, or of the model."""
    monkeypatch.setattr(release, "BUCKET_BYTES", bucket)
    most = {}
    for fused in (True, False):
        net, alive = model(), []

        def count(_, net=net, alive=alive):
            alive.append(sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(count)  # before the optimizer's
        opt = Lion(net.parameters(), **OPTIONS, fused_backward=fused)
        backward(net, 0)
        opt.step()
        most[fused] = max(alive)
    assert most == {True: wanted, False: 12 * 4 * (16 * 16 + 16)}


def test_accumulation():
    net = model()
    twin = copy.deepcopy(net)
    fused = Lion(net.parameters(), **OPTIONS, fused_backward=True)
    plain = Lion(twin.parameters(), **OPTIONS)
    for step in range(3):
        with fused.accumulate():
            backward(net, 2 * step)
            assert all(p.grad is not None for p in net.parameters())
        backward(net, 2 * step + 1)
        fused.step()
        backward(twin, 2 * step)
        backward(twin, 2 * step + 1)
        plain.step()
        plain.zero_grad()
    assert same(net.parameters(), twin.parameters())
    with plain.accumulate():  # no need, no harm
        backward(twin, 9)


def test_a_second_backward_is_refused():
    net = model()
    opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)
    backward(net, 0)
    with pytest.raises(RuntimeError, match=r"second gradient before step.*optimizer.accumulate"):
        backward(net, 1)
    opt.step()
    opt.zero_grad()
    backward(net, 2)


def test_what_it_cannot_honour():
    net = model()
    opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)
    opt.found_inf = torch.zeros(1)
    with pytest.raises(RuntimeError, match="before a GradScaler"):
        opt.step()
    with pytest.raises(TypeError, match="no copies"):
        copy.deepcopy(opt)


# Hooks that end


def hooks(params):
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in params)


def test_hooks_end_with_the_optimizer():
    net = model()
    params = list(net.parameters())
    opt = Lion(params, **OPTIONS, fused_backward=True)
    assert hooks(params) == len(params)
    opt.close()
    assert hooks(params) == 0
    backward(net, 0)
    before = [p.detach().clone() for p in params]
    opt.step()  # from now on an ordinary Lion
    assert all(p.grad is not None for p in params) and not same(params, before)
    opt.zero_grad()
    opt, alive = None, weakref.ref(Lion(params, **OPTIONS, fused_backward=True))
    gc.collect()
    assert alive() is None and hooks(params) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_new_optimizer_takes_the_parameters_over(caplog, fused):
    """A cell of a notebook that is run twice: the first optimizer still exists."""
    net = model()
    twin = copy.deepcopy(net)
    params = list(net.parameters())
    first = Lion(params, **OPTIONS, fused_backward=True)
    with caplog.at_level(logging.WARNING):
        second = Lion(params, **OPTIONS, fused_backward=fused)
    (record,) = caplog.records
    assert record.message.startswith("24 parameters leave an earlier optimizer")
    assert hooks(params) == (24 if fused else 0)
    plain = Lion(twin.parameters(), **OPTIONS)
    for seed in range(2):
        backward(net, seed)
        second.step()
        second.zero_grad()
        backward(twin, seed)
        plain.step()
        plain.zero_grad()
    assert same(params, twin.parameters())
    assert not first.state


def test_a_parameter_that_was_taken_out_is_left():
    a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = Lion([a, b], lr=0.5, fused_backward=True)
    opt.param_groups[0]["params"].pop(0)
    (a + b).sum().backward()
    opt.step()
    assert torch.equal(a, torch.ones(4)) and torch.equal(a.grad, torch.ones(4))
    assert torch.equal(b, torch.full((4,), 0.5))
    opt.param_groups[0]["params"].append(a)
    opt.zero_grad()
    (a + b).sum().backward()
    assert torch.equal(a, torch.full((4,), 0.5)) and a.grad is None


@pytest.mark.parametrize("bucket", [1, 3000, 25 * 2**20])
def test_a_step_advances_the_counter_by_one(monkeypatch, bucket):
    monkeypatch.setattr(release, "BUCKET_BYTES", bucket)
    net = model(torch.bfloat16)
    opt = Lion(net.parameters(), lr=1e-3, rounding="stochastic", fused_backward=True)
    for seed in range(3):
        backward(net, seed, torch.bfloat16)
        opt.step()
    assert int(opt.param_groups[0]["step"]) == 3


def test_buckets_are_launches(monkeypatch):
    """24 parameters of 13,056 bytes: all in one op, or an op for every 3,000 bytes."""
    for bucket, n_ops in ((25 * 2**20, 1), (3264, 4)):
        monkeypatch.setattr(release, "BUCKET_BYTES", bucket)
        net = model()
        opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)
        with torch.profiler.profile() as profile:
            backward(net, 0)
            opt.step()
        ops = [e for e in profile.events() if e.name == "lion_kernels::lion_step"]
        assert len(ops) == n_ops


# Gradients that are not final


def test_a_grad_scaler_is_refused_before_anything_moves():
    for scaler_first in (True, False):
        net = model()
        scaler = torch.amp.GradScaler("cpu") if scaler_first else None
        opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)
        scaler = scaler or torch.amp.GradScaler("cpu")
        before = [p.detach().clone() for p in net.parameters()]
        loss = scaler.scale(net(torch.ones(8, 16)).square().sum())
        with pytest.raises(RuntimeError, match="before a GradScaler has looked at the gradients"):
            loss.backward()
        assert same(net.parameters(), before)
        assert not any(opt.state[p]["exp_avg"].any() for p in net.parameters())
        del loss, scaler
    idle = torch.amp.GradScaler("cpu")  # that scaled nothing, or is not enabled
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(torch.ones(()))
    opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)
    backward(net, 0)
    opt.step()
    assert not same(net.parameters(), before) and idle.is_enabled()


def wrapped(rank, how, first):
    """Whether Lion(fused_backward=True) was refused, when, and whether a weight had moved."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    net = model()
    made = None
    if first:
        made = Lion(net.parameters(), **OPTIONS, fused_backward=True)
    if how == "DDP":
        outer = DistributedDataParallel(net)
    else:
        outer = FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=how == "original parameters"
        )
    before = [p.detach().clone() for p in outer.parameters()]
    try:
        opt = made or Lion(outer.parameters(), **OPTIONS, fused_backward=True)
        when = "backward"
        outer(torch.ones(4, 16)).square().sum().backward()
        opt.step()
    except RuntimeError as error:
        assert "fused_backward steps as soon as a gradient is there" in str(error)
        when = when if first else "construction"
        return when, same(outer.parameters(), before)
    return "never", False


@pytest.mark.parametrize(
    ("how", "first", "when"),
    [
        ("DDP", False, "construction"),
        ("DDP", True, "backward"),
        ("flat", False, "construction"),
        ("original parameters", False, "construction"),
    ],
)
def test_wrappers_that_reduce_are_refused(how, first, when):
    """A world of its own: a backward pass that raised leaves DDP's collectives unfinished."""
    world = World(2)
    try:
        assert world.run(wrapped, how, first) == [(when, True)] * 2
    finally:
        world.close()


def test_a_backward_pass_that_failed_is_forgotten():
    net = model()
    opt = Lion(net.parameters(), **OPTIONS, fused_backward=True)

    def fail(_):
        raise ArithmeticError

    handle = net[3].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ArithmeticError):
        backward(net, 0)
    handle.remove()
    opt.zero_grad()
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, 1)
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_wrapper_that_was_never_built_is_no_wrapper():
    from torch.nn.parallel import DistributedDataParallel

    with pytest.raises((RuntimeError, ValueError)) as kept:
        DistributedDataParallel(torch.nn.ReLU())
    Lion(model().parameters(), **OPTIONS, fused_backward=True)
    assert kept.value is not None


def test_a_momentum_of_another_shape_is_refused():
    p = torch.nn.Parameter(torch.zeros(4, 3))
    opt = Lion([("head", p)], **OPTIONS, fused_backward=True)
    opt.state[p]["exp_avg"] = torch.ones(3)  # which would broadcast
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of group 0 \('head'\) must"):
        (p * 0).sum().backward()
    assert not p.any()
