"""What a rank that is broken, or means harm, cannot do to the others."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lion_kernels
from common import Workers, generator
from lion_kernels import DistributedLion
from lion_kernels.vote import agreement, wire
from lion_kernels.vote.statistics import counts_of

HYPER = {"lr": 0.5, "betas": (0.0, 0.0)}


@pytest.mark.parametrize("ballots", ["binary", "ternary"])
@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 2), (8, 3)])
def test_fewer_than_half_are_outvoted_whatever_they_send(monkeypatch, n, k, exchange, ballots):
    """Any bits in planes and blank bits: where the honest ones agree, they win."""
    world = Workers([torch.zeros(5000)], n, **HYPER, exchange=exchange, ballots=ballots)
    g = torch.randn(5000, generator=generator(1))
    for rank in range(k):
        electorate, gen = world.opts[rank]._electorate, generator(rank)
        encode = electorate._encode

        def garbage(booth, *args, encode=encode, gen=gen):
            encode(booth, *args)
            layout, ballot = booth.buffers.layout, booth.buffers.ballot
            for part in (layout.planes_of(ballot), layout.blanks_of(ballot)):
                if part is not None:
                    part.copy_(torch.randint(-(2**31), 2**31, part.shape, generator=gen).int())

        monkeypatch.setattr(electorate, "_encode", garbage)
    for step in range(3):
        world.step([[g]] * n)
        for row in world.params:
            assert torch.equal(row[0], -0.5 * (step + 1) * g.sign())


def test_nothing_is_unpickled():
    folder = Path(lion_kernels.__file__).parent
    forbidden = r"all_gather_object|broadcast_object|scatter_object|import pickle|pickle\.loads"
    found = [path for path in folder.rglob("*.py") if re.search(forbidden, path.read_text())]
    assert found == []


BAD = {
    "no JSON": b"\x80\x04}",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a number": b"3",
    "no label": b"[[], 3]",
    "another label": b'["eats", 3]',
    "no facts": b'["explain", {"does": "steps", "error": null, "facts": 3}]',
    "facts of lists": b'["explain", {"does": "steps", "error": null, "facts": [[[], []]]}]',
    "an error of numbers": b'["explain", {"does": "steps", "error": [1, 2], "facts": []}]',
    "no report": b'["explain", [1, 2, 3]]',
}


@pytest.mark.parametrize("what", BAD)
def test_messages_of_no_form_are_refused(monkeypatch, what):
    """As an answer to any question: RuntimeError, on those who are asked."""
    honest = b'["explain", {"does": "steps", "error": null, "facts": [["lr", "1"]]}]'
    values = wire.Values(lambda: [honest, BAD[what]])

    def work(end):
        report = agreement.Report("steps", None, [("lr", "1")])
        return agreement.explain(report, end, torch.device("cpu"))

    class End:
        def values(self, *args):
            return values

    with pytest.raises(RuntimeError):
        for transfer in work(End()):
            transfer.wait()


@pytest.mark.parametrize("size", [-1, 2**28 + 1, 2**62])
def test_sizes_are_checked_before_room_is_made(size):
    with pytest.raises(RuntimeError, match=f"rank 1 announced a message of {size} bytes"):
        wire._check_sizes([10, size])


@pytest.mark.parametrize(
    "counts", [3, [3], [[1, 2]], [[1, [[1]], []]], [[1, [[1, 1], [1, 1]], [[9, [1] * 6]]]],
               [[1, [["a", 1], [1, 1]], []]], [[1, [[1, 1], [1, 1]], [["x", [1] * 6]]]]],
)  # fmt: skip
def test_statistics_of_no_form_are_refused(counts):
    assert not counts_of(2, 1)(counts)
    assert counts_of(2, 1)([[1, [[1, 1], [1, 1]], [[0, [1] * 6]]]])


def by_hand(rank):
    """Rank 1 announces a message of 2**40 bytes where rank 0 asks which parameters take part."""
    group = dist.new_group()
    params = [torch.nn.Parameter(torch.zeros(40))]
    opt = DistributedLion(params, **HYPER, process_group=group)
    params[0].grad = torch.ones(40)
    if rank == 0:
        try:
            opt.step()
        except RuntimeError as error:
            return str(error)
    sizes = torch.zeros(2, 1, dtype=torch.int64)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(sizes, torch.tensor([[2**40]]), group=group)
    return "sent"


def test_a_rank_that_announces_too_much(worlds):
    named, sent = worlds(2).run(by_hand)
    assert sent == "sent" and named.startswith(f"rank 1 announced a message of {2**40} bytes")


QUESTIONS = (
    "builds an optimizer or a group", "weighs its vote", "asks which parameters take part",
    "compares its first gradients", "seals its draw", "opens its draw",
    "tells what its audit found", "verifies the replicas", "tells its statistics",
)  # fmt: skip
ANSWERS = (
    None, True, 3, -1, 2**70, "x", [], {}, {"a": 1}, [[]], [["x"]], [[3, [9]]], [[1, 2], [3]],
    [[1, [[1]], []]], [[3], [[7]]],
)  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
@pytest.mark.parametrize("question", QUESTIONS)
def test_any_answer_to_any_question(monkeypatch, question, answer):
    """Where it is not of the form that was asked for, an error that names the rank."""
    messages = wire.Loopback._messages

    def lies(end, message, device):
        if end.rank == 1 and json.loads(message)[0] == question:
            message = json.dumps([question, answer]).encode()
        return messages(end, message, device)

    monkeypatch.setattr(wire.Loopback, "_messages", lies)
    options = {"exchange": "sharded", "audit_every": 1, "statistics_every": 1}
    try:
        world = Workers([torch.zeros(400)], 3, **HYPER, **options)
        world.step([[torch.randn(400, generator=generator(r))] for r in range(3)])
        for opt in world.opts:
            opt.verify_replicas()
        for opt in world.opts:
            opt.vote_statistics()
    except RuntimeError as error:
        assert "rank 1" in str(error) or "ranks" in str(error), str(error)
