"""Ballot layout, bit-exact: words, octets, chunks, blank bits and flags against numpy.packbits."""

import numpy as np
import pytest
import torch

import oracle
from common import SIZES, blank_bits, generator, int32, words
from lion_kernels import reference
from lion_kernels.layout import (
    ALIGN_WORDS,
    DIGEST,
    OCTET,
    SEAL_WORDS,
    STATUS,
    VERSION,
    BallotLayout,
    blank_words,
    pack_flags,
    room_of,
    to_int32,
    words_of,
)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("planes", [1, 2, 5])
def test_pack_is_packbits(n, planes):
    integers = torch.randint(0, 2**planes, (n,), generator=generator(n))
    packed = reference.pack(integers, planes)
    for b in range(planes):
        expected = oracle.pack((integers.numpy() >> b) & 1)
        np.testing.assert_array_equal(words(packed[b]), expected)
    assert torch.equal(reference.unpack(packed)[:n], integers)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 8, 16, 17, 64])
@pytest.mark.parametrize("numels", [(), (0,), (1,), (32, 33, 0, 1), (1000, 7, 50000)])
def test_chunks_have_room_and_alignment(numels, shards, planes):
    layout = BallotLayout(numels, planes=planes, shards=shards)
    need = sum(oracle.room(n) // 32 for n in numels)
    assert layout.n_words == need
    assert layout.words_per_shard * shards >= need
    assert (layout.words_per_shard - OCTET) * shards < max(need, 1)
    assert layout.words_per_shard % OCTET == 0
    for size in (layout.blank_words, layout.trailer_words, layout.chunk_words):
        assert size % ALIGN_WORDS == 0
    assert layout.blank_words == (blank_words(layout.words_per_shard) if planes % 2 else 0)
    chunks = torch.arange(shards * layout.chunk_words, dtype=torch.int32).view(shards, -1)
    parts = layout.planes_of(chunks), layout.blanks_of(chunks), layout.trailers_of(chunks)
    assert parts[0].shape == (shards, planes, layout.words_per_shard)
    assert parts[2].shape == (shards, layout.trailer_words)
    assert (parts[1] is None) == (planes % 2 == 0)
    there = [part.flatten(1) for part in parts if part is not None]
    assert torch.equal(torch.cat(there, dim=1), chunks)  # in this order, each word once
    for part in there:
        assert part.untyped_storage().data_ptr() == chunks.untyped_storage().data_ptr()


@pytest.mark.parametrize("n_words", [0, 1, 8, 32, 120, 128, 136, 2**20])
def test_blank_words_hold_a_bit_for_each_word(n_words):
    n = blank_words(n_words)
    assert n % ALIGN_WORDS == 0 and n_words <= 32 * n < n_words + 32 * ALIGN_WORDS
    is_blank = torch.randint(0, 2, (2, n_words), generator=generator(n_words)).numpy()
    bits = reference.unpack(blank_bits(is_blank, n).unsqueeze(1))
    np.testing.assert_array_equal(bits[:, :n_words], is_blank)
    assert not bits[:, n_words:].any()


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 148, 2000])
def test_flags(n):
    present = [bool(x) for x in torch.randint(0, 2, (n,), generator=generator(n))]
    layout = BallotLayout((5,) * n, planes=1, shards=2)
    flags = torch.tensor(pack_flags(present, layout.flag_words), dtype=torch.int32)
    assert oracle.unpack(words(flags))[:n].tolist() == present
    assert not oracle.unpack(words(flags))[n:].any()
    assert layout.trailer_words == layout.flag_words + SEAL_WORDS
    assert torch.equal(flags[: words_of(n)], int32(oracle.pack(present)))


def test_a_trailer_ends_with_status_version_and_digest():
    assert (STATUS, VERSION, DIGEST, SEAL_WORDS) == (-4, -3, -2, 4)


def test_to_int32():
    values = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    assert to_int32(values) == np.array(values, np.uint32).view(np.int32).tolist()


def test_words_of():
    assert [words_of(n) for n in (0, 1, 32, 33, 2**40 + 1)] == [0, 1, 1, 2, 2**35 + 1]
    sizes = (0, 1, 255, 256, 257, 2**40 + 1)
    assert [room_of(n) for n in sizes] == [oracle.room(n) // 32 for n in sizes]
    assert room_of(1) == room_of(256) == OCTET and room_of(257) == 2 * OCTET


@pytest.mark.parametrize(("seed", "stream", "step"), [(0, 0, 0), (7, -1, 3), (2**63 - 1, 5, 10**9)])
def test_coins_are_the_oracles(seed, stream, step):
    mine = reference.coins(seed, stream, step, first_word=5, n_words=4)
    np.testing.assert_array_equal(mine.numpy(), oracle.coin(seed, stream, step, 5 * 32, 4 * 32))


def test_coins_are_fair_and_differ():
    def toss(seed=0, stream=0, step=0):
        return reference.coins(seed, stream, step, 0, 2000).double()

    base = toss()
    assert abs(base.mean() - 0.5) < 4 * 0.5 / 64000**0.5
    for other in (toss(seed=1), toss(stream=1), toss(stream=-1), toss(step=1)):
        assert abs((base == other).double().mean() - 0.5) < 4 * 0.5 / 64000**0.5
    per_bit = base.view(-1, 32).mean(0)
    assert (per_bit - 0.5).abs().max() < 5 * 0.5 / 2000**0.5
