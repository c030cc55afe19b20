"""The audit of a sharded vote: what is honest passes, who lies is named on every rank, before a
parameter is written."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from common import Workers, bits_equal, exact, generator, random_words
from lion_kernels import DistributedLion
from lion_kernels.simulate import loopback
from lion_kernels.vote import audit as audits
from lion_kernels.vote import election
from voters import CHOICES, HYPER

# Words of a shard: less than a slice of 1,024, a slice, a few more, and several.
N, WORDS = 4, (8, 1024, 1032, 4000)
VOTES = [choice[:3] for choice in CHOICES if choice[3] == "sharded"]


def world(n_words=104, n=N, **options):
    """Workers that audit every step, of one tensor that fills shards of ``n_words``."""
    options = {"exchange": "sharded", "audit_every": 1, **HYPER, **options}
    return Workers([torch.zeros(32 * n_words * n)], n, **options)


def step(workers, seed=0):
    gen = generator(seed)
    workers.step([[exact(row[0].numel(), gen)] for row in workers.params])


def refused(workers):
    """What the audit of the next step says, which no parameter takes."""
    with pytest.raises(RuntimeError, match="an audit of the vote failed") as error:
        step(workers)
    assert not any(p.any() for row in workers.params for p in row)
    return str(error.value).removeprefix("an audit of the vote failed: ").split("; ")


@pytest.fixture
def before_audits(monkeypatch):
    """before_audits(function): calls function(wire, buffers, sent) on each rank when verdicts have
    arrived, before the audit; ``errors`` holds what each rank's audit raised."""
    errors = []

    def patch(function):
        def patched(wire, buffers, sent, *rest, **how):
            function(wire, buffers, sent)
            try:
                yield from audits.audit(wire, buffers, sent, *rest, **how)
            except RuntimeError as error:
                errors.append(str(error))
                raise

        monkeypatch.setattr(election, "audit", patched)
        return errors

    return patch


@pytest.fixture
def drawn(monkeypatch):
    """drawn(place): every audit takes the slice of that place, where N ranks draw."""

    def patch(place):
        draws = itertools.cycle([place] + [0] * (N - 1))
        monkeypatch.setattr(audits, "secrets", SimpleNamespace(randbits=lambda _: next(draws)))

    return patch


@pytest.mark.parametrize("n_words", WORDS)
@pytest.mark.parametrize(("aggregation", "ballots", "ties"), VOTES)
def test_what_is_honest_passes(aggregation, ballots, ties, n_words):
    votes = {"aggregation": aggregation, "ballots": ballots, "ties": ties}
    audited, other = world(n_words, **votes), world(n_words, **votes, audit_every=0)
    for seed in range(3):
        step(audited, seed)
        step(other, seed)
        assert bits_equal(audited.params[0][0].detach(), other.params[0][0].detach())


@pytest.mark.parametrize(("aggregation", "ballots", "ties"), VOTES)
@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 2), (1, 2, 4, 4, 200)])
def test_weights_groups_and_doubles_pass(weights, aggregation, ballots, ties):
    """Zero gradients, absent ones, and an election of float64 beside the others."""
    gen, opts, rows = generator(1), [], []
    votes = {"aggregation": aggregation, "ballots": ballots, "ties": ties, "exchange": "sharded"}
    for weight, end in zip(weights, loopback(len(weights)), strict=True):
        shapes = ((700, torch.float32), (33, torch.bfloat16), (5000, torch.float64))
        row = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in shapes]
        groups = [{"params": row[:1]}, {"params": row[1:], "lr": 0.5}]
        options = {**HYPER, **votes, "weight": weight, "audit_every": 1}
        opts.append(DistributedLion(groups, process_group=end, **options))
        rows.append(row)
    for number in range(3):
        for rank, (row, opt) in enumerate(zip(rows, opts, strict=True)):
            for t, p in enumerate(row):
                p.grad = exact(p.numel(), gen, p.dtype)
                p.grad[64 * rank :: 3] = 0
                p.grad = None if (rank + number + t) % 4 == 0 else p.grad
            opt.step()
    assert all(p.any() for p in rows[0])


@pytest.mark.parametrize(("aggregation", "ballots", "ties"), VOTES)
def test_an_owner_that_lies_to_all(monkeypatch, before_audits, aggregation, ballots, ties):
    def lying(self, booth, moves, seed, count=election.Electorate._count):
        count(self, booth, moves, seed)
        if self.wire.rank == 2:
            booth.buffers.verdict_planes[2, 0, 5] ^= 1

    monkeypatch.setattr(election.Electorate, "_count", lying)
    errors = before_audits(lambda *_: None)
    workers = world(aggregation=aggregation, ballots=ballots, ties=ties)
    said = refused(workers)
    named = "rank {} finds that the verdict of rank 2 is not that of the ballots"
    assert said == [named.format(rank) for rank in range(N)] and len(set(errors)) == 1


@pytest.mark.parametrize("what", ["planes", "blanks"])
def test_an_owner_that_lies_to_one_rank(before_audits, what):
    def lie(wire, buffers, sent):
        if wire.rank == 1:
            getattr(buffers, f"verdict_{what}")[3].view(-1)[0] ^= 1 << 7

    errors = before_audits(lie)
    named = "rank 1 finds that the verdict of rank 3 is not that of the ballots"
    assert refused(world(ties="coin")) == [named] and len(set(errors)) == 1


