"""Where every bit of a ballot lies: pure integer arithmetic, shared by all back ends.

The tensors of an election are laid end to end in *word space*: 32 elements a 32-bit word, least
significant bit first, every tensor starting a new octet of words. Word space is cut into one shard
a rank (or one shard in all). A shard travels as one *chunk*: its planes one after the other; beside
planes of an odd scale, which cannot say zero, a bit a word that is *blank*; then the trailer, which
every chunk repeats. Knows no tensors' contents, no process groups and no arithmetic on votes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

BITS_PER_WORD = 32
# Words whose blank bits are one byte, which no two tensors and no two shards share.
OCTET = 8
# Planes and chunks start on 16 bytes: what collectives and vector loads want.
ALIGN_WORDS = 4
# The largest scale that tallies can hold: bitplanes.h, kMaxPlanes.
MAX_SCALE = 2**16 - 1
# Raised with every change of what the bits on the wire mean.
WIRE_VERSION = 2

# The end of a trailer: how a rank takes part, the wire's version, and a digest of two words.
SEAL_WORDS = 4
STATUS, VERSION, DIGEST = -4, -3, -2
READY = 0


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def words_of(n_elements: int) -> int:
    """Words that hold ``n_elements`` bits."""
    return -(-n_elements // BITS_PER_WORD)


def room_of(n_elements: int) -> int:
    """Words that a tensor of ``n_elements`` takes in word space: whole octets."""
    return _up(words_of(n_elements), OCTET)


def blank_words(n_words: int) -> int:
    """Words that hold a blank bit for each of ``n_words``, in a chunk."""
    return _up(words_of(n_words), ALIGN_WORDS)


def to_int32(words: Sequence[int]) -> list[int]:
    """Unsigned 32-bit values as the int32 of the same bits."""
    return [word - (word >> (BITS_PER_WORD - 1) << BITS_PER_WORD) for word in words]


def pack_flags(present: Sequence[bool], n_words: int) -> list[int]:
    """``present``, one bit a tensor, as the values of ``n_words`` int32 words."""
    bits = int("".join("1" if flag else "0" for flag in reversed(present)) or "0", 2)
    mask = 2**BITS_PER_WORD - 1
    return to_int32([(bits >> (BITS_PER_WORD * w)) & mask for w in range(n_words)])


@dataclass(frozen=True)
class BallotLayout:
    """The chunks of one election: ``shards`` chunks of ``planes`` planes, of a scale of that value,
    for tensors of ``numels``."""

    numels: tuple[int, ...]
    planes: int
    shards: int

    @cached_property
    def n_words(self) -> int:
        """Words of the whole word space, before padding."""
        return sum(map(room_of, self.numels))

    @cached_property
    def words_per_shard(self) -> int:
        return _up(-(-self.n_words // self.shards), OCTET)

    @cached_property
    def blank_words(self) -> int:
        """Words of blank bits in each chunk, none beside two planes."""
        return blank_words(self.words_per_shard) if self.planes % 2 else 0

    @cached_property
    def flag_words(self) -> int:
        """Words of presence flags in each trailer, one bit a tensor."""
        return _up(words_of(len(self.numels)), ALIGN_WORDS)

    @cached_property
    def trailer_words(self) -> int:
        return self.flag_words + SEAL_WORDS

    @cached_property
    def chunk_words(self) -> int:
        return self.planes * self.words_per_shard + self.blank_words + self.trailer_words

    def planes_of(self, chunks: Tensor) -> Tensor:
        """The planes of chunks (n, chunk_words): a view (n, planes, words_per_shard)."""
        end = self.planes * self.words_per_shard
        return chunks[:, :end].unflatten(1, (self.planes, self.words_per_shard))

    def blanks_of(self, chunks: Tensor) -> Tensor | None:
        """The blank bits of chunks (n, chunk_words): a view (n, blank_words)."""
        begin = self.planes * self.words_per_shard
        return chunks[:, begin : begin + self.blank_words] if self.planes % 2 else None

    def trailers_of(self, chunks: Tensor) -> Tensor:
        """The trailers of chunks (n, chunk_words): a view (n, trailer_words)."""
        return chunks[:, -self.trailer_words :]


def cap_at_two(planes: Tensor) -> None:
    """Makes every 3 of ternary ballots (..., 2 planes, words) a 2: no honest rank sends one, and it
    would count twice."""
    if planes.shape[-2] == 2:
        planes[..., 0, :] &= ~planes[..., 1, :]
