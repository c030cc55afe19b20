"""Gradients that were averaged before the vote are noticed once, with what the wrapper needs."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from common import Workers
from lion_kernels import DistributedLion, averaged

PATH = "torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks"


def said_by(step):
    """What the package's loggers say meanwhile."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lion_kernels").addHandler(handler)
    try:
        step()
    finally:
        logging.getLogger("lion_kernels").removeHandler(handler)
    return said


def trained(rank, wrapper, is_mended):
    torch.manual_seed(0)
    net = torch.nn.Linear(30, 20)
    model = net
    if wrapper == "ddp":
        model = DistributedDataParallel(net)
        if is_mended:
            model.register_comm_hook(None, noop_hook)
    elif wrapper == "replicate":
        model = replicate(net)
        if is_mended:
            model.register_comm_hook(None, noop_hook)
    opt = DistributedLion(net.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)

    def steps():
        for _ in range(3):
            opt.zero_grad()
            model(torch.randn(4, 30)).square().sum().backward()
            if wrapper == "by hand" and not is_mended:
                for p in net.parameters():
                    dist.all_reduce(p.grad)
            opt.step()

    return said_by(steps)


REMEDIES = {
    "ddp": "call register_comm_hook(None, noop_hook) on the DistributedDataParallel model",
    "replicate": "call register_comm_hook(None, noop_hook) on the module that replicate returned",
    "by hand": "leave the all-reduce of gradients out",
}


@pytest.mark.parametrize("wrapper", REMEDIES)
def test_averages_are_noticed_once_and_the_remedy_ends_them(worlds, wrapper):
    first, *others = worlds(2).run(trained, wrapper, False)
    assert others == [[]] and len(first) == 1  # once, by one rank
    assert "every rank has the same gradients, to the last bit" in first[0]
    assert REMEDIES[wrapper] in first[0]
    assert PATH in first[0] or wrapper == "by hand"
    assert worlds(2).run(trained, wrapper, True) == [[], []]


@pytest.mark.parametrize(
    ("module", "remedy"), [("transformers", "model_wrapped"), ("accelerate", "accelerator.prepare")]
)
def test_what_trainers_need(monkeypatch, module, remedy):
    """The text alone: the trainers are not among what tests need."""
    ddp = torch.nn.Module.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(ddp)
    ddp.module = torch.nn.Linear(2, 2)
    monkeypatch.setitem(averaged.sys.modules, module, averaged)
    assert remedy in averaged._remedy([*ddp.module.parameters()])
    assert "leave the all-reduce" in averaged._remedy([torch.zeros(3)])


def test_zeros_are_no_averages():
    world = Workers([torch.zeros(64)], 2, lr=0.5)
    assert said_by(lambda: world.step([[torch.zeros(64)]] * 2)) == []
    world = Workers([torch.zeros(64)], 2, lr=0.5)
    assert said_by(lambda: world.step([[None]] * 2)) == []
    world = Workers([torch.zeros(64)], 2, lr=0.5)
    assert len(said_by(lambda: world.step([[torch.ones(64)]] * 2))) == 1


def test_only_the_first_million_are_compared():
    """A hash of the first tensors says enough; it sees each of them."""
    grads = [torch.ones(2**19), None, torch.ones(2**20), torch.ones(7)]
    before = averaged.hash_of(grads)
    grads[2][2**19 - 1] = 2.0
    assert averaged.hash_of(grads) != before
    before = averaged.hash_of(grads)
    grads[2][2**19] = 3.0
    grads[3][0] = 3.0
    assert averaged.hash_of(grads) == before
