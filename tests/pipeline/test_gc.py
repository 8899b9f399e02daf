"""Tidying: leftovers go, done shards and live runs are left alone."""

import pytest

from manifests.errors import DataError, FactoryError
from manifests.integrity import verify
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.events import Failure, quarantine, quarantined
from pipeline.lease import Lease
from pipeline.repair import Leftovers, collect

HEX = "0123456789abcdef" * 2
WRITE, HALF = f"write-{HEX}", f"tmp/000001-{HEX}.tar"


@pytest.fixture
def littered(run_folder):
    (run_folder / "shards/000001-0123456789ab.tar").write_bytes(b"x" * 1000)
    (run_folder / "tmp").mkdir(exist_ok=True)
    (run_folder / HALF).write_bytes(b"x" * 500)
    quarantine(Storage(run_folder), Failure(1, 3, "died after its commit"))
    return run_folder


def test_leftovers_go_and_the_dataset_stays(littered):
    before = Manifest.open(littered).read(3)
    removed = collect(Storage(littered))
    assert removed.orphans == ["shards/000001-0123456789ab.tar"]
    assert removed.temporary == [HALF.removeprefix("tmp/")]
    assert removed.bytes == 1500
    assert len(list((littered / "shards").iterdir())) == 4
    assert not quarantined(Storage(littered))
    assert Manifest.open(littered, verify=True).read(3) == before


def test_a_copy_that_was_under_way_to_another_disk_goes(run_folder):
    name = f".000001-0123456789ab.tar-{HEX}"
    (run_folder / "shards" / name).write_bytes(b"x" * 70)
    assert verify(str(run_folder)) == []
    assert collect(Storage(run_folder)).orphans == [f"shards/{name}"]


def test_dry_run_only_tells(littered):
    assert collect(Storage(littered), dry_run=True).bytes == 1500
    assert (littered / HALF).exists() and (littered / "shards/000001-0123456789ab.tar").exists()


def test_a_live_run_is_left_alone(littered):
    with Lease(Storage(littered)), pytest.raises(FactoryError, match="in use"):
        collect(Storage(littered))
    assert (littered / HALF).exists()


def test_after_a_killed_driver_its_workers_may_still_commit(littered, monkeypatch):
    storage = Storage(littered)
    lease = Lease(storage)
    lease.__enter__()
    lease._stop.set()  # as SIGKILL leaves it: never released
    monkeypatch.setattr("pipeline.lease._alive", lambda holder: False)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        (littered / "shards/000001-0123456789ab.tar").rename(littered / "late.tar")  # as if it had been committed

    assert collect(storage, sleep=sleep).orphans == []
    assert slept == [30.0]


def test_a_folder_of_stage_2_has_no_plan_and_keeps_everything_but_leftovers(tmp_path):
    storage = Storage(tmp_path)
    with Lease(storage):
        for name in ("run.json", "checkpoint.pt", "student/model.safetensors"):
            storage.write(name, b"kept")
    (tmp_path / f"tmp/{WRITE}").write_bytes(b"x" * 70)  # a checkpoint half written when the process was killed
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert collect(storage, dry_run=True).temporary == [WRITE]
    assert collect(storage) == Leftovers(
        run=storage.url, orphans=[], temporary=[WRITE], foreign=[], outdated_failures=[], bytes=70, dry_run=False
    )
    before.remove(tmp_path / f"tmp/{WRITE}")
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path for path in after if path.parent.name != "lease"] == [p for p in before if p.parent.name != "lease"]


def test_a_damaged_plan_is_not_taken_for_stage_2(littered):
    (littered / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="plan.json"):
        collect(Storage(littered))
    assert (littered / HALF).exists()


def test_not_a_run(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        collect(Storage(tmp_path))
