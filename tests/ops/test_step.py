"""The fused pass of one device, lion_step, on every back end, against the oracle."""

import numpy as np
import pytest
import torch

import backends
import oracle
from common import (
    SIZES,
    STORAGE_DTYPES,
    array,
    bits_equal,
    exact,
    generator,
    lr_of,
    no_counts,
    stored,
)

LR, WD = 3e-3, 0.7


def run(backend, params, grads, exp_avgs, betas=(0.5, 0.75), maximize=False, nonfinite=None, **amp):
    backend.lion_step(params, grads, exp_avgs, lr_of(LR), *betas, WD, maximize, nonfinite, **amp)


def want(p, g, m, betas=(0.5, 0.75), maximize=False):
    c = oracle.interpolate(array(m), array(g), betas[0], maximize)
    new_p = oracle.update(array(p), np.sign(c), LR, WD)
    new_m = oracle.interpolate(array(m), array(g), betas[1], maximize)
    return stored(new_p, p.dtype), stored(new_m, m.dtype)


def check_exact(backend, params, grads, exp_avgs, **kwargs):
    expected = [want(*row, **kwargs) for row in zip(params, grads, exp_avgs, strict=True)]
    run(backend, params, grads, exp_avgs, **kwargs)
    for p, m, (new_p, new_m) in zip(params, exp_avgs, expected, strict=True):
        np.testing.assert_array_equal(array(p), new_p)
        np.testing.assert_array_equal(array(m), new_m)


@pytest.mark.parametrize("n", SIZES)
def test_bit_exact_on_exact_inputs(backend, n):
    gen = generator(n)
    check_exact(backend, [torch.randn(n, generator=gen)], [exact(n, gen)], [exact(n, gen)])


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_a_zero_keeps_its_sign(backend, dtype):
    """-0 * decay - lr * 0 is -0: a negation that subtracts from 0 would make it +0."""
    p = torch.tensor([-0.0, 0.0] * 600, dtype=dtype)
    g, m = torch.zeros(1200, dtype=dtype), torch.zeros(1200)
    before = p.clone()
    run(backend, [p], [g], [m])
    assert bits_equal(p, before)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("m_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("p_dtype", STORAGE_DTYPES)
def test_dtypes_in_one_list(backend, p_dtype, m_dtype, maximize):
    gen = generator(1)
    numels = (1000, 0, 33, 1)
    params = [torch.randn(n, generator=gen).to(p_dtype) for n in numels]
    grads = [exact(n, gen, p_dtype) for n in numels]
    exp_avgs = [exact(n, gen, m_dtype) for n in numels]
    params.append(torch.randn(50, generator=gen))
    grads.append(exact(50, gen))
    exp_avgs.append(exact(50, gen))
    check_exact(backend, params, grads, exp_avgs, maximize=maximize)


def test_no_element_differs_on_random_floats(backend):
    """fp32: equal to float64 rounded once, but where the exact |c| is a few ulp from 0; the error
    of the momentum is at most twice that of plain PyTorch."""
    gen = generator(2)
    p, g, m = (torch.randn(200_000, generator=gen) for _ in range(3))
    c = oracle.interpolate(array(m), array(g), 0.9)
    far = np.abs(c) > 4 * 2.0**-24 * (0.9 * np.abs(array(m)) + 0.1 * np.abs(array(g)))
    plain = m.clone().mul_(0.99).add_(g, alpha=1 - 0.99)
    exact_m = oracle.interpolate(array(m), array(g), 0.99)
    new_p, _ = want(p, g, m, betas=(0.9, 0.99))
    run(backend, [p], [g], [m], betas=(0.9, 0.99))
    np.testing.assert_array_equal(array(p)[far], new_p[far])
    assert far.mean() > 0.999
    error, plain_error = np.abs(array(m) - exact_m).sum(), np.abs(array(plain) - exact_m).sum()
    assert error <= 2 * plain_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_ulp_a_step_in_half_precision(backend, dtype):
    """Random floats: within one ulp of the exact value of the paper's formula."""
    gen = generator(5)
    p, g, m = (torch.randn(100_000, generator=gen).to(dtype) for _ in range(3))
    c = oracle.interpolate(array(m), array(g), 0.9)
    far = np.abs(c) > 4 * 2.0**-24 * (0.9 * np.abs(array(m)) + 0.1 * np.abs(array(g)))
    exact_p = array(p) * (1 - LR * WD) - LR * np.sign(c)
    run(backend, [p], [g], [m], betas=(0.9, 0.99))
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(exact_p), info.smallest_normal)))
    ulp = info.eps * 2.0**exponent
    assert (np.abs(array(p) - exact_p) <= ulp)[far].all()
    assert far.mean() > 0.99


