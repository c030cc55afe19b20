"""Which parameters a vote moves, and what the ranks agree on before and after it."""

import pytest
import torch

from common import Dispatched, bits_equal, generator
from lion_kernels import DistributedLion, Lion
from lion_kernels.simulate import loopback
from lion_kernels.vote import agreement
from lion_kernels.vote.agreement import hash_parameter, hash_parameters
from lion_kernels.vote.wire import Loopback
from ranks import RankError

HYPER = {"lr": 0.5, "betas": (0.5, 0.75)}


def by_gradient(rank):
    """Master weights: float32 copies that require no gradient and are given one by hand."""
    master, other = torch.zeros(40), torch.zeros(40)
    opt = DistributedLion([master, other], **HYPER)
    for step in range(3):
        master.grad = torch.ones(40)
        other.grad = torch.ones(40) if rank == 0 and step == 0 else None
        opt.step()
    opt.verify_replicas()
    frozen = torch.nn.Parameter(torch.zeros(8))
    opt = DistributedLion([frozen], **HYPER)
    frozen.grad = torch.ones(8)
    frozen.requires_grad_(False)  # while its gradient is still there
    opt.step()
    return master[0].item(), other.abs().max().item() > 0, frozen[0].item()


@pytest.mark.parametrize("n", [1, 3])
def test_what_moves_is_what_has_a_gradient(worlds, n):
    assert worlds(n).run(by_gradient) == [(-1.5, True, -0.5)] * n


def late(rank):
    """A gradient that nothing expected, on every rank in the same step."""
    a, b = torch.nn.Parameter(torch.zeros(400)), torch.zeros(400)
    opt = DistributedLion([a, b], **HYPER)
    sent = []
    for step in range(4):
        a.grad = torch.ones(400)
        b.grad = torch.ones(400) if step == 2 else None
        opt.step()
        sent.append(opt.wire_bytes)
    opt.verify_replicas()
    return b[0].item(), sent[1] - sent[0], sent[3] - sent[2]


def test_a_late_voter_joins_and_stays(worlds):
    for value, before, after in worlds(3).run(late):
        assert value == -0.5 and before < after


def no_gradients(rank, scaled):
    """On rank 0 no parameter has a gradient: it takes part with zero votes."""
    params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(2)]
    opt = DistributedLion(params, **HYPER, ballots="ternary")
    for step in range(3):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad = None if rank == 0 else torch.full((40,), 8.0 if scaled else 1.0)
        if scaled and step == 1 and rank == 1:
            params[0].grad[3] = torch.inf
        scaler.step(opt) if scaled else opt.step()
    opt.verify_replicas()
    return [p[0].item() for p in params]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_rank_without_gradients_takes_part(worlds, scaled):
    """Two of three steps count where one overflows."""
    wanted = [-1.0] * 2 if scaled else [-1.5] * 2
    assert worlds(3).run(no_gradients, scaled) == [wanted] * 3


def named(rank, reverse):
    pairs = [("encoder", torch.nn.Parameter(torch.full((3,), 1.0)))]
    pairs.append(("decoder", torch.nn.Parameter(torch.full((3,), 2.0))))
    pairs = pairs[::-1] if rank == reverse else pairs
    try:
        DistributedLion(pairs, **HYPER)
    except RuntimeError as error:
        return str(error), {name: p[0].item() for name, p in pairs}


def test_two_orders_of_the_same_shapes_are_found_before_the_broadcast(worlds):
    for text, values in worlds(2).run(named, 1):
        assert text == (
            "ranks disagree on the name of parameter 0 of group 0: "
            "encoder on rank 0; decoder on rank 1"
        )
        assert values == {"encoder": 1.0, "decoder": 2.0}
    assert worlds(2).run(named, None) == [None] * 2


