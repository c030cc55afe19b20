"""What owns parameters beside the optimizer: DistributedLion refuses shards before it writes any,
takes frozen strangers, and Lion says where a state has no place."""

import pytest
import torch
import torch.distributed as dist

from lion_kernels import DistributedLion, Lion
from ranks import RankError

HYPER = {"lr": 0.5, "betas": (0.5, 0.75)}


def flat_shards(original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=original)


def vote_on_flat_shards(rank, original):
    net = flat_shards(original)
    before = [p.detach().clone() for p in net.parameters()]
    try:
        DistributedLion(net.parameters(), **HYPER)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("original", [False, True])
def test_flat_shards_are_refused_before_the_broadcast(worlds, original):
    for text, same in worlds(2).run(vote_on_flat_shards, original):
        assert same and "parameter 0 of group 0 is a flat shard of FSDP1" in text
        assert "DDP with a no-op communication hook" in text


def put_in_later(rank, how):
    """A group's parameters become shards after construction, as accelerate does with FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = torch.nn.Linear(6, 4)
    opt = DistributedLion(net.parameters(), **HYPER)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(net, mesh=mesh)
    else:
        fully_shard(net, mesh=mesh)
    opt.param_groups[0]["params"] = list(net.parameters())
    net(torch.ones(2, 6)).sum().backward()
    before = [p.to_local().detach().clone() for p in net.parameters()]
    try:
        opt.step()
    except ValueError as error:
        after = [p.to_local() for p in net.parameters()]
        return str(error), all(map(torch.equal, before, after))


@pytest.mark.parametrize("how", ["fully_shard", "replicate"])
def test_shards_put_in_later_are_refused_in_the_step(worlds, how):
    for text, same in worlds(2).run(put_in_later, how):
        assert same and "parameter 0 of group 0 is a DTensor, as fully_shard and replicate" in text


def beside_frozen(rank):
    """Frozen parameters of any kind, shards among them, cost no bytes and stay on their ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = torch.nn.Linear(6, 4).requires_grad_(False)
    fully_shard(base, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    adapter = torch.nn.Parameter(torch.full((64,), float(rank)))
    frozen = [
        torch.full((4,), rank, dtype=torch.uint8),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(4, device="meta"),
        *base.parameters(),
        *flat_shards(False).requires_grad_(False).parameters(),
    ]
    shards = [p.to_local() if hasattr(p, "to_local") else p for p in frozen[3:]]
    before = [s.detach().clone() for s in shards]
    opt = DistributedLion([*frozen, adapter], **HYPER)
    adapter.grad = torch.ones(64)
    opt.step()
    sent = opt.wire_bytes
    opt.verify_replicas()
    alone = DistributedLion([torch.nn.Parameter(torch.ones(64))], **HYPER)
    alone.param_groups[0]["params"][0].grad = torch.ones(64)
    alone.step()
    assert all(map(torch.equal, before, shards))
    assert sent == alone.wire_bytes and list(opt.state) == [adapter]
    return adapter.detach().clone(), int(frozen[0][0])


def test_frozen_parameters_beside_an_adapter(worlds):
    for adapter, frozen in worlds(2).run(beside_frozen):
        assert torch.equal(adapter, torch.full((64,), -0.5)) and frozen == 0  # rank 0's


def int8_under_fsdp1(rank, original, options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = flat_shards(original)
    opt = Lion(net.parameters(), **HYPER, **options)
    net(torch.ones(2, 6)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    try:
        opt.step()
    except ValueError as error:
        return str(error), all(map(torch.equal, before, net.parameters()))
    state = FullyShardedDataParallel.optim_state_dict(net, opt)
    return {k: v["exp_avg"].dtype for k, v in state["state"].items()}


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_states(worlds, original):
    """int8 momenta are refused before anything moves; others are gathered."""
    for text, same in worlds(2).run(int8_under_fsdp1, original, {"momentum_dtype": "int8"}):
        assert same and text.startswith("int8 momenta have scales, for which FSDP1's optimizer")
    first, _ = worlds(2).run(int8_under_fsdp1, original, {"momentum_dtype": "bfloat16"})
    assert set(first) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(first.values()) == {torch.bfloat16}


def full_state(rank, rounding):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 4).bfloat16()
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return net, Lion(net.parameters(), lr=1e-4, rounding=rounding)

    net, opt = build()
    for _ in range(3):
        net(torch.ones(2, 6).bfloat16()).sum().backward()
        opt.step()
        opt.zero_grad()
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(net, opt, options=options)
    again, other = build()
    set_optimizer_state_dict(again, other, state, options=options)
    return [
        torch.equal(a.to_local().view(torch.int16), b.to_local().view(torch.int16))
        for p, q in zip(net.parameters(), again.parameters(), strict=True)
        for a, b in zip(opt.state[p].values(), other.state[q].values(), strict=True)
    ]


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_full_state_is_gathered_and_scattered(worlds, rounding):
    """Over collectives that carry no 16-bit integers."""
    for same in worlds(2).run(full_state, rounding):
        assert len(same) == (4 if rounding == "compensated" else 2) and all(same)


def dtensor_versions(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = torch.nn.Linear(6, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    opt = Lion(net.parameters(), **HYPER)
    versions = []
    for _ in range(2):
        net(torch.ones(2, 6)).sum().backward()
        opt.step()
        p = next(net.parameters())
        versions.append([t._version for t in (p, *opt.state[p].values())])
    return all(b > a for a, b in zip(*versions, strict=True))


def test_versions_of_dtensors(worlds):
    assert worlds(2).run(dtensor_versions) == [True] * 2


def replicated(rank):
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.device_mesh import init_device_mesh

    net = torch.nn.Linear(6, 4)
    replicate(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    DistributedLion(net.parameters(), **HYPER)


def test_replicate_is_refused_at_construction(worlds):
    with pytest.raises(RankError, match="a DTensor, as fully_shard and replicate make them"):
        worlds(2).run(replicated)


def under_ddp(rank):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    opt = Lion(ddp.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        ddp(torch.randn(4, 6)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_lion_under_ddp_steps_averaged_gradients(worlds):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    opt = Lion(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        batches = []
        for rank in range(2):
            torch.manual_seed(10 * step + rank)
            batches.append(torch.randn(4, 6))
        sum(model(x).square().mean() for x in batches).div(2).backward()
        opt.step()
        opt.zero_grad()
    for params in worlds(2).run(under_ddp):
        for p, q in zip(params, model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-7)