def test_nan_shows_in_the_parameter(backend):
    p, g, m = torch.ones(70), torch.ones(70), torch.ones(70)
    g[[0, 33, 69]] = torch.nan
    g[5], g[6] = torch.inf, -torch.inf
    run(backend, [p], [g], [m])
    assert p.isnan().nonzero().flatten().tolist() == [0, 33, 69]
    assert p[5] == p[7] and p[6] > p[5]  # infinities have a sign


def test_skip_leaves_weight_and_momentum(backend):
    gen = generator(3)
    p, g, m = torch.randn(1000, generator=gen), exact(1000, gen), exact(1000, gen)
    g[3], g[500], m[999] = torch.nan, torch.inf, torch.nan
    before_p, before_m, counts = p.clone(), m.clone(), no_counts()
    new_p, new_m = want(p, g, m)
    run(backend, [p], [g], [m], nonfinite=counts)
    skipped = [3, 500, 999]
    kept = np.setdiff1d(np.arange(1000), skipped)
    assert counts.item() == 3
    assert bits_equal(p[skipped], before_p[skipped])
    assert bits_equal(m[skipped], before_m[skipped])
    np.testing.assert_array_equal(array(p)[kept], new_p[kept])
    np.testing.assert_array_equal(array(m)[kept], new_m[kept])


@pytest.mark.parametrize("scale", [2.0**16, 3.0])
def test_grad_scale_divides_the_gradients(backend, scale):
    """By a power of two: the bits of a step on unscaled gradients. By 3, (1 - beta) / 3 is rounded:
    a c of exactly 0 may turn out a little off."""
    gen = generator(6)
    p, g, m = torch.randn(1000, generator=gen), exact(1000, gen), exact(1000, gen)
    expected = want(p, g, m)
    scaled, before, before_m = g * scale, g * scale, m.clone()
    run(backend, [p], [scaled], [m], grad_scale=torch.tensor(scale), found_inf=torch.zeros(1))
    assert bits_equal(scaled, before)
    if scale == 3.0:
        sure = oracle.interpolate(array(before_m), array(g), 0.5) != 0
        np.testing.assert_array_equal(array(p)[sure], expected[0][sure])
        np.testing.assert_allclose(array(m), expected[1], rtol=2**-22, atol=2**-18)
    else:
        np.testing.assert_array_equal(array(p), expected[0])
        np.testing.assert_array_equal(array(m), expected[1])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("cautious", "cautious_decay"), [(True, False), (False, True), (True, True)]
)
def test_cautious(backend, cautious, cautious_decay, maximize):
    """From the papers: u = sign(c) where that is sign(g), else 0; decay only where u * p >= 0."""
    gen = generator(8)
    p, g, m = torch.randn(3000, generator=gen), exact(3000, gen), exact(3000, gen)
    p[:200] = 0.0
    c = oracle.interpolate(array(m), array(g), 0.5, maximize)
    u = np.sign(c)
    if cautious:
        u = np.where(u == np.sign(array(g)) * (-1 if maximize else 1), u, 0)
        assert 0.1 < (u == 0).mean() < 0.9
    expected = oracle.update(array(p), u, LR, WD)
    if cautious_decay:
        kept = oracle.update(array(p), u, LR, 0.0)
        expected = np.where(u * array(p) < 0, kept, expected)
    new_m = oracle.interpolate(array(m), array(g), 0.75, maximize)
    run(backend, [p], [g], [m], maximize=maximize, cautious=cautious, cautious_decay=cautious_decay)
    np.testing.assert_array_equal(array(p), expected)
    np.testing.assert_array_equal(array(m), stored(new_m, torch.float32))


