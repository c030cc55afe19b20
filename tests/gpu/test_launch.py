"""The launchers of the GPU kernels: launches, tables, scalars on the device, what they refuse.

Runs on CPU tensors, in Triton's interpreter; with a GPU, test_cuda.py runs the same kernels there.
"""

import functools
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import backends
from common import Dispatched, Workers, bits_equal, exact, generator, lr_of, no_counts, step_of
from lion_kernels import Lion, kernels, native, options, reference
from lion_kernels.kernels import config, launch, table
from lion_kernels.layout import DIGEST, READY, STATUS, BallotLayout, room_of

pytestmark = pytest.mark.skipif(backends.HAS_CUDA, reason="the kernels are not interpreted here")


@pytest.fixture
def counts(monkeypatch):
    """How often a kernel was launched and a table built, by name."""
    seen = {"launch": 0, "build": 0}

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            seen["launch"] += 1
            return self.kernel[grid]

    for name in ("_step_kernel", "_encode_kernel", "_apply_kernel"):
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name)))
    build = table._build

    def counted_build(*args):
        seen["build"] += 1
        return build(*args)

    monkeypatch.setattr(table, "_build", counted_build)
    return seen


def lists(numels, dtype=torch.float32, seed=0):
    gen = generator(seed)
    return [[exact(n, gen, dtype) for n in numels] for _ in range(3)]


def step(p, g, m, lr=None):
    lr = lr_of(0.1) if lr is None else lr
    launch.lion_step(p, g, m, lr, 0.5, 0.75, 0.3, False)


def test_one_launch_for_equal_types(counts):
    """Forty tensors: one launch of each kernel; a second dtype: one more."""
    p, g, m = lists([7] * 40)
    step(p, g, m)
    assert counts["launch"] == 1
    layout = BallotLayout((7,) * 40, 1, 2)
    chunks = torch.zeros(2, layout.chunk_words, dtype=torch.int32)
    args = layout.planes_of(chunks), layout.blanks_of(chunks)
    launch.encode(g, m, *args, 0.5, 0.75, False, 0, 0, step_of(0), no_counts())
    assert counts["launch"] == 2
    trailers = layout.trailers_of(chunks)
    launch.apply(p, *args, trailers, 1, lr_of(0.1), 0.0, step_of(0))
    assert counts["launch"] == 3
    q, h, k = lists([7] * 3, torch.bfloat16)
    step(p + q, g + h, m + k)
    assert counts["launch"] == 5


def test_a_table_is_built_when_a_pointer_changed(counts):
    p, g, m = lists([100, 5])
    for _ in range(3):
        step(p, g, m)
    assert counts["build"] == 1
    twins = [[t.clone() for t in tensors] for tensors in (p, g, m)]
    for seed in range(3):  # gradients elsewhere: the table is patched
        g[1] = exact(5, generator(50 + seed))
        g[seed % 2] = g[seed % 2].clone()
        step(p, g, m)
        reference.lion_step(twins[0], g, twins[2], lr_of(0.1), 0.5, 0.75, 0.3, False)
        assert all(bits_equal(a, b) for a, b in zip(p + m, twins[0] + twins[2], strict=True))
    assert counts["build"] == 1
    room = torch.zeros(108)
    g[0] = room[1:101].copy_(g[0])  # off 16 bytes: the tiles are masked
    step(p, g, m)
    assert counts["build"] == 2
    m[1] = m[1].clone()
    step(p, g, m)
    assert counts["build"] == 3
    step(p[:1], g[:1], m[:1])
    assert counts["build"] == 4


def test_old_tables_are_dropped(counts, monkeypatch):
    step(*lists([9]))
    monkeypatch.setattr(table, "_MOST_BYTES", 2 * table._found.popitem()[1].n_bytes)
    counts["build"] = 0
    args = [lists([9], seed=i) for i in range(3)]
    for _ in range(2):
        for p, g, m in args:
            step(p, g, m)
    assert counts["build"] == 6
    assert len(table._found) == 2


def test_bytes_are_what_bounds_the_tables():
    """As many lists as there are: a table of one tensor is small, gradient release has many."""
    table._found.clear()
    for n in range(40):
        step(*lists([n + 1]))
    assert len(table._found) == 40
    assert sum(each.n_bytes for each in table._found.values()) < 40 * 300


