"""What torch.optim's optimizers owe their users and wrappers: versions, frozen tensors, strangers'
state, scaled gradients, what changes under the optimizer's feet."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lion_kernels
from common import bits_equal, generator
from lion_kernels import Lion, ops
from lion_kernels.dense import overlaps

ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def with_gradient(*shape, seed=0, dtype=torch.float32):
    gen = generator(seed)
    p = torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=dtype))
    p.grad = torch.randn(shape, generator=gen, dtype=dtype)
    return p


# Versions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum_dtype": "int8"},
        {"fused_backward": True},
        {"rounding": "compensated"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_raises_versions(dtype, options):
    p = torch.nn.Parameter(torch.ones(40, dtype=dtype))
    opt = Lion([p], **OPTIONS, **options)
    (p * 2).sum().backward()
    opt.step()
    (p * 2).sum().backward()
    before = [t._version for t in (p, *opt.state[p].values())]
    opt.step()
    opt.zero_grad()
    (p * 2).sum().backward()
    opt.step()
    assert all(t._version > v for t, v in zip((p, *opt.state[p].values()), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_backward_over_an_old_graph_raises(fused):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    params = [*first.parameters(), *second.parameters()]
    opt = Lion(params, **OPTIONS, fused_backward=fused)
    out = second(first(torch.randn(5, 3)))
    out.sum().backward(retain_graph=True)
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.pow(2).sum().backward()


def test_every_op_raises_the_versions_of_what_it_writes():
    """From its schema: tensors and lists that are marked as written, and no others."""
    words, trailers = (torch.zeros(1, *n, dtype=torch.int32) for n in ((1, 8), (8,)))
    p, g, m = (torch.ones(32) for _ in range(3))
    lr, step, count = torch.tensor(0.1), torch.zeros(1, dtype=torch.int64), torch.zeros(1).long()
    blanks, out_blanks = (torch.zeros(1, 4, dtype=torch.int32) for _ in range(2))
    out, trailer = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    calls = {
        "lion_step": ([p], [g], [m], lr, 0.9, 0.99, 0.1, False, count),
        "count_agreeing": ([g], [m], count, 0.9, False),
        "encode": (
            [g],
            [m],
            words,
            blanks,
            0.9,
            0.99,
            False,
            0,
            0,
            step,
            count,
            None,
            None,
            False,
            None,
            0,
            trailers,
            trailer,
            count,
        ),
        "tally": (words, out, 1, 0, 0, step, blanks, out_blanks),
        "elect": (words, out, 1, 0, 0, step, blanks, out_blanks),
        "apply": ([p], words, blanks, trailers, 1, lr, 0.1, step),
    }
    assert calls.keys() == ops.SCHEMAS.keys()
    for name, args in calls.items():
        flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        schema = getattr(torch.ops.lion_kernels, name).default._schema.arguments
        written = [
            t
            for spec, a in zip(schema, args, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write
            for t in (a if isinstance(a, list) else [a])
        ]
        before = {id(t): t._version for t in tensors}
        getattr(ops, name)(*args)
        for t in tensors:
            is_written = any(t is w for w in written)
            assert (t._version > before[id(t)]) == is_written, (name, t)


def test_a_step_over_tensors_of_inference_mode():
    """They have no version counter."""
    with torch.inference_mode():
        p, g, m = (torch.ones(32) for _ in range(3))
    ops.lion_step([p], [g], [m], torch.tensor(0.5), 0.9, 0.99, 0.0, False)
    assert torch.equal(p, torch.full((32,), 0.5))


# What has no gradient


FOREIGN = {
    "uint8": lambda: torch.zeros(4, dtype=torch.uint8),
    "int8": lambda: torch.zeros(4, dtype=torch.int8),
    "float8": lambda: torch.zeros(4).to(torch.float8_e4m3fn),
    "bool": lambda: torch.zeros(4, dtype=torch.bool),
    "meta": lambda: torch.zeros(4, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "overlapping": lambda: torch.zeros(4).expand(3, 4),
    "wrapper": lambda: torch.masked.as_masked_tensor(torch.ones(3), torch.ones(3).bool()),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("kind", FOREIGN)
def test_frozen_parameters_of_any_kind(kind):
    """Beside an adapter, as in Lion(model.parameters()) of a quantised model: asked nothing."""
    frozen, adapter = FOREIGN[kind](), with_gradient(4)
    before = adapter.detach().clone()
    opt = Lion([frozen, adapter], lr=0.5, momentum_dtype="int8", rounding="compensated")
    opt.step()
    torch.testing.assert_close(adapter.detach(), before - 0.5 * adapter.grad.sign())
    assert list(opt.state) == [adapter]
    opt.load_state_dict(opt.state_dict())
    opt.step()


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((3, 4), (2, 1), True),
        ((3, 4), (4, 2), True),
        ((3, 4), (8, 2), False),
        ((2, 3), (3, 2), False),  # 0 2 4 and 3 5 7
        ((2, 3), (4, 2), True),  # 0 2 4 and 4 6 8
        ((0, 4), (0, 0), False),
        ((), (), False),
    ],
)
def test_overlaps(shape, strides, expected):
    assert overlaps(torch.zeros(40).as_strided(shape, strides)) is expected


# What changes under its feet


def test_a_changed_parameter_is_named_before_anything_is_written():
    def fresh():
        a, b = with_gradient(3), with_gradient(6, 3)
        opt = Lion([{"params": [("first", a)]}, {"params": [("second", b)]}], **OPTIONS)
        opt.step()
        return a, b, opt, a.detach().clone()

    def refused(opt, a, before, message):
        with pytest.raises(ValueError, match=message):
            opt.step()
        assert torch.equal(a, before)

    named = r"exp_avg of parameter 0 of group 1 \('second'\) must have shape "
    for shape in ((2, 3), (4, 6, 3), (18,)):  # (6, 3) would broadcast into (4, 6, 3)
        a, b, opt, before = fresh()
        b.grad = None
        b.data = torch.ones(shape)
        b.grad = torch.ones(shape)
        refused(opt, a, before, named)
    a, b, opt, before = fresh()
    b.data = b.data.double()
    refused(
        opt, a, before, r"gradient of parameter 0 of group 1 \('second'\) must be torch.float64"
    )
    for value, message in (
        (torch.zeros(3), named),
        ("nothing", named),
        (torch.zeros(6, 3, dtype=torch.int64), "must hold floats, got torch.int64"),
        (torch.zeros(6, 3, dtype=torch.complex64), "must hold floats, got torch.complex64"),
        (torch.zeros(6, 3, dtype=torch.int8), "have a float32 exp_avg_scale of shape"),
    ):
        a, b, opt, before = fresh()
        opt.state[b]["exp_avg"] = value
        refused(opt, a, before, message)


def test_another_dtype_takes_the_momentum_along():
    """model.double() between steps, as torch.optim takes it."""
    p = with_gradient(50)
    opt = Lion([p], **OPTIONS)
    opt.step()
    m = opt.state[p]["exp_avg"].clone()
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float64
    torch.testing.assert_close(opt.state[p]["exp_avg"], m.double() * 0.95, rtol=1e-15, atol=0)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_built_on_meta_and_filled_later(rounding):
    """The optimizer is built before the model has values; nothing that it keeps stays behind."""
    p = torch.nn.Parameter(torch.empty(20, device="meta", dtype=torch.bfloat16))
    opt = Lion([p], **OPTIONS, rounding=rounding)
    q = torch.nn.Parameter(torch.ones(20, dtype=torch.bfloat16))
    torch.utils.swap_tensors(p, q)
    p.grad = torch.ones_like(p)
    opt.step()
    assert all(t.device == p.device for t in opt.state[p].values())


# Wrappers' state


def test_a_load_keeps_what_it_does_not_know():
    """Per parameter and beside them, as torch.optim: wrappers keep their weights there."""
    states = []
    for make in (lambda p: Lion([p], **OPTIONS), lambda p: torch.optim.SGD([p], lr=0.1)):
        p = with_gradient(5)
        opt = make(p)
        opt.step()
        opt.state[p].update(z=torch.arange(5.0), k=3, half=torch.ones(2).half())
        opt.state["global"] = {"steps": 7}
        saved = copy.deepcopy(opt.state_dict())
        again = make(with_gradient(5))
        again.load_state_dict(saved)
        q = again.param_groups[0]["params"][0]
        states.append({k: v for k, v in again.state[q].items() if k in ("z", "k", "half")})
        assert again.state["global"] == {"steps": 7}
    ours, torchs = states
    assert ours.keys() == torchs.keys() == {"z", "k", "half"}
    assert torch.equal(ours["z"], torchs["z"]) and ours["half"].dtype == torchs["half"].dtype
    assert ours["k"] == 3


def test_a_load_keeps_how_this_optimizer_stores_and_repairs(caplog):
    kept = {"rounding": "stochastic", "momentum_dtype": "float32", "nonfinite": "skip"}
    p, q = (with_gradient(5, dtype=torch.bfloat16) for _ in range(2))
    opt, saved = Lion([p], **kept), Lion([q], lr=0.5, betas=(0.1, 0.2), maximize=True)
    saved.step()
    with caplog.at_level(logging.WARNING):
        opt.load_state_dict(saved.state_dict())
    group = opt.param_groups[0]
    assert {name: group[name] for name in kept} == kept
    assert (group["lr"], group["betas"], group["maximize"]) == (0.5, (0.1, 0.2), True)
    lines = [record.message for record in caplog.records]
    assert lines == [
        "load_state_dict: momentum_dtype stays 'float32', the saved state has None",
        "load_state_dict: rounding stays 'stochastic', the saved state has 'nearest'",
        "load_state_dict: nonfinite stays 'skip', the saved state has 'propagate'",
    ]
    caplog.clear()
    opt.load_state_dict(opt.state_dict())
    assert not caplog.records
    opt.step()


def test_compensations_travel_and_old_ones_load():
    """In the parameter's dtype, which collectives take; until 0.1.0 in int16, of the same bits."""
    p = with_gradient(300, dtype=torch.bfloat16)
    opt = Lion([p], lr=1e-4, rounding="compensated")
    for _ in range(3):
        opt.step()
    state = copy.deepcopy(opt.state_dict())
    low = state["state"][0]["compensation"]
    assert low.dtype == torch.bfloat16 and low.view(torch.int16).any()
    whole = opt.float32_parameter(p)
    again = Lion([p], lr=1e-4, rounding="compensated")
    state["state"][0]["compensation"] = low.view(torch.int16)
    again.load_state_dict(state)
    assert bits_equal(again.float32_parameter(p), whole)
    assert bits_equal(again.state[p]["compensation"], low)


