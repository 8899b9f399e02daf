"""Status from the folder alone: states, rate, time left, errors, whatever the log holds."""

import pytest

from manifests.errors import DataError, FactoryError
from manifests.storage import Storage
from pipeline.events import EventLog
from pipeline.lease import Lease
from pipeline.plan import make_plan, open_or_create
from pipeline.status import status
from pipeline.synth import run_synth
from stages.synth.inputs import inspect_inputs
from tests.pipeline.conftest import INLINE, small_recipe
from tests.pipeline.fake_worker import FACTORY, POISON


@pytest.fixture
def fresh(tmp_path):
    """A planned run of ten shards without any work done."""
    storage, recipe = Storage(tmp_path / "run"), small_recipe("shards=10")
    open_or_create(storage, make_plan(recipe, inspect_inputs(recipe.synth)))
    return storage


def log(storage, entries):
    now = [0.0]
    events = EventLog(storage, clock=lambda: now[0])
    for time, kind, fields in entries:
        now[0] = time
        events.write(kind, **fields)


def done(storage, *shards):
    for shard in shards:
        storage.write(f"done/{shard:06d}.json", b"{}")


def test_a_complete_run(run_folder):
    found = status(Storage(run_folder))
    assert (found.state, found.done, found.shards, found.missing) == ("complete", 2, 2, 0)
    assert (found.rows, found.failed, found.driver) == (40, [], None)
    assert "complete, 2 of 2 shards done" in next(found.lines())


def test_a_run_that_grew_is_complete_once_its_manifest_holds_the_new_shards(run_folder, monkeypatch):
    def stopped(*_):
        raise FactoryError("the disk is full")

    monkeypatch.setattr("pipeline.synth.merge", stopped)
    with pytest.raises(FactoryError):
        run_synth(small_recipe("shards=3"), str(run_folder), INLINE, worker=FACTORY, quiet=True)
    found = status(Storage(run_folder))
    assert (found.state, found.done, found.shards) == ("stopped", 3, 3)
    monkeypatch.undo()
    run_synth(small_recipe("shards=3"), str(run_folder), INLINE, worker=FACTORY, quiet=True)
    assert status(Storage(run_folder)).state == "complete"
    (run_folder / "m.parquet").write_bytes(b"PAR1")
    assert status(Storage(run_folder)).state == "stopped"


def test_no_run(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        status(Storage(tmp_path))


def test_rate_and_time_left_while_a_driver_lives(fresh):
    done(fresh, 0, 1)
    log(
        fresh,
        [
            (50.0, "shard_done", {"shard": 9, "rows": 5}),  # an earlier run: no part of the rate
            (100.0, "run_started", {}),
            (100.0, "shard_started", {"shard": 0, "worker": "w"}),
            (110.0, "shard_done", {"shard": 0, "rows": 40, "bytes": 10}),
            (110.0, "shard_started", {"shard": 1, "worker": "w"}),
            (120.0, "shard_done", {"shard": 1, "rows": 40, "bytes": 10}),
            (120.0, "shard_started", {"shard": 2, "worker": "w"}),
        ],
    )
    with Lease(fresh):
        found = status(fresh, now=125.0)
        assert found.state == "running"
        assert [entry.shard for entry in found.running] == [2]
        assert found.shards_per_hour == 360
        assert found.seconds_left == 80  # 8 shards of 10 s each
        assert "running  shard 000002 on w for 5 s" in list(found.lines(now=125.0))
        late = status(fresh, now=160.0)  # nothing for 40 s, the longest gap was 10 s
        assert late.shards_per_hour == 120
    after = status(fresh, now=200.0)
    assert (after.state, after.running, after.seconds_left) == ("stopped", [], None)


def test_failures_and_their_last_errors(tmp_path):
    with pytest.raises(FactoryError):
        run_synth(small_recipe("shards=3"), str(tmp_path / "run"), INLINE, worker=POISON, quiet=True)
    found = status(Storage(tmp_path / "run"))
    assert (found.state, found.done, found.failed, found.missing) == ("stopped", 2, [1], 0)
    assert [error.attempt for error in found.last_errors] == [1, 2, 3]
    assert "1 of 3 shards failed" in found.stopped_by
    text = "\n".join(found.lines())
    assert "poison" in text and "\x1b" not in text


def test_a_run_that_has_only_a_plan(fresh):
    found = status(fresh)
    assert (found.state, found.done, found.missing, found.shards_per_hour) == ("stopped", 0, 10, None)
