"""Lion on DTensors: each rank steps its shard of a model that fully_shard cut, over Gloo and on
CPUs; test_cuda.py has the GPU's case."""

import pytest
import torch

from common import bits_equal, generator
from lion_kernels import DistributedLion, Lion
from ranks import RankError

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
KINDS = [
    {},
    {"momentum_dtype": "int8"},
    {"momentum_dtype": "bfloat16", "rounding": "compensated", "nonfinite": "skip"},
    {"momentum_dtype": "int8", "rounding": "stochastic", "cautious": True},
]


def model_of(options):
    """Sizes that no world divides, and a last rank without a row of the second bias."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(61, 37), torch.nn.ReLU(), torch.nn.Linear(37, 2)]
    half = "rounding" in options
    return torch.nn.Sequential(*layers).to(torch.bfloat16 if half else torch.float32)


def mesh_on(device):
    """All ranks. Named, because fully_shard's own mesh is CUDA's on a machine that has CUDA."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (torch.distributed.get_world_size(),))


def sharded(options, device="cpu"):
    from torch.distributed.fsdp import fully_shard

    model = model_of(options).to(device)
    fully_shard(model, mesh=mesh_on(device))
    return model, Lion(model.named_parameters(), **OPTIONS, **options)


def backward(model, step):
    """The same batch on every rank: gradients of the mean are those of one process."""
    p = next(model.parameters())
    x = torch.randn(8, 61, generator=generator(step)).to(p.device, p.dtype)
    model(x).float().square().mean().backward()


def train(model, opt, steps):
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        opt.step()


def local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def tensors(model, opt):
    params = list(model.parameters())
    return [local(t).detach().clone() for p in params for t in (p, *opt.state[p].values())]


def beside_plain_tensors(rank, options, device="cpu"):
    """Each shard beside a plain tensor with its values and its gradients."""
    model, opt = sharded(options, device)
    plain = [torch.nn.Parameter(local(p).detach().clone()) for p in model.parameters()]
    twin = Lion(plain, **OPTIONS, **options)
    for step in range(4):
        opt.zero_grad()
        backward(model, step)
        for p, q in zip(model.parameters(), plain, strict=True):
            q.grad = local(p.grad).clone()
        opt.step()
        twin.step()
    pairs = zip(model.parameters(), plain, strict=True)
    same = [bits_equal(local(p).detach(), q.detach()) for p, q in pairs]
    for p, q in zip(model.parameters(), plain, strict=True):
        whole, twin_whole = local(opt.float32_parameter(p)), twin.float32_parameter(q)
        same.append(bits_equal(whole, twin_whole))
    exported = opt.export_state_dict("lion-pytorch")["state"]
    twins = twin.export_state_dict("lion-pytorch")["state"]
    same += [bits_equal(local(exported[i]["exp_avg"]), twins[i]["exp_avg"]) for i in twins]
    assert all(local(p).device.type == device for p in model.parameters())
    return same, [p.numel() for p in plain]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("n", [2, 3])
def test_a_shard_goes_the_way_of_a_plain_tensor(worlds, n, options):
    results = worlds(n).run(beside_plain_tensors, options)
    assert all(all(same) for same, _ in results)
    assert n == 2 or results[2][1][-1] == 0  # the last rank has nothing of the last bias
    assert len({tuple(sizes) for _, sizes in results}) > 1  # shards are uneven


def whole_weights(rank, options):
    model, opt = sharded(options)
    train(model, opt, range(4))
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"rounding": "compensated"}])
def test_equals_one_process(worlds, options):
    """The mean of two equal gradients is exact."""
    model = model_of(options)
    train(model, Lion(model.parameters(), **OPTIONS, **options), range(4))
    for weights in worlds(2).run(whole_weights, options):
        assert all(
            bits_equal(a, b.detach()) for a, b in zip(weights, model.parameters(), strict=True)
        )


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}])
def test_fused_backward(worlds, options):
    released = worlds(2).run(whole_weights, {**options, "fused_backward": True})
    for a, b in zip(released, worlds(2).run(whole_weights, options), strict=True):
        assert all(bits_equal(p, q) for p, q in zip(a, b, strict=True))


