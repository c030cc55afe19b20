"""Where every bit of a ballot lies: pure integer arithmetic, shared by all back ends.

A group's tensors are laid end to end in *word space*: 32 elements a 32-bit word, least significant
bit first, every tensor starting a new word. Word space is cut into one shard a rank (or one shard
in all). A shard travels as one *chunk*: its planes one after the other, then the presence flags.
Knows no tensors' contents, no process groups and no arithmetic on votes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

BITS_PER_WORD = 32
# Planes and chunks start on 16 bytes: what collectives and vector loads want.
ALIGN_WORDS = 4
# The largest scale that tallies can hold: bitplanes.h, kMaxPlanes.
MAX_SCALE = 2**16 - 1
# Raised with every change of what the bits on the wire mean.
WIRE_VERSION = 1


def words_of(n_elements: int) -> int:
    """Words that hold ``n_elements`` bits."""
    return -(-n_elements // BITS_PER_WORD)


def _aligned(n_words: int) -> int:
    return -(-n_words // ALIGN_WORDS) * ALIGN_WORDS


def pack_flags(present: Sequence[bool], n_words: int) -> list[int]:
    """``present``, one bit a tensor, as the values of ``n_words`` int32 words."""
    bits = sum(1 << i for i, flag in enumerate(present) if flag)
    words = [(bits >> (BITS_PER_WORD * w)) & (2**BITS_PER_WORD - 1) for w in range(n_words)]
    return [word - (word >> (BITS_PER_WORD - 1) << BITS_PER_WORD) for word in words]


@dataclass(frozen=True)
class BallotLayout:
    """The chunks of one group: ``shards`` chunks of ``planes`` planes for tensors of ``numels``."""

    numels: tuple[int, ...]
    planes: int
    shards: int

    @cached_property
    def n_words(self) -> int:
        """Words a plane of the whole group, before padding."""
        return sum(words_of(n) for n in self.numels)

    @cached_property
    def words_per_shard(self) -> int:
        return _aligned(-(-self.n_words // self.shards))

    @cached_property
    def flag_words(self) -> int:
        """Words of presence flags at the end of each chunk, one bit a tensor."""
        return _aligned(words_of(len(self.numels)))

    @cached_property
    def chunk_words(self) -> int:
        return self.planes * self.words_per_shard + self.flag_words

    def planes_of(self, chunks: Tensor) -> Tensor:
        """The planes of chunks (n, chunk_words): a view (n, planes, words_per_shard)."""
        end = self.planes * self.words_per_shard
        return chunks[:, :end].unflatten(1, (self.planes, self.words_per_shard))

    def flags_of(self, chunks: Tensor) -> Tensor:
        """The presence flags of chunks (n, chunk_words): a view (n, flag_words)."""
        return chunks[:, self.planes * self.words_per_shard :]
