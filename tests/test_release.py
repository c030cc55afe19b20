"""fused_backward: the path of an ordinary Lion, with one gradient at a time."""

import copy

import pytest
import torch

from common import bits_equal, generator
from lion_kernels import Lion, release

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