def test_load_errors_name_parameters():
    a, b = with_gradient(3), with_gradient(4)
    opt = Lion([("encoder.weight", a), ("decoder.weight", b)], **OPTIONS)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    state["state"][1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \('decoder.weight'\)"):
        opt.load_state_dict(state)


# Scaled gradients


def test_only_a_scaler_is_told_that_scaled_gradients_are_handled():
    """Lightning, which asks the same, would refuse to clip without a scaler."""
    p = with_gradient(5)
    opt = Lion([p], **OPTIONS)
    assert not getattr(opt, "_step_supports_amp_scaling", False)

    class Scaler(torch.amp.GradScaler):
        def step(self, optimizer):
            return optimizer._step_supports_amp_scaling

    assert Scaler("cpu").step(opt)
    # float16 gradients, which only an optimizer that handles them may have.
    q = with_gradient(5, dtype=torch.float16)
    scaler, half = torch.amp.GradScaler("cpu"), Lion([q], **OPTIONS)
    scaler.scale(torch.ones(()))
    scaler.step(half)
    assert half.state[q]["exp_avg"].any()


def test_expanded_and_complex_gradients_are_unscaled():
    p, q = (torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    c = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    opt = Lion([p, q, c], **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale = scaler.scale(torch.ones(())).item()
    p.grad = torch.full((1, 4), 2.0 * scale).expand(3, 4)
    q.grad = torch.arange(12.0).view(4, 3).t() * scale
    c.grad = torch.full((3,), 1 + 2j) * scale
    opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.zeros(1)
    opt.step()
    assert torch.equal(p.grad, torch.full((3, 4), 2.0))
    assert torch.equal(q.grad, torch.arange(12.0).view(4, 3).t())
    assert torch.equal(c.grad, torch.full((3,), 1 + 2j))


# Words


def test_a_source_folder_that_hides_the_installed_package_says_so(tmp_path):
    """Python starts in a checkout that was not built, after `pip install .`."""
    source, site = tmp_path / "checkout", tmp_path / "site"
    (source / "lion_kernels").mkdir(parents=True)
    site.mkdir()
    installed = Path(lion_kernels.__file__).parent
    for path in installed.rglob("*.py"):
        target = source / "lion_kernels" / path.relative_to(installed)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    (site / "lion_kernels").symlink_to(installed)
    script = "import torch, lion_kernels as l; l.Lion([torch.nn.Parameter(torch.ones(1))])"
    # -S: no finder of an editable install, which would look elsewhere for the compiled library.
    paths = [str(site), str(Path(torch.__file__).parent.parent)]
    outcome = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=source, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    wanted = f"the folder {source} hides the lion_kernels that is installed in {site}"
    assert outcome.returncode == 1 and wanted in outcome.stderr


def test_make_alone_prints_help():
    outcome = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert outcome.returncode == 0 and "make train | test" in outcome.stdout
