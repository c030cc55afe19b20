"""Ranks that part ways: named on every rank, before a parameter is written; nothing hangs."""

import re

import pytest
import torch
import torch.distributed as dist

from common import Workers, bits_equal
from lion_kernels import DistributedLion
from lion_kernels.simulate import loopback

HYPER = {"lr": 0.5, "betas": (0.5, 0.75)}


def model(rank, **options):
    params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(3)]
    group = dist.new_group()
    return params, DistributedLion(params, **HYPER, process_group=group, **options)


def step(params, opt, gradient=1.0):
    for p in params:
        p.grad = torch.full_like(p, gradient) if p.requires_grad else None
        if hasattr(p, "is_sparse_here"):
            p.grad = p.grad.to_sparse()
    opt.step()


def change(what, params, opt):
    """What one rank does alone between two steps."""
    group = opt.param_groups[0]
    if what == "lr":
        group["lr"] = 0.25
    elif what == "tensor lr":
        group["lr"] = torch.tensor(0.25)
    elif what == "betas":
        group["betas"] = (0.5, 0.5)
    elif what == "weight_decay":
        group["weight_decay"] = 0.1
    elif what == "load":
        state = opt.state_dict()
        state["param_groups"][0]["step"] = 7
        opt.load_state_dict(state)
    elif what == "frozen":
        params[1].requires_grad_(False)
    elif what == "fewer":
        del group["params"][2]
    elif what == "refused option":
        group["lr"] = -1.0
    elif what == "dtype":
        params[1].data = params[1].data.half()
    elif what == "sparse":
        params[1].is_sparse_here = True
    elif what == "shape":
        opt.state[params[1]]["exp_avg"] = torch.zeros(7)
    elif what == "joined":
        late = torch.zeros(40)
        opt.param_groups[0]["params"].append(late)
        params.append(torch.nn.Parameter(late))
        late.grad = torch.ones(40)


NAMED = {
    "lr": "ranks disagree on the lr of group 0: 0.5 on ranks 0, 2; 0.25 on rank 1",
    "tensor lr": "ranks disagree on the lr of group 0: 0.5 on ranks 0, 2; 0.25 on rank 1",
    "betas": r"ranks disagree on the betas of group 0: .* \(0.5, 0.5\) on rank 1",
    "weight_decay": "ranks disagree on the weight_decay of group 0: .* 0.1 on rank 1",
    "load": "ranks disagree on the step of group 0: 2 on ranks 0, 2; 7 on rank 1",
    "frozen": "ranks disagree on the requires_grad of parameter 1 of group 0: .* False on rank 1",
    "fewer": "number of parameters of group 0: 3 on ranks 0, 2; 2 on rank 1",
    "joined": "number of parameters of group 0: 3 on ranks 0, 2; 4 on rank 1",
    "refused option": r"lr must be at least 0 and finite, got -1.0 \(on rank 1\)",
    "dtype": "ranks disagree on the dtype of parameter 1 of group 0: .* torch.float16 on rank 1",
    "sparse": r"does not support sparse gradients: parameter 1 of group 0 .* \(on rank 1\)",
    "shape": r"exp_avg of parameter 1 of group 0 must have shape .* \(on rank 1\)",
}


def one_alone(rank, what, steps, options):
    params, opt = model(rank, **options)
    for _ in range(steps):
        step(params, opt)
    before = [p.detach().clone() for p in params]
    if rank == 1:
        change(what, params, opt)
    try:
        step(params[:3], opt)
    except (RuntimeError, ValueError) as error:
        is_same = all(
            bits_equal(p.detach(), b) for p, b in zip(params, before, strict=False)
            if p.dtype == b.dtype
        )  # fmt: skip
        return type(error).__name__, str(error), is_same
    return "nothing", "", True


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize("what", NAMED)
def test_what_one_rank_changes_alone(worlds, what, exchange):
    seen = worlds(3).run(one_alone, what, 2, {"exchange": exchange})
    assert len({(kind, text) for kind, text, _ in seen}) == 1  # the same error everywhere
    assert re.search(NAMED[what], seen[0][1]), seen[0][1]
    assert all(is_same for _, _, is_same in seen)
    assert seen[0][0] == ("ValueError" if what in ("refused option", "shape") else "RuntimeError")


@pytest.mark.parametrize("what", ["refused option", "lr", "frozen"])
def test_in_the_first_step(worlds, what):
    seen = worlds(2).run(one_alone, what, 0, {})
    assert len({(kind, text) for kind, text, _ in seen}) == 1
    named = NAMED[what].replace("ranks 0, 2", "rank 0")
    assert re.search(named, seen[0][1]), seen[0][1]


def goes_on(rank):
    """After an error, what was wrong is put right."""
    params, opt = model(rank, ballots="ternary")
    step(params, opt)
    for what in ("lr", "refused option"):
        if rank == 1:
            change(what, params, opt)
        with pytest.raises((RuntimeError, ValueError)):
            step(params, opt)
        opt.param_groups[0]["lr"] = 0.5
    step(params, opt)
    opt.verify_replicas()
    return params[0][0].item(), int(opt.param_groups[0]["step"])


def test_a_refused_step_leaves_parameters_and_counters(worlds):
    assert worlds(3).run(goes_on) == [(-1.0, 2)] * 3