def nonfinite(rank, how):
    p = torch.nn.Parameter(torch.zeros(3))
    if how == "construction":
        DistributedLion([{"params": [p], "nonfinite": "propagate"}], **HYPER)
    opt = DistributedLion([p], **HYPER)
    if how == "load":
        opt.load_state_dict(Lion([p]).state_dict())
    if how == "edit":
        opt.param_groups[0]["nonfinite"] = "propagate"
    p.grad = torch.ones(3)
    opt.step()
    return opt.param_groups[0]["nonfinite"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("how", ["construction", "edit"])
def test_nonfinite_is_not_for_votes(worlds, n, how):
    with pytest.raises(RankError, match=r"nonfinite is not for DistributedLion.* 'propagate'"):
        worlds(n).run(nonfinite, how)
    assert worlds(n).run(nonfinite, "load") == ["skip"] * n


def failed_group(rank):
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    opt = DistributedLion([p], **HYPER)
    for bad in ({"lr": "1e-4"}, {"betas": None}, {"nonfinite": "propagate"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            opt.add_param_group({"params": [q], **bad})
        assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [q]})


def test_a_failed_group_is_not_left_behind(worlds):
    worlds(2).run(failed_group)


def taken_out(rank):
    """Voters that leave their group, and a group that leaves."""
    params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(4)]
    opt = DistributedLion([{"params": params[:3]}, {"params": params[3:]}], **HYPER)
    for step in range(3):
        for p in params:
            p.grad = torch.ones(40)
        opt.step()
        if step == 0:
            del opt.param_groups[0]["params"][2]
        if step == 1:
            del opt.param_groups[0]
    opt.verify_replicas()
    return [p[0].item() for p in params]


def test_voters_may_leave(worlds):
    assert worlds(2).run(taken_out) == [[-1.0, -1.0, -0.5, -1.5]] * 2


def odd_frozen(rank):
    quantised = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    frozen = [torch.full((1,), float(rank)).expand(4), quantised]
    p = torch.nn.Parameter(torch.zeros(4))
    opt = DistributedLion([p, *frozen], **HYPER)
    p.grad = torch.ones(4)
    opt.step()
    return p[0].item()


def test_frozen_tensors_that_no_message_holds(worlds):
    assert worlds(2).run(odd_frozen) == [-0.5] * 2


# Hashes and messages


def test_small_tensors_are_hashed_together():
    """A handful of ops for a thousand tensors, beside a view of each; the same hash tells a bit,
    a place and a neighbour."""
    gen = generator(0)
    params = [torch.randn(n % 70, generator=gen) for n in range(1000)]
    with Dispatched() as seen:
        hashes = hash_parameters(params)
    arithmetic = [n for n in seen.names if n.split("::")[1] in ("mul", "sum", "cumsum", "cat")]
    assert len(arithmetic) <= 10 and hashes.shape == (1000,)
    for t in (5, 699, 999):
        changed = [p.clone() for p in params]
        changed[t].view(torch.int32)[2] ^= 1
        apart = hash_parameters(changed) != hashes
        assert apart[t] and apart.sum() == 1
    swapped = [params[-1], *params[1:-1], params[0]]
    assert (hash_parameters(swapped) != hashes)[-1]


@pytest.mark.parametrize("n", [1, 1 << 17, (1 << 18) + 1, (9 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
def test_hashes_see_the_last_element_of_any_type(n, dtype):
    n //= dtype.itemsize
    t = torch.zeros(n + 1).to(dtype)
    before = hash_parameter(t)
    assert before == hash_parameters([t, t])[0] or n > 1000
    t[-1] = 1
    assert hash_parameter(t) != before
    assert hash_parameter(t) == hash_parameter(torch.stack([t, t])[1])


def messages(rank):
    params = [torch.nn.Parameter(torch.full((k % 9, 3), float(rank))) for k in range(1000)]
    params.append(torch.nn.Parameter(torch.full((5, 4), float(rank)).t()))
    with Dispatched() as seen:
        opt = DistributedLion(params, **HYPER)
        opt.verify_replicas()
    assert all(bits_equal(p.detach(), torch.zeros_like(p)) for p in params)
    assert params[-1].stride() == (1, 4)
    return sum(name.startswith("c10d::") for name in seen.names)


def test_a_thousand_parameters_travel_in_a_few_messages(worlds):
    assert max(worlds(2).run(messages)) <= 8


def test_messages_are_cut_by_bytes():
    parts = list(agreement._in_parts([torch.zeros(n) for n in (10, 10, 50, 1, 1)], 80))
    assert [[t.numel() for t in part] for part in parts] == [[10, 10], [50], [1, 1]]


def test_equal_facts_travel_as_a_digest(monkeypatch):
    sent = []
    values = Loopback.values
    monkeypatch.setattr(
        Loopback,
        "values",
        lambda wire, value, *rest: sent.append(value) or values(wire, value, *rest),
    )
    facts = [(f"fact {i}", "x" * 100) for i in range(1000)]
    for wire in loopback(2):
        wire.drive(agreement.compare_facts(facts, wire, torch.device("cpu")))
    assert [[len(part) for part in value] for value in sent] == [[30, 64], [30, 64]]
