"""What every op does around its kernels. Version counters: tests/optimizer/test_contract.py."""

import weakref

import pytest
import torch

from common import bits_equal, generator, lr_of
from lion_kernels import declare, ops


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def test_negative_views():
    """What is read counts as what it stands for; what would be written is refused."""
    g = torch.randn(50, generator=generator(0))
    negative = torch._neg_view(-g)
    steps, votes = [], []
    for grad in (g, negative):
        p, m = torch.zeros(50), torch.zeros(50)
        ops.lion_step([p], [grad], [m], lr_of(0.1), 0.9, 0.99, 0.0, False)
        ballot, blanks = ints(1, 1, 8), ints(1, 1)
        n, step, count = torch.zeros(50), ints(1).long(), ints(1).long()
        ops.encode([grad], [n], ballot, blanks, 0.9, 0.99, False, 0, 0, step, count)
        steps.append((p, m))
        votes.append((ballot, blanks, n))
    for one, other in (steps, votes):
        assert all(bits_equal(a, b) for a, b in zip(one, other, strict=True))
    m = torch._neg_view(torch.zeros(50))
    with pytest.raises(ValueError, match="exp_avgs is written, and must hold no negative view"):
        ops.lion_step([torch.zeros(50)], [g], [m], lr_of(0.1), 0.9, 0.99, 0.0, False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_traced_code_raises_versions(backend):
    def step(p, g, m, nonfinite):
        ops.lion_step([p], [g], [m], lr_of(0.5), 0.9, 0.99, 0.0, False, nonfinite)

    p, g, m, count = torch.zeros(3), torch.ones(3), torch.zeros(3), ints(1).long()
    traced = torch.compile(step, backend=backend, fullgraph=True)
    for steps in (1, 2):
        before = [t._version for t in (p, m, count, g)]
        traced(p, g, m, count)
        after = [t._version for t in (p, m, count, g)]
        raised = [a > b for a, b in zip(after, before, strict=True)]
        assert raised == [True, True, True, False]
        assert torch.equal(p, torch.full((3,), -0.5 * steps))


@pytest.mark.parametrize("is_refusal", [False, True])
def test_what_is_no_refusal_keeps_its_cause(monkeypatch, is_refusal):
    """And neither keeps the arguments, once it is handled."""

    def packet(*_):
        raise RuntimeError("no kernels") from ImportError("no triton")

    monkeypatch.setitem(ops.tally.__globals__, "packet", packet)
    monkeypatch.setattr(declare, "REFUSALS", [lambda: "no kernels" if is_refusal else ""])
    ballots = ints(1, 1, 8)
    gone = weakref.ref(ballots)
    try:
        ops.tally(ballots, ints(1, 8), 1, 0, 0, ints(1).long())
    except (RuntimeError, ValueError) as error:
        assert str(error) == "no kernels"
        assert type(error) is (ValueError if is_refusal else RuntimeError)
        assert type(error.__cause__) is (type(None) if is_refusal else ImportError)
    del ballots
    assert gone() is None


@pytest.mark.parametrize("behind", ["", "\nException raised from ..."])
def test_a_refusal_is_a_value_error(behind):
    """Torch 2.15 makes a RuntimeError of it; what a thread refused last is known, once."""
    words, out = ints(1, 1, 4), ints(2, 4)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        torch.ops.lion_kernels.tally(words, out, 1, 0, 0, ints(1).long())
    refusal = RuntimeError(f"{raised.value}{behind}")
    message = "tally must have 1 planes for scale 1, got 2"
    assert declare.refusal_in(refusal) == str(raised.value) == message
    assert declare.refusal_in(refusal) is None
    assert declare.refusal_in(RuntimeError("out of memory")) is None
