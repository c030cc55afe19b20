"""What the ranks of a vote have to agree on, and how they notice that they do not."""

import pickle
import re

import pytest
import torch
import torch.distributed as dist

from common import generator
from lion_kernels import DistributedLion
from lion_kernels.vote.agreement import hash_parameter
from ranks import RankError
from voters import HYPER, parameters, set_gradients


def construct(rank, changes, options):
    """Construct with rank-dependent parameters or options."""
    params = parameters()
    mine = {**HYPER, **options}
    if rank in changes:
        kind, value = changes[rank]
        if kind == "shape":
            params[1] = torch.nn.Parameter(torch.zeros(value))
        elif kind == "dtype":
            params[2] = torch.nn.Parameter(params[2].detach().to(value))
        elif kind == "layout":
            params[0] = torch.nn.Parameter(params[0].detach().t().contiguous().t())
        elif kind == "fewer":
            params.pop()
        elif kind == "frozen":
            params[0].requires_grad_(False)
        else:
            mine[kind] = value
    return DistributedLion(params, **mine).exchange


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: ("shape", (34,))}, r"shape of parameter 1 of group 0: \(33,\) on ranks 0, 2; \(34,\)"),
        (
            {0: ("dtype", torch.bfloat16)},
            "dtype of parameter 2 of group 0: torch.bfloat16 on rank 0",
        ),
        ({2: ("layout", None)}, "memory layout of parameter 0 of group 0: .* on rank 2"),
        ({2: ("fewer", None)}, "number of parameters of group 0: 5 on ranks 0, 1; 4 on rank 2"),
        ({1: ("frozen", None)}, "requires_grad of parameter 0 of group 0: .* False on rank 1"),
        ({1: ("lr", 0.5)}, "lr of group 0: 0.01 on ranks 0, 2; 0.5 on rank 1"),
        ({1: ("weight_decay", 0.5)}, "weight_decay of group 0"),
        ({1: ("betas", (0.1, 0.2))}, "betas of group 0"),
        ({0: ("maximize", True)}, "maximize of group 0"),
        ({2: ("seed", 9)}, "seed: 0 on ranks 0, 1; 9 on rank 2"),
        ({2: ("ballots", "ternary")}, "ballots: binary on ranks 0, 1; ternary on rank 2"),
        ({1: ("exchange", "sharded")}, "exchange: allgather on ranks 0, 2; sharded on rank 1"),
    ],
)
def test_a_mismatch_raises_on_every_rank(worlds, changes, message):
    outcomes = worlds(3).outcomes(construct, changes, {})
    for ok, text in outcomes:
        assert not ok and text.startswith("RuntimeError: ranks disagree on the ")
        assert re.search(message, text)


def test_auto_says_which_exchange_it_picked(worlds):
    assert worlds(3).run(construct, {}, {}) == ["allgather"] * 3
    assert worlds(4).run(construct, {}, {}) == ["sharded"] * 4


def start_apart(rank, broadcast):
    params = parameters(seed=rank)
    params.append(torch.nn.Parameter(torch.randn(6, 8, generator=generator(rank))[:, ::2]))
    params.append(torch.nn.Parameter(torch.full((5,), complex(rank, 1))))
    opt = DistributedLion(params, **HYPER, broadcast=broadcast)
    try:
        opt.verify_replicas()
    except RuntimeError as error:
        return str(error)
    return [p.detach().clone() for p in params]


def test_parameters_are_broadcast_from_rank_0(worlds):
    results = worlds(3).run(start_apart, True)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))
    assert torch.equal(results[0][0], parameters(seed=0)[0])
    for text in worlds(3).run(start_apart, False):
        assert text.startswith("replicas differ: parameter 0 of group 0 has hash ")


def drift(rank, check_every):
    named = [(f"layer{t}", p) for t, p in enumerate(parameters())]
    params = [p for _, p in named]
    opt = DistributedLion(named, **HYPER, check_every=check_every)
    for step in range(6):
        set_gradients(params, rank, step)
        opt.step()
        if step == 2 and rank == 1:
            params[2].detach().view(torch.int32)[17] ^= 1  # the last bit of one element


def test_check_every_names_what_differs(worlds):
    worlds(3).run(drift, 0)
    for ok, text in worlds(3).outcomes(drift, 2):
        assert not ok
        assert "replicas differ: parameter 2 of group 0 ('layer2') has hash" in text
        assert "on ranks 0, 2;" in text and "on rank 1" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("n", [0, 1, 5, 65_535, 65_536, 65_537, 200_000])
def test_hash_sees_every_bit_and_the_order(n, dtype):
    p = torch.randn(n, dtype=dtype, generator=generator(n))
    base = hash_parameter(p).item()
    assert base == hash_parameter(p.clone()).item()
    for i in {0, n // 2, n - 1} if n else ():
        q = p.clone()
        real = torch.view_as_real(q).view(-1) if dtype == torch.complex64 else q
        real.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[i] ^= 1
        assert hash_parameter(q).item() != base
    if n > 1:
        assert hash_parameter(p.flip(0)).item() != base


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        DistributedLion(parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "aggregation must be 'majority' or 'average', got 'mean'"),
        ({"ballots": "unary"}, "ballots must be 'binary' or 'ternary', got 'unary'"),
        ({"ties": "up"}, "ties must be 'zero' or 'coin', got 'up'"),
        ({"exchange": "ring"}, "exchange must be 'auto', 'allgather' or 'sharded', got 'ring'"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"check_every": -1}, "check_every must be an integer at least 0, got -1"),
        ({"check_every": "5"}, "check_every must be an integer at least 0, got '5'"),
        ({"broadcast": "no"}, "broadcast must be False or True, got 'no'"),
        ({"lr": -0.1}, "lr must be at least 0 and finite, got -0.1"),
        ({"cautious": "rescaled"}, "votes have none"),
    ],
)
def test_bad_options(options, message, worlds):
    for ok, text in worlds(2).outcomes(construct, {}, options):
        assert not ok and text.startswith("ValueError")
        assert re.search(message, text)


def wrong_group(rank):
    other = dist.new_group([0])
    if rank == 1:
        DistributedLion(parameters(), process_group=other)


def pickled(rank):
    opt = DistributedLion(parameters(), **HYPER)
    pickle.dumps(opt)


def test_wrong_group_and_pickling(worlds):
    with pytest.raises(RankError, match="process_group must be a group that this rank is in"):
        worlds(2).run(wrong_group)
    with pytest.raises(RankError, match="TypeError: DistributedLion holds a process group"):
        worlds(2).run(pickled)