def checkpoint(rank, folder, options, cut):
    """Six steps; at `cut`, saved and loaded into a new model and a new optimizer."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, opt = sharded(options)
    train(model, opt, range(3))
    if cut:
        model_state, opt_state = get_state_dict(model, opt)
        dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=folder)
        model, opt = sharded(options)
        model_state, opt_state = get_state_dict(model, opt)
        state = {"model": model_state, "opt": opt_state}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    train(model, opt, range(3, 6))
    return tensors(model, opt)


@pytest.mark.parametrize("options", KINDS)
def test_distributed_checkpoint(worlds, tmp_path, options):
    straight, resumed = (
        worlds(3).run(checkpoint, str(tmp_path), options, cut) for cut in (False, True)
    )
    for a, b in zip(straight, resumed, strict=True):
        assert all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


def save(rank, folder, options):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, opt = sharded(options)
    train(model, opt, range(3))
    dcp.save({"opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=folder)
    exported = opt.export_state_dict("lion-pytorch")["state"]
    return [m.full_tensor() for m in (state["exp_avg"] for state in exported.values())]


def load(rank, folder, options, dim):
    """Whole momenta after loading into shards of dimension `dim`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = model_of(options)
    cut = {"shard_placement_fn": lambda p: Shard(min(dim, p.dim() - 1))}
    fully_shard(model, mesh=mesh_on("cpu"), **cut)
    opt = Lion(model.named_parameters(), **OPTIONS, **options)
    state = {"opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, opt, state["opt"])
    return [opt.state[p]["exp_avg"].full_tensor() for p in model.parameters()]


@pytest.mark.parametrize(("n", "dim"), [(3, 0), (4, 0)])
def test_a_checkpoint_in_another_world(worlds, tmp_path, n, dim):
    """Float momenta are cut anew; int8 blocks cannot be, and every rank says so."""
    folder = str(tmp_path / "float")
    saved = worlds(2).run(save, folder, {})[0]
    for momenta in worlds(n).run(load, folder, {}, dim):
        assert all(bits_equal(a, b) for a, b in zip(momenta, saved, strict=True))
    folder = str(tmp_path / "int8")
    worlds(2).run(save, folder, {"momentum_dtype": "int8"})
    outcomes = worlds(n).outcomes(load, folder, {"momentum_dtype": "int8"}, dim)
    assert all(not ok and "exp_avg_scale" in text for ok, text in outcomes)


def cut_the_other_way(rank):
    """A (512, 512) parameter has as many scales a rank whichever dimension is cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole, opts = torch.randn(512, 512, generator=generator(0)), []
    for dim in (0, 1):
        p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)]))
        opts.append(Lion([p], **OPTIONS, momentum_dtype="int8"))
        p.grad = distribute_tensor(whole, mesh, [Shard(dim)])
        opts[-1].step()
    state, kept = opts[0].state_dict(), opts[1].state_dict()["state"][0]
    state["state"][0]["exp_avg"] = kept["exp_avg"]  # what a checkpoint would have cut anew
    opts[1].load_state_dict(state)


def whole_state(rank, options):
    """The optimizer's state in one piece, as checkpoints of one file take it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model, opt = sharded(options)
    train(model, opt, range(3))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, opt, options=whole)


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
def test_a_state_in_one_piece_loads_into_a_plain_model(worlds, momentum_dtype):
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    options = {"momentum_dtype": momentum_dtype}
    state = worlds(2).run(whole_state, options)[0]
    model, twin = model_of(options), model_of(options)
    opt, expected = (Lion(m.named_parameters(), **OPTIONS, **options) for m in (model, twin))
    train(twin, expected, range(3))
    set_optimizer_state_dict(model, opt, state)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert bits_equal(opt.state[p]["exp_avg"], expected.state[q]["exp_avg"])


def with_a_partial_gradient(rank):
    """Tensor parallelism gives replicated parameters gradients that are still to be summed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(50, generator=generator(1))
    p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
    q = torch.nn.Parameter(whole.clone())
    mine, theirs = (torch.randn(50, generator=generator(2 + r)) for r in (rank, 1 - rank))
    p.grad = DTensor.from_local(mine, mesh, [Partial()])
    q.grad = mine + theirs
    for t in (p, q):
        Lion([t], **OPTIONS).step()
    return p.full_tensor().detach(), q.detach()


def test_a_partial_gradient_is_summed(worlds):
    for a, b in worlds(2).run(with_a_partial_gradient):
        assert bits_equal(a, b)


def foreign_state(rank):
    model, opt = sharded({"momentum_dtype": "int8"})
    train(model, opt, range(2))
    state = opt.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(37, 61, dtype=torch.int8)
    opt.load_state_dict(state)


def voting(rank):
    model, _ = sharded({})
    DistributedLion(model.parameters())


def rescaled(rank):
    sharded({"cautious": "rescaled"})


def rescaled_later(rank):
    _, opt = sharded({})
    state = opt.state_dict()
    state["param_groups"][0]["cautious"] = "rescaled"
    opt.load_state_dict(state)


def rescaled_vote(rank):
    DistributedLion([{"params": [torch.nn.Parameter(torch.ones(3))], "cautious": "rescaled"}])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (rescaled, 'cautious="rescaled" counts whole tensors: parameter 0 of group 0'),
        (rescaled_later, 'cautious="rescaled" counts whole tensors: parameter 0 of group 0'),
        (rescaled_vote, 'cautious="rescaled" changes the size of updates'),
        (
            foreign_state,
            "the exp_avg of parameter 0 of group 0 .* must be cut as the parameter, .* got no DTen",
        ),
        (cut_the_other_way, r"float32 exp_avg_scale of shape \(1, 2, 1024\), got \(2, 1, 1024\)"),
        (voting, r"DistributedLion votes on whole, plain .*parameter 0 of group 0 is a DTensor"),
    ],
)
def test_errors_name_the_rule(worlds, function, message):
    with pytest.raises(RankError, match=message):
        worlds(2).run(function)
