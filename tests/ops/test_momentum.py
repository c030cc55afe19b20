"""int8 momenta: the bits on every back end, against the oracle; states of every kind."""

import copy
import io

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import backends
import oracle
from common import (
    STORAGE_DTYPES,
    bits_equal,
    exact,
    generator,
    lr_of,
    no_counts,
    step_of,
    words,
)
from lion_kernels import Lion, reference
from lion_kernels.int8 import dequantize, quantize
from lion_kernels.kernels import momentum as momentum_kernels
from lion_kernels.layout import BallotLayout

# Around a word, a block, the CPU's chunk and the GPU's tiles.
SIZES = (0, 1, 33, 127, 128, 129, 511, 513, 2048, 2049, 70_001)  # the last: two threads
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "momentum_dtype": "int8"}


def quantized(m):
    q, block_scales = oracle.quantize(m.numpy())
    return torch.from_numpy(q), torch.from_numpy(block_scales)


def momentum(n, gen):
    """Of many magnitudes, with a block of zeros, as stored."""
    m = torch.randn(n, generator=gen) * 10.0 ** torch.randint(-4, 2, (n,), generator=gen)
    m[128:256] = 0.0
    return quantized(m)


def twin(q, block_scales):
    """The float32 momentum that an int8 one stands for."""
    return torch.from_numpy(oracle.dequantize(q.numpy(), block_scales.numpy()))


def same(a, b):
    """Equal bits, or both NaN."""
    return torch.equal(a.isnan(), b.isnan()) and bits_equal(a[~a.isnan()], b[~b.isnan()])


def check(q, block_scales, m):
    """(q, scales) is what the oracle makes of the float32 momentum m."""
    want = quantized(m)
    assert torch.equal(q, want[0]) and bits_equal(block_scales, want[1])


@pytest.mark.parametrize("p_dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_step(backend, n, p_dtype):
    """The step of a float32 momentum, which is then stored: parameter and momentum bit for bit."""
    gen = generator(n)
    (q0, s0), (q, block_scales) = momentum(70, gen), momentum(n, gen)
    p, g = (torch.randn(n, generator=gen).to(p_dtype) for _ in range(2))
    p0, g0 = (torch.randn(70, generator=gen) for _ in range(2))
    expected_p, m, m0 = p.clone(), twin(q, block_scales), twin(q0, s0)
    rest = (lr_of(1e-3), 0.9, 0.99, 0.1, False)
    backend.lion_step([p0.clone(), expected_p], [g0, g], [m0, m], *rest)
    backend.lion_step([p0, p], [g0, g], [q0, q], *rest, block_scales=[s0, block_scales])
    assert bits_equal(p, expected_p)
    check(q, block_scales, m)
    check(q0, s0, m0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("options", [{}, {"cautious": True, "cautious_decay": True}])
def test_not_finite(backend, options, skip):
    """A NaN or an infinity costs its block no precision; skipped, the momentum is stored again."""
    gen = generator(1)
    q, block_scales = momentum(1000, gen)
    p, g = torch.randn(1000, generator=gen), torch.randn(1000, generator=gen)
    g[3], g[200], g[300], g[999] = torch.nan, torch.inf, -torch.inf, torch.nan
    q[301] = -128  # not finite before
    expected_p, m, counts, wanted = p.clone(), twin(q, block_scales), no_counts(), no_counts()
    assert m[301].isnan()
    rest = (lr_of(1e-3), 0.9, 0.99, 0.1, False)
    backend.lion_step([expected_p], [g], [m], *rest, wanted if skip else None, **options)
    backend.lion_step(
        [p], [g], [q], *rest, counts if skip else None, block_scales=[block_scales], **options
    )
    assert same(p, expected_p)
    check(q, block_scales, m)
    bad = (q == -128).nonzero().flatten().tolist()
    assert bad == ([301] if skip else [3, 200, 300, 301, 999])
    assert counts.item() == wanted.item() == (5 if skip else 0)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 17])
