"""The op table: opcheck, and bad arguments refused with the rule and what came, nothing written."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import backends
from common import generator, lr_of, no_counts, step_of
from lion_kernels import native, ops, reference


def arguments():
    """Valid arguments of every op, by name: (op, positional arguments)."""
    gen = generator(0)
    p, g, m = (torch.randn(100, generator=gen) for _ in range(3))
    p2, g2, m2 = (torch.randn(5, 3, generator=gen).to(torch.bfloat16) for _ in range(3))
    ballots = torch.randint(-(2**31), 2**31 - 1, (5, 1, 8), generator=gen).to(torch.int32)
    planes = [torch.zeros(n, 8, dtype=torch.int32) for n in range(5)]
    flags = torch.ones(2, 4, dtype=torch.int32)
    step, lr = step_of(1), lr_of(0.1)
    return {
        "lion_step": ([p, p2], [g, g2], [m, m2], lr, 0.9, 0.99, 0.1, False, None),
        "lion_step, skipping": ([p], [g], [m], lr, 0.9, 0.99, 0.1, True, no_counts()),
        "lion_step, int8": ([p], [g], [m.char()], lr, 0.9, 0.99, 0.1, False, None, None, None,
                            "nearest", None, 0, None, True, False, [torch.ones(1)],
                            torch.ones(1, dtype=torch.int64)),
        "lion_step, uniform": ([p, p], [g, g], [m, m], lr, 0.9, 0.99, 0.1, False, None, None, None,
                               "nearest", None, 0, None, False, False, None, None, True),
        "lion_step, mixed": ([p, p.half()], [g, g.half()], [m, m], lr, 0.9, 0.99, 0.1, False, None,
                             None, None, "nearest", None, 0, None, False, False, None, None, False),
        "count_agreeing": ([g, g2], [m, m2], torch.zeros(2, dtype=torch.int64), 0.9, False),
        "encode": ([g, None], [m, m2], torch.zeros(2, 1, 4, dtype=torch.int32),
                   torch.zeros(2, 4, dtype=torch.int32), 0.9, 0.99, False, 1, 2, step, no_counts()),
        "encode, scaled": ([g, None], [m, m2], torch.zeros(2, 2, 4, dtype=torch.int32),
                           torch.zeros(2, 4, dtype=torch.int32), 0.9, 0.99, False, 1, 2, step,
                           no_counts(), torch.ones(1), torch.zeros(1)),
        "tally": (ballots, planes[3], 5),
        "elect": (ballots, planes[1], 5, 0, 1, step),
        "apply": ([p, p2], torch.zeros(1, 2, 8, dtype=torch.int32), flags, 2, lr, 0.1, step),
    }  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name):
    op = getattr(torch.ops.lion_kernels, name.split(",")[0]).default
    torch.library.opcheck(op, arguments()[name])


def changed(name, position, value):
    args = list(arguments()[name])
    args[position] = value
    return name.split(",")[0], args


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


BAD = {
    "lengths": (*changed("lion_step", 1, []), "grads and"),
    "float64": (
        *changed("lion_step", 2, [torch.zeros(100).double(), torch.zeros(5, 3)]),
        "float32",
    ),
    "shape": (*changed("lion_step", 1, [torch.zeros(7), torch.zeros(5, 3).bfloat16()]), "shape"),
    "lr": (*changed("lion_step", 3, torch.zeros(2)), "lr must have one element"),
    "agreeing": (*changed("count_agreeing", 2, ints(2)), "agreeing must be contiguous int64"),
    "agreeing pairs": (*changed("count_agreeing", 0, []), "grads and exp_avgs must have equal"),
    "none": (
        *changed("lion_step", 0, [torch.zeros(100), None]),
        r"params\[1\] must be a tensor, got None",
    ),
    "none to apply": (
        *changed("apply", 0, [torch.zeros(100), None]),
        r"params\[1\] must be a tensor, got None",
    ),
    "negative": (
        *changed("lion_step, uniform", 0, [torch.zeros(100), torch._neg_view(torch.zeros(100))]),
        r"params\[1\] must not be a negative view",
    ),
    "negative to apply": (
        *changed("apply", 0, [torch._neg_view(torch.zeros(100)), torch.zeros(5, 3)]),
        r"params\[0\] must not be a negative view",
    ),
    "uniform": (*changed("lion_step, mixed", 19, True), r"params\[1\] must be of the first one's"),
    "uniform momenta": (
        *changed("lion_step, uniform", 2, [torch.zeros(100), torch.zeros(100).half()]),
        r"exp_avgs\[1\] must be of the first one's dtype",
    ),
    "rescale": (*changed("lion_step, int8", 15, False), "agreeing rescales a cautious update"),
    "block_scales": (
        *changed("lion_step, int8", 17, []),
        "block_scales must have 1 tensors, got 0",
    ),
    "int momentum": (*changed("encode", 1, [torch.zeros(100).int(), torch.zeros(5, 3)]), "float32"),
    "ballot planes": (*changed("encode", 2, ints(2, 3, 4)), "1 plane"),
    "ballot dtype": (*changed("encode", 2, torch.zeros(2, 1, 4)), "int32"),
    "ballot room": (*changed("encode", 2, ints(1, 1, 4)), "room for 4 words"),
    "ballot dims": (*changed("encode", 2, ints(1, 4)), "3 dimensions"),
    "step": (*changed("encode", 9, torch.zeros(3, dtype=torch.int64)), "step must have one"),
    "step dtype": (*changed("encode", 9, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "counter dtype": (*changed("encode", 10, torch.zeros(1)), r"nonfinite must be (torch\.)?int64"),
    "tie step dtype": (*changed("elect", 5, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "end of step dtype": (*changed("apply", 6, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "flag rows": (*changed("encode", 3, ints(3, 4)), "a row for each of 2 shards"),
    "flag room": (*changed("encode", 3, ints(2, 0)), "flags has 0 flags, got 2 tensors"),
    "grad scale": (*changed("encode, scaled", 11, torch.ones(2)), "grad_scale must have one"),
    "found_inf": (
        *changed("encode, scaled", 12, torch.ones(1).long()),
        "found_inf must be float32",
    ),
    "end of step": (*changed("apply", 6, torch.zeros(3).long()), "step must have one"),
    "tally planes": (*changed("tally", 1, ints(2, 8)), "3 planes for scale 5"),
    "tally words": (*changed("tally", 1, ints(3, 4)), "8 words"),
    "scale": (*changed("tally", 2, 0), "scale"),
    "huge scale": (*changed("elect", 2, 2**16), "scale"),
    "verdict planes": (*changed("elect", 1, ints(2, 8)), "2 where scale is even"),
    "verdict dtype": (*changed("apply", 1, torch.zeros(1, 2, 8)), "int32"),
    "verdict room": (*changed("apply", 1, ints(1, 2, 4)), "room for 4 words"),
    "flags": (*changed("apply", 2, ints(2, 0)), "presence"),
    "zero scale": (*changed("apply", 3, 0), "scale"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "fake", "gpu"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, backend):
    name, args, message = BAD[case]
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    before = [t.clone() for t in tensors if isinstance(t, torch.Tensor)]
    with pytest.raises(ValueError, match=message):
        if backend == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
                getattr(ops, name)(*fake)
        else:
            of = {"cpu": ops, "reference": reference, "gpu": backends.gpu()}[backend]
            getattr(of, name)(*args)
    after = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_strides_are_never_misread():
    """The same shape in another memory layout is refused by the op; Lion converts it."""
    for of in (ops, backends.gpu()):
        check_strides(of)


def check_strides(ops):
    p, g, m = torch.zeros(4, 6), torch.zeros(6, 4).t(), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"grads\[0\] must have strides \[6, 1\], got \[1, 4\]"):
        ops.lion_step([p], [g], [m], lr_of(0.1), 0.9, 0.99, 0.0, False, None)
    gaps = torch.zeros(4, 12)[:, ::2]
    with pytest.raises(ValueError, match=r"params\[0\] must be dense"):
        ops.lion_step([gaps], [m], [m], lr_of(0.1), 0.9, 0.99, 0.0, False, None)


def test_importing_needs_no_library(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    with pytest.raises(RuntimeError, match="was not built"):
        native.require()
