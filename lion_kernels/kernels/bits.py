"""What the Triton kernels share: table rows, tiles, moments, packed bytes, blank words, coins.

A program handles BLOCK consecutive elements of one tensor: as one tile of BLOCK // 8 bytes of 8,
read and written 16 bytes at a time, or, at a tensor's end, across shards and where pointers are not
aligned, as masked tiles of EDGE elements. The unit is the byte: a thread that loads eight elements
in a row has all of it, and the wire's little-endian words are such bytes. The arithmetic is that of
csrc/simd/moments.h, the coins are those of csrc/coin.h. Every load becomes float32 at once:
Triton's interpreter computes in the storage type otherwise.
"""

import triton
import triton.language as tl

# Columns of a table row, int64; launch.py fills them. A pointer of 0 is an absent tensor.
DATA = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
NUMEL = tl.constexpr(3)
FIRST_WORD = tl.constexpr(4)  # place in the list's word space
FIRST_TILE = tl.constexpr(5)  # the program that handles the tensor's first tile
ALIGNED = tl.constexpr(6)  # whether every pointer of the row is a multiple of 16
INDEX = tl.constexpr(7)  # place in the list; -1: no tensor
LOW = tl.constexpr(8)
SCALE = tl.constexpr(9)
COLUMNS = tl.constexpr(10)

# A multiple of 32; small, so that the masked path does not decide how many registers there are.
EDGE = tl.constexpr(512)

# Arguments whose value must not make another kernel: one compiled kernel for every model and step.
RUNTIME = (
    "lr", "lr_address", "lr_bytes", "weight_decay", "complement1", "complement2", "key", "scale",
    "inverse_scale",
    "words_per_shard", "shard_stride", "plane_stride", "blank_stride", "first_word", "flip",
    "n_ranks", "trailers_stride", "n_trailer_words", "first_flag", "n_shared", "n_tiles",
    "rounding_key", "advance",
    "skip", "cautious", "cautious_decay", "agreeing_address",
    "grad_scale_address", "found_inf_address",
)  # fmt: skip


@triton.jit
def row_of(table_ptr, tile_rows_ptr, BLOCK: tl.constexpr):
    """This program's row, its first element there, and how many elements it has, int32."""
    tile = tl.program_id(0)
    ptr = table_ptr + tl.load(tile_rows_ptr + tile).to(tl.int64) * COLUMNS
    # All columns at once: each that waited for a test would cost a trip to the L2 cache.
    row = (
        tl.load(ptr + DATA), tl.load(ptr + GRAD), tl.load(ptr + EXP_AVG), tl.load(ptr + NUMEL),
        tl.load(ptr + FIRST_WORD), tl.load(ptr + FIRST_TILE), tl.load(ptr + ALIGNED),
        tl.load(ptr + INDEX), tl.load(ptr + LOW), tl.load(ptr + SCALE),
    )  # fmt: skip
    start = (tile - row[FIRST_TILE]) * BLOCK
    return row, start, tl.minimum(row[NUMEL] - start, BLOCK).to(tl.int32)


@triton.jit
def is_full(row, left, BLOCK: tl.constexpr):
    """Whether the program has one tile without masks."""
    return (row[ALIGNED] != 0) & (left == BLOCK)


