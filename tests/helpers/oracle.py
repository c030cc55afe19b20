"""A second opinion, written from the papers in float64 and Python integers.

Imports nothing of lion_kernels. Lion: arXiv:2302.06675, Algorithm 2; the vote: arXiv:2404.00438,
Algorithm 1; zero votes, ties, abstentions and rounding as the README's contract says: decay and
step size are float32 scalars, the update is one float32 expression rounded once to storage.
"""

import numpy as np

M64 = 2**64 - 1


def f32(x):
    return np.float64(np.float32(x))


def interpolate(m, g, beta, maximize=False):
    """beta * m + (1 - beta) * g in float64."""
    g = -np.asarray(g, np.float64) if maximize else np.asarray(g, np.float64)
    return beta * np.asarray(m, np.float64) + (1 - beta) * g


def update(p, delta, lr, weight_decay):
    """p * (1 - lr * wd) - lr * delta, rounded once to float32."""
    decay, step = f32(1 - lr * weight_decay), np.float32(lr) * np.asarray(delta, np.float32)
    return np.float32(np.asarray(p, np.float64) * decay - np.float64(step))


def average_update(p, total, n, lr, weight_decay):
    """The same with delta = total / n; the step of one vote, lr / n, is the float32 scalar."""
    decay, unit = f32(1 - lr * weight_decay), np.float32(lr / n)
    step = unit * np.asarray(total, np.float32)
    return np.float32(np.asarray(p, np.float64) * decay - np.float64(step))


def pack(bits):
    """0/1 integers, element 32*w + k in bit k of word w, as little-endian uint32 words."""
    padded = np.zeros(-(-len(bits) // 32) * 32, np.uint8)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4")


def unpack(words):
    return np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), bitorder="little")


