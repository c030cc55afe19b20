"""On a GPU: the optimizers against their CPU twins bit for bit, graphs, GradScaler, no waiting.

The ops themselves run on the GPU through the `backend` fixture of the other files.
"""

import copy
import gc
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

import backends
from common import bits_equal, exact, generator, lr_of, no_counts, step_of
from lion_kernels import DistributedLion, Lion
from lion_kernels.layout import READY, WIRE_VERSION, BallotLayout, pack_flags
from test_sharded import KINDS, beside_plain_tensors

pytestmark = pytest.mark.skipif(not backends.HAS_CUDA, reason="needs a CUDA device")
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
SHAPES = ((30, 20), (7,), (), (0,), (5, 3, 4, 4), (5000,))
ops = torch.ops.lion_kernels


def trailer_of(layout):
    """The trailer of a rank that is ready and votes on every tensor."""
    flags = pack_flags([True] * len(layout.numels), layout.flag_words)
    return torch.tensor([*flags, READY, WIRE_VERSION, 1, 2], dtype=torch.int32)


def parameters(device, dtype=torch.float32):
    gen = generator(0)
    params = [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES]
    params.append(torch.randn(6, 50, generator=gen).to(dtype).t())
    params.append(
        torch.randn(2, 3, 8, 8, generator=gen).to(dtype, memory_format=torch.channels_last)
    )
    params.append(torch.randn(301, generator=gen).to(dtype)[1:])
    return [torch.nn.Parameter(p.to(device)) for p in params]


