"""A model, its gradients on each rank, and the choices that a vote has."""

import itertools
import math

import torch

from common import exact, generator

SIZES = ((20, 11), (33,), (50,), (0,), ())


HYPER = {"lr": 1e-2, "betas": (0.5, 0.75), "weight_decay": 0.3}


CHOICES = list(
    itertools.product(
        ("majority", "average"), ("binary", "ternary"), ("zero", "coin"), ("allgather", "sharded")
    )
)


def parameters(seed=0, dtype=torch.float32, sizes=SIZES):
    gen = generator(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=gen).to(dtype)) for size in sizes]


def gradient(rank, step, t, size, dtype=torch.float32):
    """Exact integers; None on some ranks, and for tensor 2 in some steps on all."""
    gen = generator(1000 * step + 10 * t + rank + 1)
    if (t == 1 and (rank + step) % 2 == 0) or (t == 2 and step % 2 == 0):
        return None
    return exact(math.prod(size), gen, dtype).view(size)


def set_gradients(params, rank, step, dtype=torch.float32):
    for t, p in enumerate(params):
        p.grad = gradient(rank, step, t, tuple(p.shape), dtype)
