"""Rounding of 16-bit parameters: the bits on every back end, and what it is for."""

import copy
import io
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from common import array, bits_equal, blank_bits, exact, generator, lr_of, step_of, trailers_of
from lion_kernels import DistributedLion, Lion, reference
from lion_kernels.layout import BallotLayout, blank_words

HALVES = (torch.bfloat16, torch.float16)
LOW = {torch.bfloat16: torch.int16, torch.float16: torch.float16}
SEED, STEP, LR, WD = 7, 5, 3e-3, 0.7
TEXTS = ("argparse.py", "ast.py", "inspect.py", "typing.py", "tarfile.py", "subprocess.py")


def inputs(n, dtype, seed=0):
    """Parameters of every magnitude, exact gradients and momenta."""
    gen = generator(seed)
    p = torch.randn(n, generator=gen) * 10.0 ** torch.randint(-7, 4, (n,), generator=gen)
    return p.to(dtype), exact(n, gen, dtype), exact(n, gen)


def next_float32(p, g, m):
    c = oracle.interpolate(array(m), array(g), 0.5)
    return oracle.update(p, np.sign(c), LR, WD)


def step(backend, params, grads, exp_avgs, rounding, lows=None):
    counter = step_of(STEP)
    backend.lion_step(
        params, grads, exp_avgs, lr_of(LR), 0.5, 0.75, WD, False, None, None, None,
        rounding, lows, SEED, counter,
    )  # fmt: skip
    assert counter.item() == STEP + 1


@pytest.mark.parametrize("n", [1, 31, 33, 513, 5000])
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_step_is_the_oracles(backend, dtype, n):
    """Bit-exact on exact inputs, and by an element's place in the list."""
    first, (p, g, m) = inputs(40, dtype, 1), inputs(n, dtype)
    wanted = next_float32(array(p), g, m)
    random = oracle.random16(SEED, STEP, oracle.room(40), n)
    bits, lowest = (8, 0.0) if dtype == torch.bfloat16 else (11, 2.0**-24)
    step(backend, [first[0], p], [first[1], g], [first[2], m], "stochastic")
    np.testing.assert_array_equal(array(p), oracle.round_at_random(wanted, random, bits, lowest))


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_unbiased(dtype):
    """Between neighbours, in every binade: the mean of 64,000 is the value, within 4 sigma."""
    for value in (1.0 + 2.0**-9, 0.3, -3.3e-5, 7.0e-6, 1.1e-7 if dtype == torch.float16 else 1e-20):
        x = torch.full((64_000,), value)
        random = reference.random_bits(0, 0, 0, 2000)
        rounded = reference.round_at_random(x, random, dtype).double()
        gap = (rounded.max() - rounded.min()).item()
        assert abs(rounded.mean().item() - x[0].item()) <= 4 * 0.5 * gap / 64_000**0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_not_finite_stays(backend, dtype):
    p = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).to(dtype)
    for rounding in ("stochastic", "compensated"):
        q, g, m = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        low = torch.zeros(4, dtype=LOW[dtype])
        step(backend, [q], [g], [m], rounding, [low] if rounding == "compensated" else None)
        assert q[0].isnan() and q[1] == torch.inf and q[2] == -torch.inf
        assert (low[:3] == 0).all()


@pytest.mark.parametrize("n", [1, 33, 5000])
def test_compensated_bfloat16_is_a_float32(backend, n):
    """The pair moves as a float32 parameter, bit for bit; the visible half is its rounding."""
    _, g, m = inputs(n, torch.bfloat16)
    whole = torch.randn(n, generator=generator(3)) * 10.0 ** torch.randint(
        -7, 4, (n,), generator=generator(4)
    )
    bits = whole.view(torch.int32)
    kept = (bits + 0x8000) & ~0xFFFF
    p, low = kept.view(torch.float32).to(torch.bfloat16), (bits - kept).to(torch.int16)
    wanted = next_float32(array(whole), g, m)
    step(backend, [p], [g], [m], "compensated", [low])
    pair = (p.float().view(torch.int32) + low.int()).view(torch.float32)
    np.testing.assert_array_equal(pair.numpy(), wanted)
    unit = 2.0 ** (np.floor(np.log2(np.abs(wanted))) - 7)
    assert (np.abs(array(p) - wanted) <= unit / 2 * (1 + 2.0**-8)).all()


