"""Inputs that reached new code of the readers of foreign bytes, once more through them."""

import pytest

from benchmarks.coverage_fuzz import READERS, corpus, one_line
from manifests.errors import DataError


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus_ends_in_answers_or_one_line(reader):
    entries = corpus(reader)
    assert len(entries) > 1 or reader == "tar"
    for entry in entries:
        READERS[reader](entry)


def test_other_errors_are_faults():
    with pytest.raises(KeyError), one_line(ValueError):
        raise KeyError("x")
    with pytest.raises(AssertionError, match="more than a line"), one_line():
        raise DataError("one\ntwo")
    with one_line(ValueError):
        raise ValueError("one")
