"""Where random bits come from: the hash and the keys that the specification and the kernels share.

A leaf. Every coin is a hash of (seed, stream, step, word), the same on every rank. Draws no coin
itself.
"""

# Of the coins that an election tosses for its ties, and of the bits of stochastic rounding; and of
# zero votes, whose coins two steps share: every other step and every other rank takes them the
# other way round, so that those of two ranks cancel, and what is left goes back where it was.
TIE_STREAM = -1
ROUNDING_STREAM = -2
ZERO_STREAM = -3
# 2**64 over the golden ratio: what SplitMix64 adds from state to state, and keys from word to word.
GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix64(z: int) -> int:
    """One step of SplitMix64 from the state ``z``, an integer modulo 2**64."""
    z = (z + GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, stream: int) -> int:
    """The key of a stream, which each step mixes with its number: a uint64."""
    return mix64(mix64(seed) ^ stream)