@pytest.mark.parametrize("first_word", [0, 24])
@pytest.mark.parametrize(("planes", "scale"), [(1, 1), (2, 2), (2, 3), (4, 8)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_apply_is_the_references(backend, rounding, dtype, planes, scale, first_word):
    """Random bits are of an element's place among the parameters, wherever their verdict lies."""
    gen = generator(planes)
    numels = (700, 33, 5000)
    layout = BallotLayout((32 * first_word, *numels), planes, 3)
    v = torch.randint(0, scale + 1, (3, 32 * layout.words_per_shard), generator=gen)
    is_blank = torch.randint(0, 2, (3, layout.words_per_shard), generator=gen).numpy()
    blanks = blank_bits(is_blank, blank_words(layout.words_per_shard)) if scale % 2 else None
    trailers, verdict = trailers_of([True, False, True]), reference.pack(v, planes)
    results = []
    for of in (backend, reference):
        params = [inputs(n, dtype)[0] for n in numels]
        lows = [torch.arange(n).to(LOW[dtype]) for n in numels]
        counter = step_of(STEP)
        of.apply(
            params, verdict, blanks, trailers, scale, lr_of(LR), WD, counter, rounding=rounding,
            lows=lows if rounding == "compensated" else None, seed=SEED, first_word=first_word,
        )  # fmt: skip
        assert counter.item() == STEP + 1
        results.append([*params, *lows])
    assert all(bits_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("first_word", [0, 24])
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_apply_is_the_oracles(backend, dtype, first_word):
    """Bit-exact, and by an element's place in the list."""
    numels = (40, 3000)
    params = [inputs(n, dtype, n)[0] for n in numels]
    n_words = first_word + sum(oracle.room(n) for n in numels) // 32
    v = torch.randint(0, 2, (1, 32 * n_words), generator=generator(1))
    ups, bits = 2 * v[0, 32 * first_word :].numpy() - 1, (8, 0.0)
    if dtype == torch.float16:
        bits = (11, 2.0**-24)
    wanted, first = [], 0
    for p, n in zip(params, numels, strict=True):
        whole = oracle.update(array(p), ups[first : first + n], LR, WD)
        wanted.append(oracle.round_at_random(whole, oracle.random16(SEED, STEP, first, n), *bits))
        first += oracle.room(n)
    backend.apply(
        params, reference.pack(v, 1), None, trailers_of([True, True]), 1, lr_of(LR), WD,
        step_of(STEP), rounding="stochastic", seed=SEED, first_word=first_word,
    )  # fmt: skip
    for p, want in zip(params, wanted, strict=True):
        np.testing.assert_array_equal(array(p), want)


def bf16_weight(value, n=4096):
    return torch.nn.Parameter(torch.full((n,), value, dtype=torch.bfloat16))


def train(p, rounding, steps, grad, **options):
    opt = Lion([p], lr=1e-4, rounding=rounding, momentum_dtype=torch.float32, **options)
    p.grad = torch.full_like(p, grad)
    for _ in range(steps):
        opt.step()
    return opt.float32_parameter(p).double().mean().item()


def test_weight_decay_acts_in_bfloat16():
    """lr 1e-4, weight_decay 1.0, 1000 steps, no gradient: exact 0.905. To nearest, nothing."""
    assert train(bf16_weight(1.0), "nearest", 1000, 0.0, weight_decay=1.0) == 1.0
    for rounding in ("stochastic", "compensated"):
        shrunk = train(bf16_weight(1.0), rounding, 1000, 0.0, weight_decay=1.0)
        assert abs(shrunk - 0.9048) < 0.01 * 0.9048


@pytest.mark.parametrize("value", [0.05, 0.5, 2.0])
def test_weights_move_at_the_mean_rate(value):
    """100 steps of 1e-4 are 0.01. To nearest, nothing moves."""
    start = bf16_weight(value)[0].item()
    assert train(bf16_weight(value), "nearest", 100, 1.0) == start
    moved = start - train(bf16_weight(value), "compensated", 100, 1.0)
    assert abs(moved - 0.01) <= 100 * value * 2.0**-24  # float32 rounds each step
    moved = start - train(bf16_weight(value, 65536), "stochastic", 100, 1.0)
    unit = 2.0 ** (np.floor(np.log2(start)) - 7)
    assert abs(moved - 0.01) < 4 * (100 * 1e-4 * unit) ** 0.5 / 65536**0.5


def test_compensated_lion_takes_the_path_of_float32():
    gen = generator(0)
    p = torch.nn.Parameter(torch.randn(50, 20, generator=gen).to(torch.bfloat16))
    whole = torch.nn.Parameter(p.detach().float())
    options = {"lr": 1e-3, "weight_decay": 0.3, "momentum_dtype": torch.float32}
    opt, twin = Lion([p], rounding="compensated", **options), Lion([whole], **options)
    for _ in range(50):
        p.grad = torch.randn(50, 20, generator=gen).to(torch.bfloat16)
        whole.grad = p.grad.float()
        opt.step()
        twin.step()
    assert bits_equal(opt.float32_parameter(p), whole.detach())


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_resume_is_bit_exact(rounding):
    def run(steps, resume_at=None):
        params = [inputs(n, torch.bfloat16, n)[0].requires_grad_() for n in (100, 7)]
        opt = Lion(params, lr=1e-3, weight_decay=0.3, rounding=rounding, seed=3)
        for i in range(steps):
            if i == resume_at:
                file = io.BytesIO()
                torch.save(opt.state_dict(), file)
                file.seek(0)
                opt = Lion(params, lr=1.0, rounding=rounding, seed=3)
                opt.load_state_dict(torch.load(file))
            for p in params:
                p.grad = inputs(p.numel(), torch.bfloat16, i)[1]
            opt.step()
        states = [opt.state[p][key] for p in params for key in opt.state[p]]
        return [p.detach() for p in params] + states

    assert all(bits_equal(a, b) for a, b in zip(run(6), run(6, resume_at=3), strict=True))


def test_copies_carry_the_rounding():
    p = bf16_weight(1.0, 10)
    opt = Lion([p], rounding="compensated", lr=1e-4, seed=5)
    p.grad = torch.ones_like(p)
    opt.step()
    twin = copy.deepcopy(opt)
    (q,) = twin.param_groups[0]["params"]
    assert twin.seed == 5 and bits_equal(twin.float32_parameter(q), opt.float32_parameter(p))


def language_model_loss(dtype, rounding, steps=200):
    """Mean loss of the last 50 steps of a byte model of 100,000 weights on real text, all of it in
    ``dtype`` but for the momentum."""
    text = b"".join((Path(sysconfig.get_paths()["stdlib"]) / f).read_bytes() for f in TEXTS)
    data = torch.tensor(list(text)).clamp(max=127)
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(128, 32), torch.nn.Flatten(), torch.nn.Linear(256, 256)]
    layers += [torch.nn.GELU(), torch.nn.Linear(256, 128)]
    model = torch.nn.Sequential(*layers).to(dtype)
    options = {"lr": 1e-4, "weight_decay": 0.1, "momentum_dtype": torch.float32}
    opt = Lion(model.parameters(), rounding=rounding, **options)
    gen, losses = generator(1), []
    for _ in range(steps):
        at = torch.randint(0, len(data) - 9, (128, 1), generator=gen)
        window = data[at + torch.arange(9)]
        loss = torch.nn.functional.cross_entropy(model(window[:, :8]).float(), window[:, 8])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_a_language_model_in_pure_bfloat16():
    """Within 1 % of the float32 loss with either repair; not to nearest."""
    whole = language_model_loss(torch.float32, "nearest")
    assert language_model_loss(torch.bfloat16, "nearest") > 1.01 * whole
    for rounding in ("stochastic", "compensated"):
        assert abs(language_model_loss(torch.bfloat16, rounding) - whole) < 0.01 * whole


def vote(rank, rounding, dtype):
    gen = generator(0)
    params = [torch.randn(n, generator=gen).to(dtype).requires_grad_() for n in (500, 33)]
    opt = DistributedLion(params, lr=1e-3, weight_decay=0.5, rounding=rounding, seed=2)
    gen = generator(rank)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(dtype)
        opt.step()
    opt.verify_replicas()
    return [opt.float32_parameter(p) for p in params]


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_replicas_stay_bit_identical(worlds, rounding, dtype, n):
    first, *others = worlds(n).run(vote, rounding, dtype)
    for other in others:
        assert all(bits_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("up", None, 0, step_of(0)), "rounding must be nearest, stochastic or compensated"),
        (("stochastic", None, 0, None), "stochastic rounding needs step"),
        (("compensated", None, 0, step_of(0)), "lows must have 1 tensors, got 0"),
        (("compensated", [torch.zeros(3)], 0, step_of(0)), r"lows\[0\] must be"),
        (("nearest", [torch.zeros(3)], 0, step_of(0)), "lows must have 0 tensors, got 1"),
    ],
)
def test_bad_arguments(backend, args, message):
    p, g, m = (torch.zeros(3, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        backend.lion_step([p], [g], [m], lr_of(0.1), 0.9, 0.99, 0.0, False, None, None, None, *args)


def test_bad_options():
    with pytest.raises(
        ValueError, match="rounding must be 'nearest', 'stochastic' or 'compensated', got 'up'"
    ):
        Lion([bf16_weight(1.0)], rounding="up")
