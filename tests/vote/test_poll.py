"""The table of what is voted, against what the ballots of an oracle need."""

import itertools

import pytest

from lion_kernels.layout import MAX_SCALE
from lion_kernels.vote.poll import Poll

WORLDS = (1, 2, 3, 4, 5, 8, 16, 17, 64)
VOTES = {"binary": (0, 1), "ternary": (0, 1, 2)}  # the integers that a rank may send


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize("ballots", VOTES)
def test_planes_hold_every_integer_and_no_more(n, ballots):
    poll, votes = Poll(n, ballots=ballots), VOTES[ballots]
    assert 2**poll.ballot_planes > max(votes) >= 2 ** (poll.ballot_planes - 1)
    sums = {n * v for v in votes} | {(n - 1) * votes[-1] + v for v in votes}
    assert max(sums) == poll.scale  # of which 2 * v / scale - 1 is 1
    assert 2**poll.tally_planes > max(sums) >= 2 ** (poll.tally_planes - 1)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize(
    ("aggregation", "ballots", "ties"),
    list(itertools.product(("majority", "average"), VOTES, ("zero", "coin"))),
)
def test_verdicts(n, aggregation, ballots, ties):
    poll = Poll(n, aggregation, ballots, ties)
    sums = {sum(votes) for votes in itertools.product(VOTES[ballots], repeat=n)}
    if aggregation == "average":
        assert (poll.verdict_planes, poll.verdict_scale) == (poll.tally_planes, max(sums))
    else:
        can_tie = any(2 * total == poll.scale for total in sums) and ties == "zero"
        assert (poll.verdict_planes, poll.verdict_scale) == ((2, 2) if can_tie else (1, 1))


def test_more_votes_than_can_be_counted():
    assert Poll(MAX_SCALE).tally_planes == 16
    with pytest.raises(ValueError, match=f"at most {MAX_SCALE} votes can be counted, got"):
        Poll(MAX_SCALE // 2 + 1, ballots="ternary")
