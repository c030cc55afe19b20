"""What every op does around its kernels. Version counters: tests/optimizer/test_contract.py."""

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
        ballot, flags = ints(1, 1, 2), ints(1, 1)
        n, step, count = torch.zeros(50), ints(1).long(), ints(1).long()
        ops.encode([grad], [n], ballot, flags, 0.9, 0.99, False, 0, 0, step, count)
        steps.append((p, m))
        votes.append((ballot, n))
    for one, other in (steps, votes):
        assert all(bits_equal(a, b) for a, b in zip(one, other, strict=True))
    m = torch._neg_view(torch.zeros(50))
    with pytest.raises(ValueError, match="exp_avgs is written, and must hold no negative view"):
        ops.lion_step([torch.zeros(50)], [g], [m], lr_of(0.1), 0.9, 0.99, 0.0, False)


@pytest.mark.parametrize("behind", ["", "\nException raised from ..."])
def test_a_refusal_is_a_value_error(behind):
    """Torch 2.15 makes a RuntimeError of it; what a thread refused last is known, once."""
    words, out = ints(1, 1, 4), ints(2, 4)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        torch.ops.lion_kernels.tally(words, out, 1)
    refusal = RuntimeError(f"{raised.value}{behind}")
    thrown = declare.as_thrown(refusal)
    assert type(thrown) is ValueError
    assert str(thrown) == str(raised.value) == "tally must have 1 planes for scale 1, got 2"
    assert declare.as_thrown(refusal) is refusal
    other = RuntimeError("out of memory")
    assert declare.as_thrown(other) is other