def rescaled(params, grads, exp_avgs, maximize=False):
    """The paper's cautious update, d / (n + 1) times as long, of each tensor."""
    out, counts = [], []
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        u = np.sign(oracle.interpolate(array(m), array(g), 0.5, maximize))
        u = np.where(u == np.sign(array(g)) * (-1 if maximize else 1), u, 0)
        counts.append(int(np.abs(u).sum()))
        lr = np.float32(LR) * np.float32(np.float32(p.numel()) / np.float32(counts[-1] + 1))
        decay = oracle.f32(1 - LR * WD)
        step = np.float32(lr) * np.float32(u)
        out.append(stored((array(p) * decay - np.float64(step)).astype(np.float32), p.dtype))
    return out, counts


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("m_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_rescaled_cautious(backend, dtype, m_dtype, maximize):
    gen = generator(10)
    numels = (3000, 1, 0, 8193, 40)
    params = [torch.randn(n, generator=gen).to(dtype) for n in numels]
    grads = [exact(n, gen, dtype) for n in numels]
    exp_avgs = [exact(n, gen, m_dtype) for n in numels]
    grads[4].zero_()  # no element agrees
    expected, counts = rescaled(params, grads, exp_avgs, maximize)
    momenta = [m.clone() for m in exp_avgs]
    agreeing = torch.full((5,), 2, dtype=torch.int64)  # counts are added
    backend.count_agreeing(grads, exp_avgs, agreeing, 0.5, maximize)
    assert (agreeing - 2).tolist() == counts and 0 < counts[0] < 3000 and counts[4] == 0
    assert all(bits_equal(a, b) for a, b in zip(exp_avgs, momenta, strict=True))
    run(backend, params, grads, exp_avgs, maximize=maximize, cautious=True, agreeing=agreeing - 2)
    for p, want_p in zip(params, expected, strict=True):
        np.testing.assert_array_equal(array(p), want_p)


def test_not_finite_does_not_agree(backend):
    g, m, counts = torch.ones(70), torch.ones(70), torch.zeros(1, dtype=torch.int64)
    g[3], m[40] = torch.nan, torch.nan
    backend.count_agreeing([g], [m], counts, 0.9, False, torch.tensor([2.0]))
    assert counts.item() == 68


def test_cautious_and_not_finite(backend):
    p, g, m = torch.ones(6), torch.ones(6), torch.ones(6)
    g[0], g[1], g[2], m[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    run(backend, [p], [g], [m], cautious=True, cautious_decay=True)
    assert p.isnan().nonzero().flatten().tolist() == [0, 3]
    assert p[1] == p[4] and p[2] > 1.0
    q, counts = torch.ones(6), no_counts()
    run(backend, [q], [g], [torch.ones(6)], nonfinite=counts, cautious=True)
    assert counts.item() == 3 and (q[:3] == 1.0).all() and (q[3:] < 1.0).all()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_found_inf_changes_nothing(backend, dtype):
    gen = generator(7)
    p, g, m = (torch.randn(100, generator=gen).to(dtype) for _ in range(3))
    before, counts = (p.clone(), m.clone()), no_counts()
    g[7] = torch.inf
    run(backend, [p], [g], [m], nonfinite=counts, found_inf=torch.ones(1))
    assert bits_equal(p, before[0]) and bits_equal(m, before[1]) and counts.item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("m_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_every_kernel_gives_the_same_bits(dtype, m_dtype):
    """Random floats of every magnitude, subnormals, infinities and NaN, with every rounding."""
    gen = generator(4)
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 50_000), generator=gen).to(torch.int32)
    if dtype.itemsize == 2:
        p, g = (x.to(torch.int16).view(dtype) for x in bits[:2])
    else:
        p, g = bits[0].view(dtype), bits[1].view(dtype)
    m = bits[2].view(torch.float32).to(m_dtype)
    g = torch.where(torch.rand(50_000, generator=gen) < 0.5, g, m.to(dtype))
    results = []
    for name in backends.BACKENDS[1:]:
        backend, restore = backends.select(name)
        new_p, new_m = p.clone(), m.clone()
        run(backend, [new_p], [g], [new_m], betas=(0.9, 0.99))
        restore()
        results.append((new_p, new_m))
    for new_p, new_m in results[1:]:
        for mine, first in ((new_p, results[0][0]), (new_m, results[0][1])):
            nan = first.isnan()
            assert torch.equal(mine.isnan(), nan)
            assert bits_equal(mine[~nan], first[~nan])
