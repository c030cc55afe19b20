"""Lion, the optimizer: everything around the fused pass."""

import copy

import numpy as np
import pytest
import torch

import oracle
from common import array, bits_equal, generator
from eager import OPTIONS, close, eager, parameters, set_grads
from lion_kernels import Lion


@pytest.mark.parametrize("maximize", [False, True])
def test_many_steps_match_eager_lion(maximize):
    params = parameters((30, 20), (7,), (), (0,), (3, 2, 2, 2))
    twins = copy.deepcopy(params)
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion(params, **OPTIONS, maximize=maximize)
    for step in range(20):
        set_grads(params, step)
        set_grads(twins, step)
        opt.step()
        eager(twins, exp_avgs, sign=-1.0 if maximize else 1.0)
    close(params, twins)
    for p, m in zip(params, exp_avgs, strict=True):
        torch.testing.assert_close(opt.state[p]["exp_avg"], m)


def test_groups_and_their_options():
    a, b, c = parameters((40,), (50,), (60,))
    twins = copy.deepcopy([a, b, c])
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion([{"params": [a]}, {"params": [b], "lr": 5e-2, "betas": (0.5, 0.6)}], **OPTIONS)
    opt.add_param_group({"params": [c], "weight_decay": 0.9})
    for step in range(3):
        set_grads([a, b, c], step)
        set_grads(twins, step)
        opt.step()
        eager(twins[:1], exp_avgs[:1])
        eager(twins[1:2], exp_avgs[1:2], lr=5e-2, betas=(0.5, 0.6))
        eager(twins[2:], exp_avgs[2:], weight_decay=0.9)
    close([a, b, c], twins)


def test_missing_gradients_and_frozen_parameters():
    a, b, c = parameters((4,), (5,), (6,))
    c.requires_grad_(False)
    opt = Lion([a, b, c], **OPTIONS)
    a.grad = torch.ones(4)
    before = copy.deepcopy([b, c])
    opt.step()
    assert torch.equal(b, before[0]) and torch.equal(c, before[1])
    assert list(opt.state) == [a]


def test_closure():
    params = parameters((6,))
    opt = Lion(params, **OPTIONS)

    def closure():
        opt.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    first = opt.step(closure)
    assert first is not None and opt.step(closure) < first
    assert params[0].grad.requires_grad is False


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
def test_schedulers(name):
    params = parameters((10,))
    twins = copy.deepcopy(params)
    exp_avgs = [torch.zeros_like(p) for p in twins]
    opt = Lion(params, **OPTIONS)
    make = getattr(torch.optim.lr_scheduler, name)
    kwargs = {
        "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False},
        "CosineAnnealingLR": {"T_max": 10},
    }[name]
    scheduler = make(opt, **kwargs)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        lr = opt.param_groups[0]["lr"]
        opt.step()
        eager(twins, exp_avgs, lr=lr)
        scheduler.step()
    close(params, twins)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(shape):
    params = parameters((100,))
    twins = copy.deepcopy(params)
    lr = torch.full(shape, 1e-2)
    opt = Lion(params, **{**OPTIONS, "lr": lr})
    reference = Lion(twins, **{**OPTIONS, "lr": lr.item()})
    for step in range(3):
        lr.fill_(10.0 ** (-1 - step))
        reference.param_groups[0]["lr"] = lr.item()
        set_grads(params, step)
        set_grads(twins, step)
        opt.step()
        reference.step()
    assert bits_equal(params[0], twins[0])


def layouts():
    base = generator(3)
    image = torch.randn(4, 6, 5, 3, generator=base)
    return {
        "transposed": torch.randn(8, 5, generator=base).t(),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "column slice": torch.randn(9, 10, generator=base)[:, ::2],
        "transposed slice": torch.randn(9, 10, generator=base)[:, :7].t(),
        "offset": torch.randn(50, generator=base)[7:30],
    }