def test_encode(backend, shards, planes):
    """Shards cut blocks in two: the ballots and momenta of float32, which is then stored."""
    gen = generator(shards)
    numels = (33, 0, 5000, 1, 700, 129)
    grads = [torch.randn(n, generator=gen).to(STORAGE_DTYPES[i % 3]) for i, n in enumerate(numels)]
    grads[2][77], grads[2][128:160], grads[5] = torch.nan, 0.0, None  # momenta of zero are there
    stored = [momentum(n, gen) for n in numels]
    momenta = [twin(q, block_scales) for q, block_scales in stored]
    before = [q.clone() for q, _ in stored]
    layout, sent = BallotLayout((500, *numels), planes, shards), []
    for int8 in (False, True):
        chunks, counts = (
            torch.full((shards, layout.chunk_words), -1, dtype=torch.int32),
            no_counts(),
        )
        backend.encode(
            grads, [q for q, _ in stored] if int8 else momenta, layout.planes_of(chunks),
            layout.blanks_of(chunks), 0.9, 0.99, False, 11, 3, step_of(5), counts, None, None,
            shards == 3, [block_scales for _, block_scales in stored] if int8 else None,
            first_word=16,
        )  # fmt: skip
        assert counts.item() == 1
        sent.append(words(chunks))
    np.testing.assert_array_equal(*sent)
    for i, ((q, block_scales), m) in enumerate(zip(stored, momenta, strict=True)):
        check(q, block_scales, m)
        assert torch.equal(q, before[i]) == (grads[i] is None or numels[i] < 2)


def test_counting_those_that_agree(backend):
    """A pass that reads int8 momenta and leaves them."""
    gen = generator(12)
    numels = (33, 5000, 129)
    stored, grads = (
        [momentum(n, gen) for n in numels],
        [torch.randn(n, generator=gen) for n in numels],
    )
    before, counts = [q.clone() for q, _ in stored], torch.zeros(2, 3, dtype=torch.int64)
    block_scales = [scale for _, scale in stored]
    backend.count_agreeing(grads, [twin(*pair) for pair in stored], counts[0], 0.9, False)
    backend.count_agreeing(
        grads, [q for q, _ in stored], counts[1], 0.9, False, block_scales=block_scales
    )
    assert torch.equal(counts[0], counts[1]) and counts.all()
    assert all(torch.equal(q, old) for (q, _), old in zip(stored, before, strict=True))


def test_found_inf_changes_nothing(backend):
    q, block_scales = momentum(300, generator(2))
    before, p = (q.clone(), block_scales.clone()), torch.ones(300)
    backend.lion_step(
        [p], [torch.ones(300)], [q], lr_of(1e-3), 0.9, 0.99, 0.1, False,
        found_inf=torch.ones(1), block_scales=[block_scales],
    )  # fmt: skip
    assert torch.equal(q, before[0]) and bits_equal(block_scales, before[1]) and (p == 1).all()


def test_every_magnitude(backend):
    """Blocks at every exponent of float32, subnormals too."""
    gen = generator(3)
    scale = 2.0 ** torch.arange(-149, 128).double()
    m = (torch.rand(277, 128, generator=gen).double() * scale.unsqueeze(1)).float().flatten()
    q, block_scales = quantized(torch.zeros_like(m))
    p = torch.zeros_like(m)
    rest = (lr_of(0.0), 0.0, 0.0, 0.0, False)  # the next momentum is the gradient
    backend.lion_step([p], [m], [q], *rest, block_scales=[block_scales])
    check(q, block_scales, m)
    near = (twin(q, block_scales) - m).abs().view(277, 128) / block_scales.unsqueeze(1)
    assert (near[30:] <= (127**2 - 126.5**2) / 127**2 * (1 + 1e-6)).all()
    assert torch.equal(dequantize(q, block_scales), twin(q, block_scales))