def _splitmix(state):
    z = (state + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def coin(seed, stream, step, first, n):
    """The coins of elements first .. first + n, 0 or 1; stream -1 is that of ties."""
    key = _splitmix(_splitmix(_splitmix(seed) ^ (stream & M64)) ^ step)
    out = np.empty(n, np.uint8)
    for i in range(n):
        word, bit = divmod(first + i, 32)
        draw = _splitmix((key + word * 0x9E3779B97F4A7C15) & M64) >> 32
        out[i] = draw >> bit & 1
    return out


def random16(seed, step, first, n):
    """The random bits of elements first .. first + n."""
    m32 = 2**32 - 1
    key = _splitmix(_splitmix(_splitmix(seed) ^ (-2 & M64)) ^ step)
    out = np.empty(n, np.int64)
    for i in range(n):
        word, k = divmod(first + i, 32)
        draw = _splitmix((key + word * 0x9E3779B97F4A7C15) & M64)
        x = ((k % 16) * 0x9E3779B9 + draw) & m32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & m32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & m32
        x ^= (x >> 16) ^ (draw >> 32)
        out[i] = x >> 16 if k >= 16 else x & 0xFFFF
    return out


def round_at_random(x, random, bits, lowest):
    """float32 x to ``bits`` significant bits, or to a multiple of ``lowest`` where that is coarser:
    up where the cut fraction and the noise, each of as many bits as are cut, make one."""
    size = np.abs(np.asarray(x, np.float64))
    exponent = np.floor(np.log2(np.where(size == 0, 1, size)))
    unit = np.maximum(2.0 ** (exponent - bits + 1), lowest)
    cut = 24 - bits
    noise = (random & (2**cut - 1)) / 2.0**cut
    return np.sign(x) * unit * np.floor(np.float32(size / unit) + np.float32(noise))


def quantize(m):
    """A flat float32 momentum as (int8, a float32 scale for every 128): each operation rounded to
    float32; what is not finite is -128."""
    m = np.asarray(m, np.float32)
    q, scales = np.full(len(m), -128, np.int8), np.zeros(-(-len(m) // 128), np.float32)
    for b in range(len(scales)):
        block = np.float64(m[128 * b : 128 * b + 128])
        finite = np.isfinite(block)
        scale = np.abs(block[finite]).max(initial=0)
        scales[b] = scale
        per_root = 0 if scale == 0 else f32(127 / f32(np.sqrt(scale)))
        size = f32(f32(np.sqrt(np.abs(block[finite]))) * per_root)
        q[128 * b : 128 * b + 128][finite] = np.sign(block[finite]) * np.rint(size)
    return q, scales


def dequantize(q, scales):
    """scale * (q / 127)**2 with the sign of q, in float32; -128 is NaN."""
    q = np.asarray(q, np.float64)
    share = f32(q * np.abs(q) * f32(1 / 127**2))
    m = np.float32(share * np.float64(np.repeat(scales, 128)[: len(q)]))
    return np.where(q == -128, np.float32(np.nan), m)


def zero_coin(seed, rank, step, first, n):
    """The coins of zero votes: two steps share them, turned over in the second, and on every other
    rank."""
    return coin(seed, -3, step // 2, first, n) ^ ((rank + step) % 2)


def sealed(digest, shared):
    """A digest, a uint64, that has taken up integers of 64 bits, one after the other."""
    for value in shared:
        digest = _splitmix(digest ^ (value & M64))
    return digest


def room(n):
    """Elements of word space that a tensor of n takes: octets of words."""
    return -(-n // 256) * 256


def blank(vote):
    """Of each element, whether all votes of its word are zero."""
    padded = np.zeros(-(-len(vote) // 32) * 32, bool)
    padded[: len(vote)] = vote != 0
    return np.repeat(~padded.reshape(-1, 32).any(1), 32)[: len(vote)]


def votes(c, ballots, coins):
    """sign(c); not finite abstains; in binary ballots a zero vote is its coin, but in a word whose
    votes are all zero, which is blank."""
    c = np.asarray(c, np.float64)
    vote = np.where(np.isfinite(c), np.sign(np.where(np.isfinite(c), c, 0)), 0).astype(np.int64)
    if ballots == "binary":
        is_coin = (vote == 0) & ~blank(vote)
        vote = np.where(is_coin, 2 * coins.astype(np.int64) - 1, vote)
    return vote


def majority(total, says_zero, is_blank, coins):
    """sign(total); a tie is 0 where the verdict can say so, and in words that all left blank; else
    its coin."""
    is_coin = (total == 0) & ~is_blank & (not says_zero)
    return np.where(is_coin, 2 * coins.astype(np.int64) - 1, np.sign(total))


def rounded(total, scale, is_blank, coins):
    """A sum of votes as a tally of that scale says it, which only holds every other integer: up or
    down, as the coin falls."""
    is_between = ((total + scale) % 2 != 0) & ~is_blank
    return np.where(is_between, total + 2 * coins.astype(np.int64) - 1, total)


class World:
    """N workers and their common parameters, kept as a list of flat float32 arrays."""

    def __init__(
        self, params, n, *, aggregation, ballots, ties, seed, lr, betas, weight_decay, weights=None
    ):
        self.params = [np.array(p, np.float32) for p in params]
        self.exp_avgs = [[np.zeros(len(p)) for p in params] for _ in range(n)]
        self.n, self.aggregation, self.ballots, self.ties = n, aggregation, ballots, ties
        self.seed, self.lr, self.betas, self.weight_decay = seed, lr, betas, weight_decay
        self.weights = weights or [1] * n
        self.steps = 0

    def _direction(self, total, is_blank, ties):
        """What total, the sum of weighted votes, decides."""
        weight, is_binary = sum(self.weights), self.ballots == "binary"
        if self.aggregation == "average":
            return rounded(total, weight, is_blank, ties) if is_binary else total
        says_zero = self.ties == "zero" and (weight % 2 == 0 or not is_binary)
        return majority(total, says_zero, is_blank & is_binary, ties)

    def step(self, grads):
        """grads[rank][tensor]: a flat array, or None."""
        first = 0  # position in word space: every tensor starts an octet
        for t, p in enumerate(self.params):
            present = any(rank_grads[t] is not None for rank_grads in grads)
            total, is_blank = np.zeros(len(p), np.int64), np.ones(len(p), bool)
            for rank in range(self.n):
                g, m = grads[rank][t], self.exp_avgs[rank][t]
                c = np.zeros(len(p)) if g is None else interpolate(m, g, self.betas[0])
                coins = zero_coin(self.seed, rank, self.steps, first, len(p))
                vote = votes(c, self.ballots, coins)
                total += self.weights[rank] * vote
                is_blank &= blank(vote)
                if g is not None:
                    self.exp_avgs[rank][t] = np.where(
                        np.isfinite(c), interpolate(m, g, self.betas[1]), m
                    )
            delta = self._direction(total, is_blank, coin(self.seed, -1, self.steps, first, len(p)))
            if present and self.aggregation == "average":
                n = sum(self.weights)
                self.params[t] = average_update(p, delta, n, self.lr, self.weight_decay)
            elif present:
                self.params[t] = update(p, delta, self.lr, self.weight_decay)
            first += room(len(p))
        self.steps += 1