@triton.jit
def word_of(row, start, first_word):
    """The tile's first word in the election's word space, int32, where the list begins at
    ``first_word``."""
    return (row[FIRST_WORD] + start // 32).to(tl.int32) + first_word


@triton.jit
def shard_of(word, words_per_shard):
    """The shard of a word of word space, and the word's place there, int32."""
    shard = (word.to(tl.uint32) // words_per_shard.to(tl.uint32)).to(tl.int32)
    return shard, word - shard * words_per_shard


@triton.jit
def is_full_in_one_shard(row, start, left, first_word, words_per_shard, BLOCK: tl.constexpr):
    """Whether the program has one tile without masks whose words follow one another."""
    _, word = shard_of(word_of(row, start, first_word), words_per_shard)
    return is_full(row, left, BLOCK) & (word + BLOCK // 32 <= words_per_shard)


@triton.jit
def pointer(row, column: tl.constexpr, start, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """To the tile's first element of the row's tensor in ``column``."""
    ptr = row[column].to(tl.pointer_type(DTYPE)) + start
    return ptr if MASKED else tl.multiple_of(ptr, 16)


@triton.jit
def elements(TILE: tl.constexpr):
    """Positions in the tile, (bytes, 8): what a thread holds in a row is a byte of a plane."""
    return 8 * tl.arange(0, TILE // 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def load_raw(ptr, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    x = elements(TILE)
    if MASKED:
        return tl.load(ptr + x, mask=x < left, other=0)
    return tl.load(ptr + x)


@triton.jit
def load(ptr, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    return load_raw(ptr, left, TILE, MASKED).to(tl.float32)


@triton.jit
def store(
    ptr, tile, left,
    DTYPE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr = False,
):  # fmt: skip
    """GUARDED: nothing where ``left`` is 0, also of a tile without masks."""
    x = elements(TILE)
    if MASKED:
        tl.store(ptr + x, tile.to(DTYPE), mask=x < left)
    elif GUARDED:
        tl.store(ptr + x, tile.to(DTYPE), mask=tl.zeros_like(x) < left)
    else:
        tl.store(ptr + x, tile.to(DTYPE))


@triton.jit
def float64(value):
    """The float64 whose bits ``value`` holds: launches take integers and float32 only."""
    return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def is_set(address):
    """Whether the float32 scalar at ``address`` (0: absent) is there and not zero."""
    value = 0.0
    if address != 0:
        value = tl.load(address.to(tl.int64).to(tl.pointer_type(tl.float32)))
    return value != 0.0


@triton.jit
def learning_rate(lr_bits, lr_address, lr_bytes):
    """The float64 lr: a scalar of the launch, or what lies at ``lr_address`` on the device."""
    lr = float64(lr_bits)
    if lr_address != 0:
        if lr_bytes == 8:
            lr = tl.load(lr_address.to(tl.int64).to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(lr_address.to(tl.int64).to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def complement(bits, grad_scale_address):
    """What gradients are multiplied by, +-(1 - beta), over the grad scale where there is one."""
    value = float64(bits).to(tl.float32)
    if grad_scale_address != 0:
        scale = tl.load(grad_scale_address.to(tl.int64).to(tl.pointer_type(tl.float32)))
        value = tl.div_rn(value, scale)
    return value


@triton.jit
def negative(x):
    """-x, of zeros too: triton 3.6 makes 0 - x of the operator, which loses the sign of a zero."""
    return x * -1.0


@triton.jit
def interpolate(g, m, beta, complement):
    """beta * m + complement * g: the product with m rounded, the sum fused."""
    return tl.fma(g, complement + tl.zeros_like(g), m * beta)


@triton.jit
def agrees(c, g, complement):
    """Whether the sign of c is that of the gradient as it is descended (arXiv:2411.16085)."""
    slope = tl.where(complement < 0, negative(g), g)
    return ((c > 0) & (slope > 0)) | ((c < 0) & (slope < 0))


@triton.jit
def codes(c, finite):
    """What each c adds to its byte's code, (bytes, 8): its bit among those that vote +1, from bit 0
    on, or among those that vote 0, from bit 8 on; and from bit 16 on, 1 where it is not finite."""
    bit = (1 << tl.arange(0, 8))[None, :]
    code = tl.where(c > 0, bit, tl.where(c == 0, bit << 8, 0))
    return tl.where(finite, code, (bit << 8) + (1 << 16))


@triton.jit
def nonfinite(c):
    """How many of each byte's c are not finite, (bytes,)."""
    # Exponent bits all set carry into the top bit. Comparisons would be gathered on the stack.
    magnitude = c.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.sum(((magnitude + 0x00800000) >> 31).to(tl.int32), 1)


@triton.jit
def count(n, counter_ptr):
    """Adds (bytes,) to the counter. A sum over the program would be a barrier for a number that is
    nearly always 0; so, bytes that count nothing write nothing."""
    tl.atomic_add(counter_ptr + tl.zeros_like(n), n.to(tl.int64), mask=n > 0, sem="relaxed")


@triton.jit
def byte_ptr(
    plane_ptr, word, words_per_shard, shard_stride, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Pointers to a tile's bytes (bytes,) in plane 0 of (shards, planes, words); ``word`` is the
    tile's first in word space, int32. One division, where the tile lies in one shard."""
    byte = tl.arange(0, TILE // 8)
    shard, place = shard_of(word + (byte // 4 if MASKED else 0), words_per_shard)
    address = shard.to(tl.int64) * shard_stride + place
    in_word = byte % 4 if MASKED else byte
    ptr = plane_ptr.to(tl.pointer_type(tl.uint8)) + (4 * address + in_word)
    return tl.max_contiguous(ptr, 1)  # as in_plane


@triton.jit
def blank_ptr(
    blanks_ptr, word, words_per_shard, blank_stride, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Pointers (bytes,) to the blank bits of each byte's octet, in (shards, blank words)."""
    byte = tl.arange(0, TILE // 8)
    shard, place = shard_of(word + (byte // 4 if MASKED else 0), words_per_shard)
    octet = (place >> 3) + (0 if MASKED else byte // 32)
    ptr = blanks_ptr.to(tl.pointer_type(tl.uint8))
    return ptr + (4 * (shard.to(tl.int64) * blank_stride) + octet)


@triton.jit
def in_plane(byte_ptr, plane: tl.constexpr, plane_stride):
    """The same bytes of another plane. If the compiler knew that they follow one another, threads
    would move two or four each, and pass them on through shared memory."""
    ptr = byte_ptr
    if plane > 0:
        ptr = tl.max_contiguous(byte_ptr + 4 * plane * plane_stride, 1)
    return ptr


@triton.jit
def mix64(z):
    """One step of SplitMix64; z is uint64."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def coin_key(key, step_ptr):
    """The key of this step's coins; ``key`` holds mix64(mix64(seed) ^ stream)."""
    step = tl.load(step_ptr).to(tl.uint64, bitcast=True)
    return mix64(key.to(tl.int64).to(tl.uint64, bitcast=True) ^ step)


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def blank_bytes(code, left, TILE: tl.constexpr, MASKED: tl.constexpr):
    """The blank bits of each byte's octet, (bytes,): a word is blank unless a byte of it has a vote
    that is not zero, or none of its bytes is a tensor's. An octet is 32 bytes, which a warp holds:
    to join them is one instruction."""
    byte = tl.arange(0, TILE // 8)
    zero = (code >> 8) & 0xFF
    if MASKED:
        n = tl.minimum(tl.maximum(left - 8 * byte, 0), 8)
        is_loud = (zero != (1 << n) - 1) | (32 * (byte // 4) >= left)
    else:
        is_loud = zero != 0xFF
    one = is_loud.to(tl.int32) << (byte // 4 % 8)
    loud = tl.reduce(tl.reshape(one, (TILE // 256, 32)), 1, _or)
    loud = tl.reshape(loud[:, None] + tl.zeros([1, 32], tl.int32), (TILE // 8,))
    return loud ^ 0xFF


@triton.jit
def binary_vote(code, blank, key, step, flip, word, in_word):
    """The byte of votes of a code, mapped over codes: a zero vote is a coin, or its opposite where
    ``flip`` is -1, but 0 in a blank word; and a thread without one tosses none. One hash is the 32
    coins of a word."""
    vote = code & 0xFF
    zero = (code >> 8) & 0xFF
    if zero != 0:
        z = mix64(mix64(key ^ step) + word.to(tl.uint64) * 0x9E3779B97F4A7C15)
        toss = (z >> (32 + 8 * in_word).to(tl.uint64)).to(tl.int32) ^ flip
        vote = vote | tl.where((blank >> (word & 7)) & 1 == 1, 0, zero & toss)
    return vote