def test_captures_keep_nothing(monkeypatch):
    """What is built while a graph is captured is the graph's: nothing here keeps it, several in a
    row are as good as one, and the tables of other steps stay as they are."""
    p, g, m = lists([100, 5])
    step(p, g, m)
    before = {key: each.addresses for key, each in table._found.items()}
    monkeypatch.setattr(table, "is_capturing", lambda _: True)
    sizes = []
    for seed in range(3):
        g = lists([100, 5], seed=seed)[1]
        twins = [[t.clone() for t in tensors] for tensors in (p, g, m)]
        step(p, g, m)
        reference.lion_step(*twins, lr_of(0.1), 0.5, 0.75, 0.3, False)
        assert all(bits_equal(a, b) for a, b in zip(p + m, twins[0] + twins[2], strict=True))
        sizes.append(len(table._captured_tile_rows))
    assert sizes == [sizes[0]] * 3
    assert before.keys() == table._found.keys()
    assert all(before[key] == each.addresses for key, each in table._found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_lr_on_the_device_is_read_there(monkeypatch, dtype):
    p, g, m = lists([3000, 5])
    twins = [[t.clone() for t in tensors] for tensors in (p, g, m)]
    lr = torch.tensor(0.123, dtype=dtype)
    reference.lion_step(*twins, lr, 0.5, 0.75, 0.3, False)
    monkeypatch.setattr(launch, "_is_on_host", lambda _: False)
    monkeypatch.setattr(torch.Tensor, "item", None)  # a read on the host would raise
    step(p, g, m, lr)
    monkeypatch.undo()
    assert all(bits_equal(a, b) for a, b in zip(p + m, twins[0] + twins[2], strict=True))
    verdict = torch.tensor([[[0, 5, -1, 7, 0, 0, 0, 0]]], dtype=torch.int32)
    q = [torch.randn(100, generator=generator(1))]
    twin = [q[0].clone()]
    reference.apply(twin, verdict, None, trailers_of(1), 1, lr, 0.3, step_of(0))
    monkeypatch.setattr(launch, "_is_on_host", lambda _: False)
    launch.apply(q, verdict, None, trailers_of(1), 1, lr, 0.3, step_of(0))
    assert bits_equal(q[0], twin[0])


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_tensors_are_correct(dtype, offset):
    """Any one of p, g and m off 16 bytes, over a whole tile and a rest."""
    n = config.STEP.block + 700
    for moved in range(3):
        rooms = lists([n + 8], dtype, seed=offset) if dtype == torch.float32 else [
            [t.to(torch.bfloat16)] for (t,) in lists([n + 8], seed=offset)
        ]  # fmt: skip
        views = [
            [room[offset : offset + n] if i == moved else room[:n]]
            for i, (room,) in enumerate(rooms)
        ]
        before = [room.clone() for (room,) in rooms]
        twins = [[view[0].clone()] for view in views]
        reference.lion_step(*twins, lr_of(0.1), 0.5, 0.75, 0.3, False)
        step(*views)
        assert bits_equal(views[0][0], twins[0][0]) and bits_equal(views[2][0], twins[2][0])
        for i, (room,) in enumerate(rooms):
            start = offset if i == moved else 0
            assert bits_equal(room[:start], before[i][:start])
            assert bits_equal(room[start + n :], before[i][start + n :])


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("planes", [1, 2])
def test_encode_writes_its_tensors_words_and_every_trailer(planes, found_inf):
    """Of a list behind another: words before it, behind its last octet and beside the planes stay
    as they are; trailers are written in every shard, also where the step will not happen."""
    layout = BallotLayout((300, 700, 5, 40), planes, 3)
    trailer = torch.arange(layout.trailer_words, dtype=torch.int32)
    shared = torch.tensor([3, -1], dtype=torch.int64)
    written = []
    for of in (launch, reference):
        chunks = torch.full((3, layout.chunk_words), -1, dtype=torch.int32)
        g, m = ([exact(n, generator(n + i)) for n in (700, 5)] for i in range(2))
        g[0][64:200], m[0][64:200] = 0, 0
        of.encode(
            g, m, layout.planes_of(chunks), layout.blanks_of(chunks), 0.5, 0.75, False, 7, 1,
            step_of(3), no_counts(), found_inf=torch.tensor([found_inf]), first_word=16,
            trailers=layout.trailers_of(chunks), trailer=trailer, shared=shared,
        )  # fmt: skip
        written.append(chunks)
    assert torch.equal(*written)


def test_two_ranks_toss_opposite_coins_for_single_zeros():
    """And none in a word of zeros alone, which is blank."""
    layout = BallotLayout((3000,), 1, 1)
    gen, tosses = generator(0), []
    g = exact(3000, gen)
    g[::3], g[64:96] = 0, 0
    for rank in (2, 3):
        chunks = torch.full((1, layout.chunk_words), -1, dtype=torch.int32)
        planes, blanks = layout.planes_of(chunks), layout.blanks_of(chunks)
        m = torch.zeros(3000)
        launch.encode([g], [m], planes, blanks, 0.5, 0.75, False, 0, rank, step_of(0), no_counts())
        assert blanks[0, :3].tolist() == [1 << 2, 0, 0]
        tosses.append(reference.unpack(planes)[0, :3000])
    is_coin = g == 0
    is_coin[64:96] = False
    assert torch.equal(tosses[0] + tosses[1], torch.where(is_coin, 1, 2 * (g > 0)))


def trailers_of(n_ranks, n_flags=128):
    """Trailers of ranks that are ready, agree and flag every tensor."""
    trailers = torch.full((n_ranks, n_flags // 32 + 4), -1, dtype=torch.int32)
    trailers[:, STATUS] = READY
    return trailers


# What makes a rank's trailer another: its status, or either word of its digest.
ODD = [None, (STATUS, 1 << 8), (DIGEST, 5), (DIGEST + 1, 1 << 30)]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("n_ranks", "at"), [(1, 0), (3, 0), (32, 31), (33, 0), (40, 39)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nothing_happens_unless_all_ranks_agree(rounding, n_ranks, at, odd):
    """Every program asks up to 32 ranks; of more, what a launch joined for it."""
    trailers = trailers_of(n_ranks)
    if odd is not None:
        word, change = odd
        trailers[at, word] ^= change
    happens = odd is None or (n_ranks == 1 and odd[0] != STATUS)
    verdict = torch.zeros(1, 1, 80, dtype=torch.int32)
    p, step = torch.ones(2500, dtype=torch.bfloat16), step_of(4)
    launch.apply(
        [p], verdict, None, trailers, 1, lr_of(0.5), 0.0, step, rounding=rounding, first_flag=70
    )
    assert step.item() == 4 + happens
    assert (p == (1.5 if happens else 1.0)).all()


@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blank_words_decay_alone(dtype, cautious_decay):
    """Over a whole tile and a rest, from a word on that is not the first; whatever the planes say
    there, and with the sign of a zero."""
    n = config.apply_config(1).block + 700
    gen, first_word = generator(0), 64
    words = first_word + room_of(n)
    verdict = torch.randint(-(2**31), 2**31, (1, 1, words), generator=gen).to(torch.int32)
    blanks = torch.randint(-(2**31), 2**31, (1, words // 32 + 1), generator=gen).to(torch.int32)
    p = torch.randn(n, generator=gen).to(dtype)
    p[::7] = -0.0
    twin = p.clone()
    for of, tensor in ((launch, p), (reference, twin)):
        of.apply(
            [tensor], verdict, blanks, trailers_of(2), 1, lr_of(0.1), 0.3, step_of(0),
            cautious_decay=cautious_decay, first_word=first_word,
        )  # fmt: skip
    assert bits_equal(p, twin)


def test_empty_lists():
    verdict, step = torch.zeros(1, 1, 0, dtype=torch.int32), step_of(0)
    launch.apply([], verdict, None, trailers_of(2, 0), 1, lr_of(0.1), 0.0, step)
    assert step.item() == 1
    launch.lion_step([], [], [], lr_of(0.1), 0.5, 0.75, 0.0, False)


def test_a_group_beyond_int32_words_is_refused():
    ballot = torch.zeros(1, 1, 8, dtype=torch.int32).expand(2**29, 1, 8)
    blanks = torch.zeros(1, 4, dtype=torch.int32).expand(2**29, 4)
    m = [torch.zeros(5)]
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 ballot words, got 4294967296"):
        launch.encode(m, m, ballot, blanks, 0.5, 0.75, False, 0, 0, step_of(0), no_counts())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blanks", "blanks must have unit stride in its last dimension"),
        ("trailers", "trailers must have unit stride in its last dimension"),
        ("trailer", "trailer must have unit stride in its last dimension"),
        ("shared", "shared must be on cpu, got meta"),
    ],
)
def test_words_that_kernels_cannot_reach(name, said):
    layout = BallotLayout((5,), 1, 2)
    chunks = torch.zeros(2, layout.chunk_words, dtype=torch.int32)
    given = {
        "blanks": layout.blanks_of(chunks),
        "trailers": layout.trailers_of(chunks),
        "trailer": torch.zeros(layout.trailer_words, dtype=torch.int32),
        "shared": torch.zeros(1, dtype=torch.int64, device="meta" if name == "shared" else "cpu"),
    }
    if name != "shared":
        given[name] = given[name].repeat_interleave(2, -1)[..., ::2]
    m = [torch.zeros(5)]
    with pytest.raises(ValueError, match=said):
        launch.encode(
            m, m, layout.planes_of(chunks), given.pop("blanks"), 0.5, 0.75, False, 0, 0,
            step_of(0), no_counts(), **given,
        )  # fmt: skip


def test_scalars_of_the_wrong_kind(monkeypatch):
    p, g, m = lists([5])
    monkeypatch.setattr(launch, "_is_on_host", lambda _: False)
    with pytest.raises(ValueError, match="a tensor lr must be float32 or float64 on the CPU or on"):
        step(p, g, m, torch.tensor(0.1, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"nonfinite must be torch.int64 on cpu, got torch.int32"):
        launch.lion_step(p, g, m, lr_of(0.1), 0.5, 0.75, 0.3, False, torch.zeros(1).int())


def test_what_is_missing_is_said(monkeypatch):
    """CUDA tensors without Triton, or a vote on them without the CUDA build."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.zeros(5, device="cuda"))]
        Lion(params)  # one device needs Triton alone
        monkeypatch.setattr(native, "has_cuda", False)
        with pytest.raises(RuntimeError, match=r"built without CUDA.*LION_KERNELS_CUDA=1"):
            kernels.require(vote=True)
        monkeypatch.setitem(sys.modules, "lion_kernels.kernels.launch", None)
        with pytest.raises(RuntimeError, match=r"CUDA tensors need triton >= 3.6"):
            Lion(params)


def test_counting_on_cuda_without_the_cuda_build_raises():
    with pytest.raises(RuntimeError, match="built without CUDA"):
        kernels._not_built()
    for name in kernels.CUDA_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lion_kernels::{name}", "CUDA")


@pytest.fixture
def gpu_dispatch():
    """Within the test, the GPU's kernels stand behind the ops of CPU tensors."""
    library = torch.library.Library("lion_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is what is wanted
        for name in ("lion_step", "encode", "apply", "tally", "elect"):
            library.impl(name, getattr(backends.gpu(), name), "CPU", allow_override=True)
    yield library
    library._destroy()


def lion_run(momentum_dtype):
    """Parameters and momenta after steps of Lion over odd layouts, dtypes and groups."""
    gen = generator(0)
    shapes = ((30, 20), (7,), (), (0,), (5, 3, 4, 4))
    params = [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]
    params.append(torch.nn.Parameter(torch.randn(6, 50, generator=gen).t()))
    params.append(torch.nn.Parameter(torch.randn(40, generator=gen).to(torch.bfloat16)))
    groups = [{"params": params[:3], "lr": 0.02}, {"params": params[3:], "maximize": True}]
    opt = Lion(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.3, momentum_dtype=momentum_dtype)
    for i in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        params[i].grad = None
        opt.step()
    return [p.detach().clone() for p in params] + [t for p in params for t in opt.state[p].values()]


def vote_run(**options):
    gen = generator(1)
    params = [torch.randn(n, generator=gen) for n in (700, 33, 0, 5)]
    world = Workers(params, 4, seed=5, lr=0.01, betas=(0.5, 0.75), weight_decay=0.1, **options)
    for i in range(3):
        rows = [[exact(p.numel(), gen) for p in params] for _ in range(4)]
        rows[i][1] = None
        world.step(rows)
    return [p.detach() for rank in world.params + world.exp_avgs for p in rank]


RUNS = [functools.partial(lion_run, kind) for kind in ("float32", "int8")] + [
    functools.partial(vote_run, aggregation=a, ballots=b, ties=t, exchange=e)
    for a, b, t, e in (
        ("majority", "binary", "zero", "sharded"),
        ("majority", "ternary", "coin", "allgather"),
        ("average", "binary", "zero", "allgather"),
        ("average", "ternary", "zero", "sharded"),
    )
]


@pytest.mark.parametrize("run", RUNS)
def test_optimizers_take_the_same_path_on_either_kernels(request, run):
    """Random floats, several steps: bit for bit the CPU kernels'."""
    on_cpu = run()
    request.getfixturevalue("gpu_dispatch")
    on_gpu_kernels = run()
    assert all(bits_equal(a, b) for a, b in zip(on_cpu, on_gpu_kernels, strict=True))


def test_dispatch_really_changes(gpu_dispatch, counts):
    lion_run("float32")
    assert counts["launch"] > 0


def test_a_step_reads_nothing_on_the_host(gpu_dispatch, monkeypatch):
    """With an lr on the device, a step of Lion dispatches one op, and never asks for a value.
    The kernel itself is left out: its interpreter does."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (40, 3)]
    opt = Lion(params, lr=torch.tensor(0.1), weight_decay=0.1, momentum_dtype=torch.bfloat16)
    for p in params:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(launch, "_is_on_host", lambda _: False)
    monkeypatch.setattr(options, "check_number", lambda name, value, **_: value)  # of the lr
    opt.step()
    launches = []
    monkeypatch.setattr(launch, "_step_kernel", {(2,): lambda *_, **kinds: launches.append(kinds)})
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with Dispatched() as seen:
        opt.step()
    monkeypatch.undo()
    assert seen.names == ["lion_kernels::lion_step"]
    assert len(launches) == 1


def test_one_device_a_list():
    """A table's pointers are all of one device."""
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match=r"params\[1\] must be on cpu, got meta"):
        launch.lion_step(
            [here, there], [here, there], [here, there], lr_of(0.1), 0.9, 0.99, 0.0, False
        )