def together(rank):
    """What all ranks change in the same step: frozen and thawed layers change no size; another
    list of parameters is agreed on anew."""
    params, opt = model(rank)
    sent = [0]

    def sends():
        step(params, opt)
        sent.append(opt.wire_bytes - sum(sent))

    sends()
    params[1].requires_grad_(False)
    sends()
    sends()
    params[1].requires_grad_(True)
    sends()
    late = torch.zeros(400)
    opt.add_param_group({"params": [late]})
    sends()
    late.grad = torch.ones(400)
    sends()
    late.grad = torch.ones(400)
    sends()
    opt.verify_replicas()
    return sent[1:], [p[0].item() for p in params], late[0].item()


def test_what_all_ranks_change_together(worlds):
    for sent, values, late in worlds(2).run(together):
        assert values == [-3.5, -2.5, -3.5] and late == -1.0
        assert sent[0] == sent[1] == sent[2] == sent[3]  # presence flags alone
        assert sent[6] > sent[3]


def two_orders(rank, alike):
    """Two optimizers of one process group, stepped in another order on rank 1."""
    group = dist.new_group()
    sizes = (64, 64) if alike else (64, 6400)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    opts = [DistributedLion([p], **HYPER, process_group=group) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    for opt in opts:
        opt.step()
    before = [p.detach().clone() for p in params]
    try:
        for opt in opts if rank != 1 else opts[::-1]:
            opt.step()
    except RuntimeError as error:
        return str(error), all(map(torch.equal, before, params))
    return "nothing", True


@pytest.mark.parametrize("alike", [False, True])
def test_two_optimizers_in_two_orders(worlds, alike):
    said = (
        "ranks step different optimizers, numbered as they were built: optimizer 0 on rank 0, "
        "optimizer 1 on rank 1, optimizer 0 on rank 2"
    )
    assert worlds(3).run(two_orders, alike) == [(said, True)] * 3


def alone(rank, what):
    params, opt = model(rank)
    step(params, opt)
    try:
        if rank == 0 and what == "verify":
            opt.verify_replicas()
        elif rank == 0 and what == "add":
            opt.add_param_group({"params": [torch.zeros(3)]})
        elif rank == 0:
            opt.vote_statistics()
        else:
            step(params, opt)
    except RuntimeError as error:
        return str(error), len(opt.param_groups)
    return "nothing", 1


@pytest.mark.parametrize(
    ("what", "does"),
    [
        ("verify", "rank 0 verifies the replicas"),
        ("statistics", "rank 0 reads the statistics of votes"),
    ],
)
def test_what_one_rank_calls_alone(worlds, what, does):
    said = f"ranks do not do the same: {does}; rank 1 steps"
    assert worlds(2).run(alone, what) == [(said, 1)] * 2


def test_a_group_that_one_rank_adds_alone(worlds):
    said = "ranks disagree on the number of parameter groups: 2 on rank 0; 1 on rank 1"
    assert worlds(2).run(alone, "add") == [(said, 1)] * 2


def test_an_error_while_votes_are_packed_is_told(monkeypatch):
    """Not of the input: whatever goes wrong in encode."""
    world = Workers([torch.zeros(40)], 2, lr=0.5)
    world.step([[torch.ones(40)]] * 2)
    electorate = world.opts[1]._electorate

    def fails(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(electorate, "_encode", fails)
    with pytest.raises(RuntimeError, match=r"no room \(on rank 1\)"):
        world.step([[torch.ones(40)]] * 2)
    monkeypatch.undo()
    assert all(torch.equal(row[0], torch.full((40,), -0.5)) for row in world.params)
    world.step([[torch.ones(40)]] * 2)
    assert all(torch.equal(row[0], torch.full((40,), -1.0)) for row in world.params)


def test_groups_and_devices_share_an_exchange():
    """One collective each way for a hundred groups, whatever their options; float64 apart."""
    ends = loopback(2)
    rows = [[torch.nn.Parameter(torch.zeros(64)) for _ in range(100)] for _ in ends]
    opts = [
        DistributedLion(
            [{"params": [p], "lr": 0.01 * (i + 1), "betas": (0.5, 0.9 if i % 7 else 0.8)}
             for i, p in enumerate(row)],
            process_group=end, exchange="sharded",
        )
        for row, end in zip(rows, ends, strict=True)
    ]  # fmt: skip
    for row, opt in zip(rows, opts, strict=True):
        for p in row:
            p.grad = torch.ones(64)
        opt.step()
    sent = []
    for end in ends:
        post = end._all_to_all
        end._all_to_all = lambda *args, post=post: sent.append(1) or post(*args)
    for opt in opts:
        opt.step()
    assert len(sent) == 2  # of each worker one
    for i in range(100):
        torch.testing.assert_close(rows[0][i], torch.full((64,), -0.02 * (i + 1)))
        assert torch.equal(rows[0][i], rows[1][i])


@pytest.mark.parametrize("what", ["refused option", "lr"])
def test_audits_stay_in_step_after_a_refusal(worlds, what):
    """A step that was refused counts on no rank, whoever refused it."""
    assert worlds(3).run(refused_among_audits, what) == [-2.0] * 3


def refused_among_audits(rank, what):
    options = {"audit_every": 2, "statistics_every": 2, "exchange": "sharded"}
    params, opt = model(rank, **options)
    for n in range(5):
        if n == 1:
            if rank == 1:
                change(what, params, opt)
            with pytest.raises((RuntimeError, ValueError)):
                step(params, opt)
            opt.param_groups[0]["lr"] = 0.5
        else:
            step(params, opt)
    assert opt.vote_statistics().steps == 2
    return params[0][0].item()