def set_grads(params, seed):
    gen = generator(seed)
    for p in params:
        g = torch.randn(p.shape, generator=gen).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def same(cuda, cpu):
    return all(bits_equal(a.detach().cpu(), b.detach()) for a, b in zip(cuda, cpu, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"momentum_dtype": torch.float32},
        {"momentum_dtype": torch.bfloat16, "nonfinite": "skip"},
        {"momentum_dtype": "int8"},
        {"momentum_dtype": "int8", "nonfinite": "skip", "cautious": True},
        {"cautious": "rescaled"},
        {"rounding": "stochastic", "seed": 5},
        {"rounding": "compensated", "cautious": True},
        {"rounding": "stochastic", "cautious_weight_decay": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lion_takes_the_same_path_as_on_the_cpu(dtype, more):
    runs = []
    for device in ("cuda", "cpu"):
        params = parameters(device, dtype)
        opt = Lion(params, **OPTIONS, **more)
        for i in range(5):
            set_grads(params, i)
            opt.step()
        runs.append(params + [opt.state[p][key] for p in params for key in opt.state[p]])
    assert same(*runs)


def test_a_step_waits_for_nothing():
    params = parameters("cuda")
    opt = Lion(params, **OPTIONS)
    for i in range(2):
        set_grads(params, i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graph_with_a_live_lr():
    """One captured step, replayed with new gradients and new learning rates, against eager."""
    params, twins = parameters("cuda"), parameters("cpu")
    lr, twin_lr = torch.tensor(1e-2, device="cuda"), torch.tensor(1e-2)
    opt = Lion(params, **{**OPTIONS, "lr": lr})
    twin = Lion(twins, **{**OPTIONS, "lr": twin_lr})

    def eager(seed):
        set_grads(twins, seed)
        twin.step()

    set_grads(params, 0)
    opt.step()
    eager(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for seed, rate in ((1, 1e-2), (2, 3e-3), (3, 0.5)):
        set_grads(params, seed)
        lr.fill_(rate)
        twin_lr.fill_(rate)
        graph.replay()
        eager(seed)
        assert same(params, twins)


def test_graph_of_a_whole_training_step():
    """Gradients that exist inside the graph alone: their table is built while it is captured."""
    inputs = [torch.randn(70, 64, generator=generator(i)).cuda() for i in range(4)]
    runs = []
    for captured in (True, False):
        weight = torch.nn.Parameter(torch.randn(70, 64, generator=generator(9)).cuda())
        opt, x = Lion([weight], **OPTIONS), inputs[0].clone()

        def train(weight=weight, opt=opt, x=x):
            opt.zero_grad(set_to_none=True)
            (weight * x).square().sum().backward()
            opt.step()

        run = train
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            opt.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
            run = graph.replay
        for data in inputs[1:]:
            x.copy_(data)
            run()
        runs.append((weight.detach(), opt.state[weight]["exp_avg"]))
    assert all(bits_equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_table_of_a_capture_is_no_one_elses():
    """Captured on gradients that no step saw before, then stepped eagerly, without a replay."""
    params, twins = parameters("cuda"), parameters("cpu")
    opt, twin = Lion(params, **OPTIONS), Lion(twins, **OPTIONS)
    for seed in range(2):
        set_grads(twins, seed)
        for p in params:
            p.grad = None  # new memory, new table
        held = [torch.empty_like(p) for p in params]
        set_grads(params, seed)
        del held
        if seed == 1:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                opt.step()
        opt.step()
        twin.step()
    torch.cuda.synchronize()
    assert same(params, twins)


def test_captures_in_a_row():
    """Graphs for three sets of gradients, no step between; later ones change no earlier one."""
    params, twins = parameters("cuda"), parameters("cpu")
    opt, twin = Lion(params, **OPTIONS), Lion(twins, **OPTIONS)
    set_grads(params, 0)
    set_grads(twins, 0)
    opt.step()
    twin.step()
    graphs, sets = [], []
    for seed in range(3):
        for p in params:
            p.grad = None
        set_grads(params, 10 + seed)
        sets.append([p.grad for p in params])
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            opt.step()
    for seed in (0, 2, 1, 0):
        graphs[seed].replay()
        set_grads(twins, 10 + seed)
        twin.step()
        assert same(params, twins)


def test_capturing_again_and_again_takes_no_memory():
    params = parameters("cuda")
    opt = Lion(params, **OPTIONS)
    set_grads(params, 0)
    opt.step()
    seen = []
    for _ in range(6):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            opt.step()
        graph.replay()
        torch.cuda.synchronize()
        del graph
        gc.collect()
        torch.cuda.empty_cache()
        seen.append(torch.cuda.memory_reserved())
    assert seen[2:] == [seen[1]] * 4


def test_gradients_elsewhere_in_every_step():
    """Tables are patched on the stream that reads them, also while another stream reads its own."""
    params, twins = parameters("cuda"), parameters("cpu")
    opt, twin = Lion(params, **OPTIONS), Lion(twins, **OPTIONS)
    streams, held = [torch.cuda.Stream() for _ in range(3)], []
    for seed in range(12):
        held.append([p.grad for p in params])
        for p in params:
            p.grad = None
        stream = streams[seed % 3]
        stream.wait_stream(streams[(seed - 1) % 3])
        with torch.cuda.stream(stream):
            set_grads(params, seed)
            opt.step()
        set_grads(twins, seed)
        twin.step()
    torch.cuda.synchronize()
    assert same(params, twins)


def test_what_is_kept_follows_the_model():
    """Moved after a step: momenta, compensations and the counter of steps go along."""
    for options in ({"rounding": "stochastic"}, {"rounding": "compensated"}):
        params, twins = (parameters("cpu", torch.bfloat16) for _ in range(2))
        opt, twin = Lion(params, **OPTIONS, **options), Lion(twins, **OPTIONS, **options)
        for seed in range(4):
            if seed == 2:
                for p in params:
                    p.grad, p.data = None, p.data.cuda()
            for each, o in ((params, opt), (twins, twin)):
                set_grads(each, seed)
                o.step()
        assert same(params, twins)
        assert all(t.is_cuda for p in params for t in opt.state[p].values())


def test_a_step_raises_versions():
    p = torch.nn.Parameter(torch.ones(3000, device="cuda"))
    opt = Lion([p], **OPTIONS)
    p.grad = torch.ones_like(p)
    opt.step()
    before = p._version, opt.state[p]["exp_avg"]._version
    opt.step()
    assert p._version > before[0] and opt.state[p]["exp_avg"]._version > before[1]


def test_capturing_before_the_first_step_is_refused():
    p = torch.nn.Parameter(torch.zeros(12345, device="cuda"))
    opt = Lion([p])
    p.grad = torch.zeros_like(p)
    with (
        pytest.raises(RuntimeError, match="a step must run once"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        opt.step()


@pytest.mark.parametrize("planes", [1, 2])
def test_the_vote_as_two_graphs(planes):
    """encode; the collective, here a copy; elect and apply: two graphs, the step on the device."""
    gen = generator(0)
    numels, n = (700, 33, 5), 3
    layout = BallotLayout(numels, planes, 1)
    results = []
    for device in ("cuda", "cpu"):
        gen = generator(0)
        params = [torch.randn(k, generator=gen).to(device) for k in numels]
        m = [torch.zeros(k, device=device) for k in numels]
        g = [torch.zeros(k, device=device) for k in numels]
        ballot = torch.zeros(1, layout.chunk_words, dtype=torch.int32, device=device)
        received = torch.zeros(n, layout.chunk_words, dtype=torch.int32, device=device)
        verdict_planes = 2 if planes == 2 else 1
        verdict = ballot.new_zeros(1, verdict_planes, layout.words_per_shard)
        blanks = ballot.new_zeros(1, layout.blank_words) if planes == 1 else None
        trailer = trailer_of(layout).to(device)
        shared = torch.tensor([5], device=device)
        step = step_of(0).to(device)
        lr = torch.tensor(0.1, device=device)
        counter = no_counts().to(device)

        def encode(
            g=g, m=m, ballot=ballot, step=step, counter=counter, trailer=trailer, shared=shared
        ):
            chunk = layout.planes_of(ballot), layout.blanks_of(ballot)
            ops.encode(
                g, m, *chunk, 0.5, 0.75, False, 7, 0, step, counter,
                trailers=layout.trailers_of(ballot), trailer=trailer, shared=shared,
            )  # fmt: skip

        def decide(
            params=params, received=received, verdict=verdict, blanks=blanks, step=step, lr=lr
        ):
            ballots, of_ballots = layout.planes_of(received), layout.blanks_of(received)
            ops.elect(
                ballots, verdict[0], n * planes, 0, 7, step, blanks=of_ballots, out_blanks=blanks
            )
            trailers = layout.trailers_of(received)
            ops.apply(params, verdict, blanks, trailers, verdict.shape[1], lr, 0.3, step)

        run = [encode, decide]
        if device == "cuda":
            start = [t.clone() for t in params + m]
            encode()
            received.copy_(ballot.expand_as(received))
            decide()
            for t, old in zip(params + m, start, strict=True):
                t.copy_(old)
            step.zero_()
            counter.zero_()
            run = []
            for call in (encode, decide):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                run.append(graph.replay)
        for i in range(4):
            gen = generator(i)
            for t in g:
                t.copy_(exact(t.numel(), gen))
            lr.fill_(0.1 / (i + 1))
            run[0]()
            received.copy_(ballot.expand_as(received))
            received[1:, : layout.words_per_shard * planes] ^= i
            run[1]()
        results.append([*params, *m, step])
    assert same(*results)
    assert results[0][-1].item() == 4


def test_grad_scaler():
    params, twins = parameters("cuda", torch.float16), parameters("cpu", torch.float16)
    opt, twin = Lion(params, **OPTIONS), Lion(twins, **OPTIONS)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    scaler.scale(torch.ones((), device="cuda"))
    for i in range(4):
        set_grads(params, i)
        set_grads(twins, i)
        for p in params:
            p.grad *= scaler.get_scale()
        if i == 2:
            params[0].grad[3, 3] = torch.inf
            before = copy.deepcopy(params)
        scaler.step(opt)
        scaler.update()
        if i == 2:
            assert same(params, [p.detach().cpu() for p in before])
        else:
            twin.step()
    assert same(params, twins)


@pytest.mark.parametrize(
    "name",
    ["lion_step", "lion_step, skipping", "encode", "encode, scaled", "tally", "elect", "apply"],
)
def test_opcheck(name):
    from test_ops import arguments

    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), arguments()[name])
    torch.library.opcheck(getattr(ops, name.split(",")[0]).default, args)


def test_more_than_2_to_the_31_elements():
    """Offsets beyond int32: the end of a tensor is updated like its beginning."""
    n = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * n:
        pytest.skip(f"needs {8 * n / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")
    p = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    g, m = torch.full_like(p, -1.0), torch.zeros_like(p)
    g[-5:] = 1.0
    ops.lion_step([p], [g], [m], lr_of(0.5), 0.5, 0.5, 0.0, False)
    assert (p[:5] == 1.5).all() and (p[2**31 - 5 : 2**31 + 5] == 1.5).all()
    assert (p[-6] == 1.5) and (p[-5:] == 0.5).all() and (m[-5:] == 0.5).all()
    layout = BallotLayout((n,), 1, 1)
    chunks = torch.zeros(1, layout.chunk_words, dtype=torch.int32, device="cuda")
    planes, blanks, trailers = (
        part(chunks) for part in (layout.planes_of, layout.blanks_of, layout.trailers_of)
    )
    step = step_of(0).cuda()
    ops.encode(
        [g], [m], planes, blanks, 0.5, 0.5, False, 0, 0, step, no_counts().cuda(),
        trailers=trailers, trailer=trailer_of(layout).cuda(),
        shared=torch.zeros(0, dtype=torch.int64, device="cuda"),
    )  # fmt: skip
    ops.apply([p], planes, blanks, trailers, 1, lr_of(0.5), 0.0, step)
    assert (p[:5] == 2.0).all() and (p[2**31 - 5 : 2**31 + 5] == 2.0).all()
    assert (p[-6] == 2.0) and (p[-5:] == 0.0).all()


def vote(rank, device, options):
    params = parameters(device)
    opt = DistributedLion(params, **{**OPTIONS, "betas": (0.5, 0.75)}, **options)
    for i in range(4):
        gen = generator(100 * i + rank)
        for p in params:
            p.grad = exact(p.numel(), gen).view(p.shape).to(device)
        params[i].grad = None if rank == i % 2 else params[i].grad
        opt.step()
    opt.verify_replicas()
    return [p.detach().cpu() for p in params] + [opt.state[p]["exp_avg"].cpu() for p in params]


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_gloo_ranks_share_the_gpu(worlds, n, exchange):
    """Several real processes on one GPU: the parameters and momenta of CPU ranks."""
    options = {"exchange": exchange, "ties": "coin", "seed": 3}
    on_gpu = worlds(n).run(vote, "cuda", options)
    on_cpu = worlds(n).run(vote, "cpu", options)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


def over_nccl(rank, n, store, function, *args):
    torch.cuda.set_device(rank)
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=n)
    try:
        return function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_over_nccl(n, tmp_path, function, *args):
    """function(rank, *args) of n ranks, one GPU and one process each."""
    with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as pool:
        store = str(tmp_path / "store")
        jobs = [pool.submit(over_nccl, rank, n, store, function, *args) for rank in range(n)]
        return [job.result(timeout=100) for job in jobs]


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.nccl) for n in (2, 4))])
def test_nccl_ranks(tmp_path, worlds, n, exchange):
    if n > torch.cuda.device_count():
        pytest.skip(f"needs {n} CUDA devices, got {torch.cuda.device_count()}")
    options = {"exchange": exchange, "ties": "coin", "seed": 3}
    on_gpu = run_over_nccl(n, tmp_path, vote, "cuda", options)
    on_cpu = worlds(n).run(vote, "cpu", options)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


def every_kind_of_shard(rank):
    return [beside_plain_tensors(rank, options, "cuda")[0] for options in KINDS]


def test_fully_shard_on_the_gpu(tmp_path):
    """Forward, backward and step of DTensors on CUDA; one rank, so that one GPU is enough."""
    (results,) = run_over_nccl(1, tmp_path, every_kind_of_shard)
    assert len(results) == len(KINDS) and all(all(same) for same in results)
