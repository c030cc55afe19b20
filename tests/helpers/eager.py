"""Lion as its authors wrote it, and parameters and gradients to try both on."""

import torch

from common import generator

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}


def eager(params, exp_avgs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, sign=1.0):
    """Lion as its authors wrote it, in PyTorch: updates params and exp_avgs in place."""
    with torch.no_grad():
        for p, m in zip(params, exp_avgs, strict=True):
            if p.grad is not None:
                g = sign * p.grad
                c = m * betas[0] + g * (1 - betas[0])
                p.mul_(1 - lr * weight_decay).add_(torch.sign(c), alpha=-lr)
                m.mul_(betas[1]).add_(g, alpha=1 - betas[1])


def parameters(*shapes, seed=0):
    gen = generator(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]


def set_grads(params, seed):
    gen = generator(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen)


def close(ours, theirs):
    """Equal to eager Lion up to the second rounding that it makes in each step; one sign apart
    would be 2 * lr, ten thousand times the bound."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
