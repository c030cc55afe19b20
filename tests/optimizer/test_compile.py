"""Lion beside torch.compile, and within it."""

import copy

import pytest
import torch

from common import bits_equal, generator
from eager import OPTIONS
from lion_kernels import Lion
from on_host import compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler"),
]


def test_beside_a_compiled_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model)
    opt, reference = Lion(model.parameters(), **OPTIONS), Lion(twin.parameters(), **OPTIONS)
    x = torch.randn(32, 8)
    losses = []
    for _ in range(5):
        for net, optimizer in ((compiled, opt), (twin, reference)):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_ops_compile_without_graph_breaks():
    def step(p, g, m, lr):
        torch.ops.lion_kernels.lion_step([p], [g], [m], lr, 0.9, 0.99, 0.1, False, None)
        return p * 2

    p, g, m = (torch.randn(40, generator=generator(i)) for i in range(3))
    q, n = p.clone(), m.clone()
    lr = torch.tensor(0.1)
    expected = step(p, g, m, lr)
    assert torch.equal(torch.compile(step, fullgraph=True)(q, g, n, lr), expected)
    assert torch.equal(p, q) and torch.equal(m, n)


@pytest.mark.parametrize("tensor_lr", [True, False])
def test_in_a_compiled_training_step(tensor_lr):
    """The same path as eagerly; the step is one break between graphs, and a new lr no recompile."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    def run(compiler):
        weight = torch.nn.Parameter(torch.randn(20, 20, generator=generator(0)))
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        opt = Lion([weight], lr=lr, weight_decay=0.1)

        def train(x):
            opt.zero_grad()
            (weight * x).square().sum().backward()
            opt.step()
            return weight.detach() + 1.0

        step, frames = compiler(train), []
        for i in range(5):
            if tensor_lr:
                lr.fill_(0.1 / (i + 1))
            else:
                opt.param_groups[0]["lr"] = 0.1 / (i + 1)
            step(torch.randn(20, 20, generator=generator(1 + i)))
            frames.append(counter.frame_count)
        return weight.detach(), frames

    counter = CompileCounter()
    eager, _ = run(lambda train: train)
    torch._dynamo.reset()
    counters.clear()
    compiled, frames = run(lambda train: torch.compile(train, backend=counter))
    assert bits_equal(eager, compiled)
    assert frames[0] > 0
    # The first step makes the gradient, the second finds one; then nothing is compiled again.
    assert frames[2:] == [frames[1]] * 3
    assert not [reason for reason in counters["graph_break"] if "lion.py" in reason]
