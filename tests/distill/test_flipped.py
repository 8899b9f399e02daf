"""One flipped byte in anything that stage 2 keeps: noticed before it is used, or without any effect."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import DataError
from manifests.storage import Storage
from stages.distill import checkpoint
from stages.distill.results import RESULTS, previous_results
from stages.distill.run import run_distill
from stages.models.folders import CONFIG, WEIGHTS
from stages.models.loading import load_model
from tests.distill import short

STUDENT = "digits-cnn-small"


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    """A finished run that keeps its best weights."""
    out = tmp_path_factory.mktemp("run")
    run_distill(short.settings(epochs=1, select="best"), [(dataset, 1.0)], str(out), test_data=dataset)
    return out


def flipped(path: Path, data: st.DataObject) -> bytes:
    """Change one byte of ``path``; returns what was there."""
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(1, 255))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    return whole


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_checkpoint_is_never_resumed_from(run, data):
    whole = flipped(run / checkpoint.STATE, data)
    try:
        with pytest.raises(DataError, match=r"checkpoint\.pt is damaged .*: delete it to start over"):
            checkpoint.parse((run / checkpoint.STATE).read_bytes(), Storage(run), torch.device("cpu"))
    finally:
        (run / checkpoint.STATE).write_bytes(whole)


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_model_folder_is_never_loaded(run, data):
    folder = run / STUDENT
    before, known = load_model(folder)
    path = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    whole = flipped(path, data)
    try:
        net, config = load_model(folder)
    except DataError:
        return
    finally:
        path.write_bytes(whole)
    assert path.name == CONFIG and config == known  # white space between its words
    states = zip(net.state_dict().values(), before.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_description_of_the_run_is_noticed(run, data):
    storage = Storage(run)
    spec = checkpoint.load_checked(storage.read(checkpoint.RUN))
    whole = flipped(run / checkpoint.RUN, data)
    try:
        checkpoint.open_run(storage, spec)
        assert checkpoint.load_checked(storage.read(checkpoint.RUN)) == spec  # white space
    except DataError:
        return
    finally:
        (run / checkpoint.RUN).write_bytes(whole)


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_test_score_is_never_kept(run, data):
    before = previous_results(Storage(run))
    assert before
    whole = flipped(run / RESULTS, data)
    try:
        assert previous_results(Storage(run)) == before  # white space, or the name of the checksum
    except DataError:
        return
    finally:
        (run / RESULTS).write_bytes(whole)
