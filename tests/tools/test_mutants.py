"""The mutants of tools/mutants.py fit the tree: one that is stale is seen at once, not at night."""

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
import mutants


def test_none_is_stale():
    assert not mutants.stale_among(mutants.MUTANTS)


def test_what_is_stale_is_named():
    (file,) = mutants.stale_among([("no file", "csrc/none.h", "a", "b")])
    (text,) = mutants.stale_among([("no text", "setup.py", "no such text", "b")])
    assert "'no file' is stale: csrc/none.h" in file and "'no text' is stale: setup.py" in text
