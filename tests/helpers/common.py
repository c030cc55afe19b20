"""Inputs and comparisons that several test files share."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from lion_kernels import DistributedLion
from lion_kernels.layout import DIGEST, VERSION, WIRE_VERSION, BallotLayout, pack_flags
from lion_kernels.simulate import loopback

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By regime: nothing, one, around a word, around the vector tile, around the tally tile, a prime.
SIZES = (0, 1, 31, 32, 33, 511, 512, 513, 8191, 8192, 8193, 10007)


def exact(n, generator, dtype=torch.float32):
    """Integers in [-64, 64]: with dyadic betas all arithmetic is exact, zeros and ties occur."""
    return torch.randint(-64, 65, (n,), generator=generator).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def array(t):
    """A tensor's values in float64."""
    return t.detach().double().numpy()


def stored(x, dtype):
    """float32 values rounded to a storage type, as float64."""
    return array(torch.from_numpy(np.asarray(x, np.float32)).to(dtype))


def words(t):
    """int32 words as the uint32 that the oracle packs."""
    return t.contiguous().numpy().view(np.uint32)


def int32(words):
    """The oracle's words as a tensor of the same bits."""
    return torch.from_numpy(np.ascontiguousarray(words, np.uint32).view(np.int32))


def random_words(*shape, gen):
    return torch.randint(-(2**31), 2**31, shape, generator=gen).to(torch.int32)


def blank_bits(is_blank, n_words):
    """Blank bits, int32 (n, n_words), of so many ballots' words (n, words); those behind are 0."""
    bits = np.zeros((len(is_blank), 32 * n_words), np.uint8)
    bits[:, : is_blank.shape[1]] = is_blank
    return int32(np.stack([oracle.pack(row) for row in bits]))


def trailers_of(present, ranks=3):
    """Trailers of ranks that are ready and share one digest, int32 (ranks, words): the one in the
    middle has gradients of the tensors that are ``present``, the others of none."""
    layout = BallotLayout((1,) * len(present), 1, 1)
    trailers = torch.zeros(ranks, layout.trailer_words, dtype=torch.int32)
    flags = torch.tensor(pack_flags(present, layout.flag_words), dtype=torch.int32)
    trailers[ranks // 2, : layout.flag_words] = flags
    trailers[:, VERSION] = WIRE_VERSION
    trailers[:, DIGEST:] = torch.tensor([5, -7], dtype=torch.int32)
    return trailers


def bits_equal(a, b):
    """Whether two tensors hold the same bits."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))


def lr_of(value):
    return torch.tensor(value, dtype=torch.float64)


def step_of(value):
    return torch.tensor(value, dtype=torch.int64)


def no_counts():
    return torch.zeros(1, dtype=torch.int64)


class Dispatched(TorchDispatchMode):
    """``names``: the ops that ran within it, in order, but for views and marks of the profiler."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "profiler":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Workers:
    """n workers of a DistributedLion in this process, each with its own copies of ``params``."""

    def __init__(self, params, n, **options):
        self.params = [[torch.nn.Parameter(p.clone()) for p in params] for _ in range(n)]
        self.opts = [
            DistributedLion(mine, process_group=wire, **options)
            for mine, wire in zip(self.params, loopback(n), strict=True)
        ]

    @property
    def exp_avgs(self):
        pairs = zip(self.params, self.opts, strict=True)
        return [[opt.state[p]["exp_avg"] for p in mine] for mine, opt in pairs]

    def step(self, grads=None):
        """grads[rank][tensor]: a tensor or None. Without it, gradients are those that are there."""
        for mine, theirs in zip(self.params, grads or self.params, strict=True):
            for p, g in zip(mine, theirs, strict=True):
                p.grad = p.grad if grads is None else g
        for opt in self.opts:
            opt.step()
