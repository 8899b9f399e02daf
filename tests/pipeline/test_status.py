"""Status from the folder alone: states, rate, time left, errors, whatever the log holds."""

import pytest

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, FactoryError, LinkError
from manifests.storage import Storage
from pipeline.events import LOCAL, SUMMARY, EventLog
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


class TestLongLogs:
    """A driver sums a long log up, so that reading it again and again stays quick."""

    ENTRIES = [
        (1000.0, "run_started", {}),
        (1010.0, "shard_done", {"shard": 0, "rows": 4, "bytes": 100}),
        (1020.0, "shard_failed", {"shard": 1, "attempt": 1, "error": "x" * 3000}),
        (1030.0, "shard_done", {"shard": 1, "rows": 3, "bytes": 80}),
        (1040.0, "shard_started", {"shard": 2, "worker": "w"}),
        (1045.0, "shard_done", {"shard": 12, "rows": 9, "bytes": 900}),  # not of the plan
        (1050.0, "shard_done", {"shard": 0, "rows": 5, "bytes": 110}),
        (1060.0, "run_interrupted", {}),
    ]

    def write(self, storage, entries, shards=10):
        now = [entries[0][0] if entries else 0.0]
        with EventLog(storage, clock=lambda: now[0]) as events:
            events.shards = shards
            for time, kind, fields in entries:
                now[0] = time
                events.write(kind, **fields)

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr("pipeline.events.SUMMARY_AFTER", 1)

    @pytest.fixture(params=["local", "remote"])
    def both(self, request, fresh, tmp_path):
        if request.param == "local":
            return fresh
        remote = Storage(f"memory://status-test/{tmp_path.name}")
        remote.write("plan.json", fresh.read("plan.json"))
        return remote

    @pytest.mark.parametrize("split", range(9))
    def test_a_summary_says_what_the_whole_log_says(self, both, split):
        self.write(both, self.ENTRIES, shards=0)
        whole = status(both, now=2000.0)
        for name in [*both.list("events"), LOCAL]:
            both.delete(name)
        self.write(both, self.ENTRIES[:split])
        self.write(both, self.ENTRIES[split:], shards=0)
        assert both.exists(SUMMARY) == (split > 0)
        assert status(both, now=2000.0) == whole
        assert (whole.rows, whole.bytes, whole.stopped_by) == (8, 190, "interrupted")

    def test_what_is_summed_up_is_not_read_again(self, fresh):
        self.write(fresh, self.ENTRIES)
        fresh.write(LOCAL, fresh.read(LOCAL).replace(b'"rows": 5', b'"rows": 7'))
        assert status(fresh).rows == 10  # its end differs: another log, which is read whole
        self.write(fresh, [(1.0, "warning", {"message": "y" * 5000})])
        fresh.write(LOCAL, fresh.read(LOCAL).replace(b'"rows": 7', b'"rows": 9'))
        assert status(fresh).rows == 10

    @pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"covered": {"events.jsonl": 1}}', b"\xff" * 10])
    def test_a_damaged_summary_is_left_out(self, fresh, damage):
        self.write(fresh, self.ENTRIES)
        fresh.write(SUMMARY, damage)
        assert status(fresh).rows == 8

    @pytest.mark.parametrize(
        "wrong",
        [
            {"results": {"0": [10**30, 1]}},
            {"times": [1e300]},
            {"covered": {"events.jsonl": -1}},
            {"covered": {"../x": 5}},
            {"running": {"1": {"shard": 1, "worker": None, "since": None}}},
        ],
    )
    def test_values_that_no_summary_holds_are_left_out(self, fresh, wrong):
        self.write(fresh, self.ENTRIES)
        fresh.write(SUMMARY, dump_checked(load_checked(fresh.read(SUMMARY)) | wrong))
        assert status(fresh).rows == 8

    def test_a_log_that_was_cut_is_read_whole(self, fresh):
        self.write(fresh, self.ENTRIES)
        fresh.write(LOCAL, b"".join(fresh.read(LOCAL).splitlines(keepends=True)[:2]))
        assert status(fresh).rows == 4

    def test_asking_writes_nothing(self, fresh):
        log(fresh, self.ENTRIES)
        status(fresh)
        assert not fresh.exists(SUMMARY)

    def test_a_link_in_its_place_is_refused(self, fresh, tmp_path):
        log(fresh, self.ENTRIES)
        (tmp_path / "run" / SUMMARY).symlink_to("/etc/passwd")
        with pytest.raises(LinkError, match=SUMMARY):
            status(fresh)
