"""The op table: opcheck, and bad arguments refused with the rule and what came, nothing written."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import backends
from common import generator, lr_of, no_counts, random_words, step_of, trailers_of
from lion_kernels import native, ops, reference


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def arguments():
    """Valid arguments of every op, by name: (op, positional arguments)."""
    gen = generator(0)
    p, g, m = (torch.randn(100, generator=gen) for _ in range(3))
    p2, g2, m2 = (torch.randn(5, 3, generator=gen).to(torch.bfloat16) for _ in range(3))
    ballots = random_words(5, 1, 8, gen=gen)
    planes = [ints(n, 8) for n in range(5)]
    blanks, out_blanks = random_words(5, 2, gen=gen), ints(1, 3)
    # Each op may write to its own: opcheck compares what it was given.
    step, lr, trailers = step_of(1), lr_of(0.1), trailers_of([True, True])
    place = (5, 0, 1, step)  # scale, first word, seed
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
        "encode": ([g, None], [m, m2], ints(2, 1, 8), ints(2, 1), 0.9, 0.99, False, 1, 2, step,
                   no_counts()),
        "encode, all": ([g, None], [m, m2], ints(2, 2, 16), None, 0.9, 0.99, False, 1, 2, step,
                        no_counts(), torch.ones(1), torch.zeros(1), True, None, 8, ints(2, 6),
                        random_words(6, gen=gen), torch.arange(3)),
        "tally": (ballots, planes[3], *place),
        "tally, all": (ballots, planes[3], *place, blanks, out_blanks, None),
        "tally, weights": (ballots, planes[4], 15, 0, 1, step, None, None,
                           torch.tensor([1, 5, 2, 4, 3], dtype=torch.int32)),
        "elect": (ballots, planes[1], *place),
        "elect, all": (ballots, planes[1], *place, blanks, out_blanks, None),
        "elect, even": (ballots[:4], planes[2], 4, 0, 1, step, blanks[:4], None,
                        torch.ones(4).int()),
        "apply": ([p, p2], ints(1, 2, 16), None, trailers, 2, lr, 0.1, step),
        "apply, all": ([p, p2], ints(2, 1, 16), ints(2, 1), trailers, 1, lr, 0.1, step, None,
                       "nearest", None, 0, True, 16, 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name):
    op = getattr(torch.ops.lion_kernels, name.split(",")[0]).default
    torch.library.opcheck(op, arguments()[name])


def changed(name, position, value):
    args = list(arguments()[name])
    args[position] = value
    return name.split(",")[0], args


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
    "ballot planes": (*changed("encode", 2, ints(2, 3, 8)), "1 plane"),
    "ballot dtype": (*changed("encode", 2, torch.zeros(2, 1, 8)), "int32"),
    "ballot room": (*changed("encode", 2, ints(2, 1, 0)), "room for 0 words a plane"),
    "ballot dims": (*changed("encode", 2, ints(1, 8)), "3 dimensions"),
    "ballot octets": (
        *changed("encode", 2, ints(2, 1, 12)),
        "ballot must have a multiple of 8 words a shard, got 12",
    ),
    "no blanks": (
        *changed("encode", 3, None),
        "blanks must be there: one plane cannot say zero",
    ),
    "ternary blanks": (*changed("encode, all", 3, ints(2, 1)), "blanks must be None"),
    "blanks dtype": (*changed("encode", 3, torch.zeros(2, 1)), "blanks must be int32"),
    "blanks dims": (*changed("encode", 3, ints(2)), "blanks must have 2 dimensions"),
    "blanks rows": (*changed("encode", 3, ints(1, 1)), r"blanks must have shape \[2, 1 or more\]"),
    "blanks words": (*changed("encode", 3, ints(2, 0)), r"blanks must have shape \[2, 1 or more\]"),
    "step": (*changed("encode", 9, torch.zeros(3, dtype=torch.int64)), "step must have one"),
    "step dtype": (*changed("encode", 9, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "counter dtype": (*changed("encode", 10, torch.zeros(1)), r"nonfinite must be (torch\.)?int64"),
    "tie step dtype": (*changed("elect", 5, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "half step": (*changed("tally", 5, torch.zeros(2).long()), "step must have one"),
    "end of step dtype": (*changed("apply", 7, torch.zeros(1)), r"step must be (torch\.)?int64"),
    "grad scale": (*changed("encode, all", 11, torch.ones(2)), "grad_scale must have one"),
    "found_inf": (*changed("encode, all", 12, torch.ones(1).long()), "found_inf must be float32"),
    "first word": (
        *changed("encode, all", 15, 4),
        "first_word must be a multiple of 8, got 4",
    ),
    "negative first word": (*changed("encode, all", 15, -8), "first_word must be a multiple of 8"),
    "late first word": (
        *changed("encode, all", 15, 24),
        "ballot has room for 32 words a plane, the tensors need 40",
    ),
    "no trailers": (*changed("encode, all", 16, None), "must be given together"),
    "no trailer": (*changed("encode, all", 17, None), "must be given together"),
    "no shared": (*changed("encode, all", 18, None), "must be given together"),
    "trailer rows": (*changed("encode, all", 16, ints(3, 6)), "a row for each of 2 shards"),
    "trailer room": (
        *changed("encode, all", 16, ints(2, 3)),
        "trailers must have at least 4 words, got 3",
    ),
    "trailers dtype": (*changed("encode, all", 16, torch.zeros(2, 6)), "trailers must be int32"),
    "trailer words": (*changed("encode, all", 17, ints(5)), "trailer must have 6 words, got 5"),
    "trailer dims": (*changed("encode, all", 17, ints(1, 6)), "trailer must have 1 dimensions"),
    "shared dtype": (*changed("encode, all", 18, ints(3)), "shared must be contiguous int64"),
    "shared dims": (*changed("encode, all", 18, step_of(3)), "shared must be contiguous int64"),
    "shared stride": (
        *changed("encode, all", 18, torch.arange(6)[::2]),
        "shared must be contiguous int64",
    ),
    "end of step": (*changed("apply", 7, torch.zeros(3).long()), "step must have one"),
    "tally planes": (*changed("tally", 1, ints(2, 8)), "3 planes for scale 5"),
    "tally words": (*changed("tally", 1, ints(3, 4)), "8 words"),
    "scale": (*changed("tally", 2, 0), "scale"),
    "huge scale": (*changed("elect", 2, 2**16), "scale"),
    "verdict planes": (*changed("elect", 1, ints(2, 8)), "2 where scale is even"),
    "tally blanks": (
        *changed("tally, all", 6, ints(4, 1)),
        r"blanks must have shape \[5, 1 or more",
    ),
    "tally of planes": (
        *changed("tally, all", 0, ints(5, 2, 8)),
        "blanks are of ballots of 1 plane, got 2",
    ),
    "no out_blanks": (
        *changed("tally, all", 7, None),
        "out_blanks must be there: an odd scale cannot say zero",
    ),
    "no out_blanks of a verdict": (
        *changed("elect, all", 7, None),
        "out_blanks must be there: an odd scale cannot say zero",
    ),
    "no out_blanks of one plane": (
        *changed("elect, even", 1, ints(1, 8)),
        "out_blanks must be there: an odd scale cannot say zero",
    ),
    "out_blanks": (*changed("elect, even", 7, ints(1, 1)), "out_blanks must be None"),
    "out_blanks without blanks": (*changed("tally, all", 6, None), "out_blanks must be None"),
    "out_blanks rows": (
        *changed("tally, all", 7, ints(5, 1)),
        r"out_blanks must have shape \[1, 1 or more\]",
    ),
    "out_blanks words": (
        *changed("elect, all", 7, ints(1, 0)),
        r"out_blanks must have shape \[1, 1 or more\]",
    ),
    "out_blanks dtype": (*changed("tally, all", 7, torch.zeros(1, 1)), "out_blanks must be int32"),
    "weights dtype": (
        *changed("tally, weights", 8, torch.ones(5).long()),
        r"weights must be contiguous int32 of shape \[5\]",
    ),
    "weights shape": (
        *changed("tally, weights", 8, ints(4)),
        r"weights must be contiguous int32 of shape \[5\]",
    ),
    "weights stride": (
        *changed("elect, even", 8, ints(8)[::2]),
        r"weights must be contiguous int32 of shape \[4\]",
    ),
    "verdict dtype": (*changed("apply", 1, torch.zeros(1, 2, 16)), "int32"),
    "verdict room": (*changed("apply", 1, ints(1, 2, 8)), "room for 8 words"),
    "verdict octets": (
        *changed("apply", 1, ints(1, 2, 20)),
        "verdict must have a multiple of 8 words a shard, got 20",
    ),
    "verdict blanks": (*changed("apply, all", 2, ints(1, 1)), r"blanks must have shape \[2, 1 or"),
    "late verdict": (
        *changed("apply, all", 13, 24),
        "verdict has room for 32 words a plane, the tensors need 40",
    ),
    "odd verdict": (*changed("apply, all", 13, 12), "first_word must be a multiple of 8, got 12"),
    "trailers": (*changed("apply", 3, ints(2, 4)), "trailers have 0 flags, got 2 tensors"),
    "short trailers": (*changed("apply", 3, ints(2, 3)), "trailers have 0 flags, got 2 tensors"),
    "flags": (*changed("apply, all", 14, 127), "trailers have 128 flags, got 129 tensors"),
    "negative flag": (*changed("apply, all", 14, -1), "first_flag must be at least 0, got -1"),
    "trailers of float": (*changed("apply", 3, torch.zeros(2, 8)), "trailers must be int32"),
    "zero scale": (*changed("apply", 4, 0), "scale"),
    "no tensors, no seal": (
        "apply",
        ([], ints(1, 1, 8), None, ints(2, 3), 1, lr_of(0.1), 0.1, step_of(1)),
        "trailers have 0 flags, got 0 tensors",
    ),
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