@triton.jit
def _roots_kernel(x_ptr, reciprocal_ptr, root_ptr, steps_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    root, half = momentum_kernels._roots(tl.load(x_ptr + i), tl.load(reciprocal_ptr + i))
    tl.store(root_ptr + i, root)
    tl.store(steps_ptr + i, momentum_kernels._steps_over(root, half))


@pytest.mark.slow
def test_roots_without_a_slow_path_are_exact():
    """Every significand, with a reciprocal root up to 3 units in the last place off; PTX allows
    rsqrt.approx 2.1."""
    device = "cuda" if backends.HAS_CUDA else "cpu"
    n = 2**20
    for first in range(0x3F800000, 0x40800000, n):
        x = torch.arange(first, first + n, dtype=torch.int32).view(torch.float32)
        near = x.double().rsqrt().float().view(torch.int32)
        near += torch.randint(-3, 4, (n,), generator=generator(first), dtype=torch.int32)
        args = [t.to(device) for t in (x, near.view(torch.float32), torch.empty(n), torch.empty(n))]
        _roots_kernel[(8,)](*args, N=n // 8, enable_fp_fusion=False)
        root = x.double().sqrt().float()  # 53 bits are enough for one rounding
        assert torch.equal(args[2].cpu(), root)
        assert torch.equal(args[3].cpu(), torch.full_like(root, 127).div(root))


def test_storing_what_was_read_changes_nothing():
    q, block_scales = momentum(5000, generator(4))
    check(q, block_scales, twin(q, block_scales))
    again, same_scales = quantize(dequantize(q, block_scales))
    assert torch.equal(again, q) and bits_equal(same_scales, block_scales)


@pytest.mark.parametrize("exponent", [-60, -20, 20])
def test_tiny_and_huge_gradients_take_the_same_path(exponent):
    """Lion does not know the scale of its gradients; neither do the blocks."""
    params = []
    for scale in (1.0, 2.0**exponent):
        p = torch.nn.Parameter(torch.randn(1000, generator=generator(5)))
        opt = Lion([p], **OPTIONS)
        for i in range(20):
            p.grad = torch.randn(1000, generator=generator(i)) * scale
            opt.step()
        params.append(p.detach())
    assert bits_equal(*params)


def run(momentum_dtype, steps=200):
    """Weights, momenta and state bytes after steps on a noisy quadratic."""
    gen = generator(6)
    p, target = torch.nn.Parameter(torch.zeros(20_000)), torch.randn(20_000, generator=gen)
    opt = Lion([p], **{**OPTIONS, "momentum_dtype": momentum_dtype})
    for _ in range(steps):
        noise = torch.randn(20_000, generator=gen)
        p.grad = (p.detach() - target + noise) * 1e-3
        opt.step()
    state = opt.state[p]
    n_bytes = sum(t.numel() * t.element_size() for t in state.values())
    m = state["exp_avg"] if momentum_dtype != "int8" else dequantize(*state.values())
    return p.detach(), m.float(), n_bytes / p.numel(), target


def test_near_float32_in_1_03_bytes():
    exact_p, exact_m, four, target = run("float32")
    p, m, n_bytes, _ = run("int8")
    assert four == 4 and n_bytes == 1 + 4 * -(-20_000 // 128) / 20_000 < 1.032
    assert (m - exact_m).norm() / exact_m.norm() < 0.15  # 0.10 measured
    loss, exact_loss = ((w - target).square().mean() for w in (p, exact_p))
    assert loss < 1.01 * exact_loss


def train(params, opt, steps, dtype=torch.float32):
    for step in steps:
        for t, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator(100 * step + t)).to(dtype)
            p.grad = g
        opt.step()


def parameters(*shapes, dtype=torch.float32):
    gen = generator(7)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in shapes]


def saved(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_resume_is_bit_exact(rounding):
    shapes, runs = ((300,), (7, 5), (), (0,)), []
    for cut in (False, True):
        params = parameters(*shapes, dtype=torch.bfloat16)
        opt = Lion(params, **OPTIONS, rounding=rounding)
        train(params, opt, range(3), torch.bfloat16)
        if cut:
            state, opt = saved(opt), Lion(params, **OPTIONS, rounding=rounding)
            opt.load_state_dict(state)
        train(params, opt, range(3, 6), torch.bfloat16)
        runs.append([*params, *(t for p in params for t in opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def channels_last(*shape):
    return parameters(shape)[0].detach().contiguous(memory_format=torch.channels_last)


def test_float32_states_load_and_come_out():
    """How momenta are stored is the optimizer's choice, not the state's."""
    p = torch.nn.Parameter(channels_last(4, 6, 5, 7))
    wide = Lion([p], **{**OPTIONS, "momentum_dtype": None})
    train([p], wide, range(3))
    m = wide.state[p]["exp_avg"]
    narrow = Lion([p], **OPTIONS)
    narrow.load_state_dict(saved(wide))
    q = narrow.state[p]["exp_avg"]
    assert q.dtype == torch.int8 and q.stride() == p.stride()
    flat = m.permute(0, 2, 3, 1).flatten()
    check(q.permute(0, 2, 3, 1).flatten(), narrow.state[p]["exp_avg_scale"], flat)
    back = Lion([p], **{**OPTIONS, "momentum_dtype": None})
    back.load_state_dict(saved(narrow))
    stored = twin(q.permute(0, 2, 3, 1).flatten(), narrow.state[p]["exp_avg_scale"])
    assert torch.equal(back.state[p]["exp_avg"].permute(0, 2, 3, 1).flatten(), stored)
    assert set(back.state[p]) == {"exp_avg"}
    exported = narrow.export_state_dict("lion-pytorch")["state"][0]["exp_avg"]
    assert exported.dtype == torch.float32 and torch.equal(exported, back.state[p]["exp_avg"])


def test_the_memory_format_may_change():
    """Blocks are cut anew, as if the float32 values had been stored in the new format."""
    x = channels_last(4, 6, 5, 7)
    p = torch.nn.Parameter(x.contiguous())
    opt = Lion([p], **OPTIONS)
    train([p], opt, range(2))
    m = dequantize(*opt.state[p].values())
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    opt.step()
    want = dequantize(*quantize(m.contiguous(memory_format=torch.channels_last)))
    want = dequantize(*quantize(want * torch.tensor(0.99)))
    got = dequantize(opt.state[p]["exp_avg"], opt.state[p]["exp_avg_scale"])
    assert opt.state[p]["exp_avg"].stride() == p.stride()
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0.0)


def test_a_state_of_another_memory_format_is_cut_anew():
    x = channels_last(4, 6, 5, 7)
    p, q = torch.nn.Parameter(x), torch.nn.Parameter(x.contiguous())
    opt, other = Lion([p], **OPTIONS), Lion([q], **OPTIONS)
    train([p], opt, range(2))
    other.load_state_dict(saved(opt))
    m = dequantize(opt.state[p]["exp_avg"], opt.state[p]["exp_avg_scale"])
    check(other.state[q]["exp_avg"].flatten(), other.state[q]["exp_avg_scale"], m.flatten())


@pytest.mark.parametrize("change", ["shuffled", "missing", "short", "long", "dtype", "infinite"])
def test_scales_of_another_momentum_are_noticed(change):
    params = parameters((1000,))
    opt = Lion(params, **OPTIONS)
    train(params, opt, range(2))
    state = copy.deepcopy(opt.state_dict())
    kept = state["state"][0]
    if change == "shuffled":  # as another memory format would
        kept["exp_avg"] = kept["exp_avg"].view(10, 100).t().flatten()
    elif change == "missing":
        del kept["exp_avg_scale"]
    elif change == "short":
        kept["exp_avg_scale"] = kept["exp_avg_scale"][:3]
    elif change == "long":
        kept["exp_avg_scale"] = kept["exp_avg_scale"].repeat(2)
    elif change == "infinite":
        kept["exp_avg_scale"][1] = torch.inf
    else:
        kept["exp_avg_scale"] = kept["exp_avg_scale"].double()
    before = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(ValueError, match="exp_avg_scale"):
        opt.load_state_dict(state)
    after = opt.state_dict()["state"]
    assert torch.equal(after[0]["exp_avg"], before[0]["exp_avg"])


def test_the_momentum_type_may_change_between_steps():
    (p,) = parameters((300,))
    opt = Lion([p], **OPTIONS)
    train([p], opt, range(2))
    stored_as = {
        "float32": lambda m: m,
        "int8": lambda m: twin(*quantized(m)),
        "bfloat16": lambda m: m.bfloat16().float(),
    }
    for name, stored in stored_as.items():
        before = reference.read_momentum(
            opt.state[p]["exp_avg"], opt.state[p].get("exp_avg_scale")
        ).float()
        opt.param_groups[0]["momentum_dtype"] = name
        p.grad = torch.zeros_like(p)
        opt.step()
        assert opt.state[p]["exp_avg"].dtype == getattr(torch, name)
        after = reference.read_momentum(
            opt.state[p]["exp_avg"], opt.state[p].get("exp_avg_scale")
        ).float()
        assert torch.equal(after, stored(stored(before) * torch.tensor(0.99)))


def test_a_parameter_with_gaps_and_one_in_float32():
    gen = generator(8)
    wide = torch.randn(50, 40, generator=gen)
    gaps, dense = torch.nn.Parameter(wide[:, ::2]), torch.nn.Parameter(wide[:, ::2].clone())
    for p in (gaps, dense):
        opt = Lion([p], **OPTIONS)
        for i in range(3):
            p.grad = torch.randn(50, 20, generator=generator(i))
            opt.step()
    assert torch.equal(gaps, dense)


@pytest.mark.parametrize(
    ("block_scales", "message"),
    [
        (None, "block_scales must have 2 tensors, got 0"),
        ([torch.zeros(8)], "block_scales must have 2 tensors, got 1"),
        (
            [torch.zeros(7), torch.zeros(1)],
            r"block_scales\[0\] must be contiguous float32 of shape \[8\]",
        ),
        ([torch.zeros(8), torch.zeros(1).half()], r"block_scales\[1\] must be contiguous float32"),
        ([torch.zeros(16)[::2], torch.zeros(1)], r"block_scales\[0\] must be contiguous"),
    ],
)
def test_bad_scales(backend, block_scales, message):
    tensors = [torch.ones(1000), torch.ones(3)]
    momenta = [torch.zeros(1000, dtype=torch.int8), torch.zeros(3, dtype=torch.int8)]
    with pytest.raises(ValueError, match=message):
        backend.lion_step(
            tensors, [t.clone() for t in tensors], momenta, lr_of(0.1), 0.9, 0.99, 0.1, False,
            block_scales=block_scales,
        )  # fmt: skip
    assert all((t == 1).all() for t in tensors)


def test_types_of_momentum_in_one_list(backend):
    """A float32 momentum beside an int8 one, whose place among the scales is not read."""
    gen = generator(9)
    q, block_scales = momentum(300, gen)
    m, expected = exact(300, gen), twin(q, block_scales)
    params, grads = [torch.zeros(300) for _ in range(2)], [exact(300, gen) for _ in range(2)]
    rest = (lr_of(0.1), 0.5, 0.75, 0.0, False)
    twins = [[p.clone() for p in params], [m.clone(), expected]]
    backend.lion_step(twins[0], grads, twins[1], *rest)
    backend.lion_step(params, grads, [m, q], *rest, block_scales=[torch.empty(0), block_scales])
    assert all(bits_equal(a, b) for a, b in zip(params, twins[0], strict=True))
    assert bits_equal(m, twins[1][0])
    check(q, block_scales, expected)
