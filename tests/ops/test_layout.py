"""Ballot layout, bit-exact: words, padding, chunks and flags against numpy.packbits."""

import numpy as np
import pytest
import torch

import oracle
from common import SIZES, generator, words
from lion_kernels import reference
from lion_kernels.layout import ALIGN_WORDS, BallotLayout, pack_flags, words_of


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("planes", [1, 2, 5])
def test_pack_is_packbits(n, planes):
    integers = torch.randint(0, 2**planes, (n,), generator=generator(n))
    packed = reference.pack(integers, planes)
    for b in range(planes):
        expected = oracle.pack((integers.numpy() >> b) & 1)
        np.testing.assert_array_equal(words(packed[b]), expected)
    assert torch.equal(reference.unpack(packed)[:n], integers)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 8, 16, 17, 64])
@pytest.mark.parametrize("numels", [(), (0,), (1,), (32, 33, 0, 1), (1000, 7, 50000)])
def test_chunks_have_room_and_alignment(numels, shards):
    layout = BallotLayout(numels, planes=2, shards=shards)
    need = sum(-(-n // 32) for n in numels)
    assert layout.n_words == need
    assert layout.words_per_shard * shards >= need
    assert (layout.words_per_shard - ALIGN_WORDS) * shards < max(need, 1)
    for size in (layout.words_per_shard, layout.flag_words, layout.chunk_words):
        assert size % ALIGN_WORDS == 0
    chunks = torch.arange(shards * layout.chunk_words, dtype=torch.int32).view(shards, -1)
    planes, flags = layout.planes_of(chunks), layout.flags_of(chunks)
    assert planes.shape == (shards, 2, layout.words_per_shard)
    seen = torch.cat([planes.flatten(1), flags], dim=1)
    assert torch.equal(seen, chunks)
    assert planes.untyped_storage().data_ptr() == chunks.untyped_storage().data_ptr()


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 148, 2000])
def test_flags(n):
    present = [bool(x) for x in torch.randint(0, 2, (n,), generator=generator(n))]
    n_words = BallotLayout((5,) * n, planes=1, shards=2).flag_words
    flags = torch.tensor(pack_flags(present, n_words), dtype=torch.int32)
    assert oracle.unpack(words(flags))[:n].tolist() == present
    assert not oracle.unpack(words(flags))[n:].any()


def test_words_of():
    assert [words_of(n) for n in (0, 1, 32, 33, 2**40 + 1)] == [0, 1, 1, 2, 2**35 + 1]


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