@pytest.mark.parametrize("grad_like", ["parameter", "contiguous", "expanded"])
@pytest.mark.parametrize("layout", layouts())
def test_memory_layouts(layout, grad_like):
    """Any strides of parameter and gradient give the result of the contiguous ones, and nothing
    beside the parameter is written."""
    p = torch.nn.Parameter(layouts()[layout])
    storage = p.data.untyped_storage()
    everything = torch.empty(0).set_(storage).clone()
    twin = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    opt, reference = Lion([p], **OPTIONS), Lion([twin], **OPTIONS)
    for step in range(3):
        g = torch.randn(p.shape, generator=generator(step))
        if grad_like == "expanded":
            g = g[:1].expand(p.shape)
        twin.grad = g.clone(memory_format=torch.contiguous_format)
        p.grad = torch.empty_like(p).copy_(g) if grad_like == "parameter" else g
        before = p.grad.clone()
        opt.step()
        reference.step()
        assert torch.equal(p.grad, before)
    assert torch.equal(p, twin)
    assert p.data.untyped_storage().data_ptr() == storage.data_ptr()
    inside = torch.zeros_like(everything)
    inside.as_strided(p.size(), p.stride(), p.storage_offset()).fill_(1.0)
    outside = inside == 0
    assert torch.equal(torch.empty(0).set_(storage)[outside], everything[outside])


def test_the_memory_format_may_change_between_steps():
    p = torch.nn.Parameter(torch.randn(4, 6, 5, 3, generator=generator(1)))
    twin = torch.nn.Parameter(p.detach().clone())
    opt, reference = Lion([p], **OPTIONS), Lion([twin], **OPTIONS)
    for step in range(4):
        if step == 2:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        g = torch.randn(p.shape, generator=generator(step))
        p.grad, twin.grad = torch.empty_like(p).copy_(g), g
        opt.step()
        reference.step()
    assert torch.equal(p, twin)


def test_complex_parameters_are_pairs_of_reals():
    gen = generator(1)
    real = torch.nn.Parameter(torch.randn(20, 2, generator=gen))
    p = torch.nn.Parameter(torch.view_as_complex(real.detach().clone()))
    opt, reference = Lion([p], **OPTIONS), Lion([real], **OPTIONS)
    for _ in range(3):
        real.grad = torch.randn(20, 2, generator=gen)
        p.grad = torch.view_as_complex(real.grad.clone())
        opt.step()
        reference.step()
    assert torch.equal(torch.view_as_real(p.detach()), real)
    p.grad = p.grad.conj()  # a lazy view: its memory holds the unconjugated values
    real.grad = torch.view_as_real(p.grad.resolve_conj()).clone()
    opt.step()
    reference.step()
    assert torch.equal(torch.view_as_real(p.detach()), real)
    with pytest.raises(ValueError, match="momentum_dtype must be None for complex"):
        Lion([p], momentum_dtype="float32").step()


@pytest.mark.parametrize("given", [torch.float32, "float32"])
def test_momentum_dtype(given):
    p = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    opt = Lion([p], **OPTIONS, momentum_dtype=given)
    p.grad = torch.full((10,), 0.37, dtype=torch.bfloat16)
    opt.step()
    m = opt.state[p]["exp_avg"]
    assert m.dtype == torch.float32
    expected = np.float32(oracle.interpolate(0.0, array(p.grad), 0.95))
    np.testing.assert_allclose(array(m), expected, rtol=2**-23)
    assert Lion([p]).defaults["momentum_dtype"] is None


def test_a_step_allocates_nothing_of_parameter_size():
    p = torch.nn.Parameter(torch.randn(1_000_000))
    opt = Lion([p], **OPTIONS)
    p.grad = torch.randn_like(p)
    opt.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < 1000


def test_a_default_device_is_no_concern():
    (p,), (q,) = parameters((20,)), parameters((20,))
    opts = [Lion([t], lr=0.1, weight_decay=0.1, independent_weight_decay=True) for t in (p, q)]
    for opt, t in zip(opts, (p, q), strict=True):
        t.grad = torch.ones(20)
        if t is q:
            with torch.device("meta"):
                opt.step()
        else:
            opt.step()
    assert bits_equal(p.detach(), q.detach())