@pytest.mark.parametrize("is_blank", [False, True])
def test_a_voter_that_hands_over_another_ballot(before_audits, is_blank):
    """To shard 2; the ballots that are handed over would have made the same verdict, or not."""

    def lie(wire, buffers, sent):
        if wire.rank == 0:
            view = buffers.layout.blanks_of(sent) if is_blank else buffers.layout.planes_of(sent)
            view[2].view(-1)[3 if is_blank else 5] ^= 1 << 2

    errors = before_audits(lie)
    said = refused(world())
    assert "rank 2 says that rank 0 had sent it another ballot" in said and len(set(errors)) == 1
    about_others = "rank 2 is not that of the ballots"
    assert all(each.endswith((about_others, "rank 0 had sent it another ballot")) for each in said)


@pytest.mark.parametrize("n_words", WORDS)
def test_every_word_is_in_a_slice(before_audits, drawn, n_words):
    """The first word of a shard in the first place, and the last one in the last."""
    for place, word in ((0, 0), (-1, n_words - 1)):

        def lie(wire, buffers, sent, word=word):
            if wire.rank == 0:
                buffers.verdict_planes[1, 0, word] ^= 1

        before_audits(lie)
        drawn(place)
        assert len(refused(world(n_words))) == 1


def test_the_slice_is_drawn_when_verdicts_are_out(monkeypatch):
    happened = []

    def verdicts(self, wire, buffers, send=election.EXCHANGES["sharded"].verdicts):
        yield from send(wire, buffers)
        happened.append("verdicts")

    draws = SimpleNamespace(randbits=lambda _: happened.append("draws") or 7)
    monkeypatch.setattr(audits, "secrets", draws)
    monkeypatch.setattr(type(election.EXCHANGES["sharded"]), "verdicts", verdicts)
    workers = world()
    for _ in range(2):
        happened.clear()
        step(workers)
        # In a loopback, a worker after the other goes from one transfer to the next.
        assert happened == ["verdicts", "draws"] * N


def test_slices_differ_from_step_to_step(monkeypatch):
    begins = []

    def is_right(buffers, ballots, owner, *, cut, right=audits._is_right, **how):
        begins.append(cut.start)
        return right(buffers, ballots, owner, cut=cut, **how)

    monkeypatch.setattr(audits, "_is_right", is_right)
    workers = world(40_000, n=2)
    for _ in range(4):
        step(workers)
    by_step = [set(begins[i : i + 4]) for i in range(0, 16, 4)]
    assert [*map(len, by_step)] == [1] * 4  # the same of every rank and shard
    assert len(set.union(*by_step)) > 1  # by chance it fails once in 10**9


@pytest.mark.parametrize("ballots", ["binary", "ternary"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("n_words", [8, 1024, 4000])
def test_bytes_and_steps(drawn, ballots, every, n_words):
    drawn(0)
    workers, sent = world(n_words, ballots=ballots, audit_every=every), [0]
    plain, planes = world(n_words, ballots=ballots, audit_every=0), 1 + (ballots == "ternary")
    for seed in range(6):
        step(workers, seed)
        sent.append(workers.opts[0].wire_bytes)
    step(plain)
    extra = [b - a - plain.opts[0].wire_bytes for a, b in itertools.pairwise(sent)]
    # Planes, and blank bits beside one, of a slice of each shard, to all others.
    length = min(n_words, 1024)
    of_audit = 4 * N * (N - 1) * (planes * length + (-(-length // 32) if planes == 1 else 0))
    assert extra == [of_audit if (i + 1) % every == 0 else 0 for i in range(6)]


def test_an_allgather_is_not_audited(monkeypatch):
    monkeypatch.setattr(election, "audit", None)
    workers = world(exchange="allgather")
    step(workers)
    assert workers.params[0][0].any()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_random_ballots_pass(monkeypatch, n):
    """Whatever chunks hold, where it is no trailer: the audit counts as owners do."""

    def encode(self, booth, *rest, encode=election.Electorate._encode):
        encode(self, booth, *rest)
        chunks, layout = booth.buffers.ballot, booth.buffers.layout
        garbage = random_words(*chunks.shape, gen=generator(self.wire.rank))
        chunks[:, : -layout.trailer_words] = garbage[:, : -layout.trailer_words]

    monkeypatch.setattr(election.Electorate, "_encode", encode)
    for n_words, votes in itertools.product((104, 1032), VOTES):
        names = ("aggregation", "ballots", "ties")
        step(world(n_words, n, **dict(zip(names, votes, strict=True))))


def audited(rank):
    p = torch.nn.Parameter(torch.zeros(200_000))
    opt = DistributedLion([p], **HYPER, exchange="sharded", audit_every=2)
    for number in range(4):
        p.grad = exact(200_000, generator(10 * rank + number))
        opt.step()
    opt.verify_replicas()
    return p.detach()


def test_real_processes(worlds):
    one, *others = worlds(3).run(audited)
    assert one.any() and all(bits_equal(one, other) for other in others)
