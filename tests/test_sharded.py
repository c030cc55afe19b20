"""Lion on DTensors: each rank steps its shard of a model that fully_shard cut, over Gloo."""

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


def sharded(options):
    from torch.distributed.fsdp import fully_shard

    model = model_of(options)
    fully_shard(model)
    return model, Lion(model.named_parameters(), **OPTIONS, **options)


def backward(model, step):
    """The same batch on every rank: gradients of the mean are those of one process."""
    x = torch.randn(8, 61, generator=generator(step)).to(next(model.parameters()).dtype)
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


def beside_plain_tensors(rank, options):
    """Each shard beside a plain tensor with its values and its gradients."""
    model, opt = sharded(options)
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


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (rescaled, 'cautious="rescaled" counts whole tensors: parameter 0 of group 0'),
        (foreign_state, "the exp_avg of parameter 0 must be a DTensor that is cut as"),
        (voting, r"DistributedLion votes on plain tensors: parameter 0 of group 0 is a DTensor"),
    ],
)
def test_errors_name_the_rule(worlds, function, message):
    with pytest.raises(RankError, match=message):
        worlds(2).run(function)
