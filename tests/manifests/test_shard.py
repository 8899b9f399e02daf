import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from manifests.errors import DataError
from manifests.shard import STEPS, DoneRecord, ShardWriter, done_record, done_records
from manifests.storage import Storage
from tests.manifests.samples import FINGERPRINT, all_files, make_image, make_row, write_shard

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from manifests.storage import Storage
from tests.manifests.samples import write_shard
write_shard(Storage(sys.argv[1]), 3)
"""


def run_worker(folder: Path, **environment: str) -> int:
    command = [sys.executable, "-c", WORKER, str(folder), str(Path(__file__).parents[2])]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def test_a_committed_shard(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    record = write_shard(storage, 12)
    assert record.tar == f"shards/000012-{record.tar_sha256[:12]}.tar"
    assert record.table == f"shards/000012-{record.table_sha256[:12]}.parquet"
    assert (record.rows, record.kept, record.fingerprint) == (6, 5, FINGERPRINT)
    assert done_records(storage) == {12: record}
    assert storage.list("tmp") == []
    rows = pq.read_table(storage.path(record.table)).to_pylist()
    assert [row["key"] for row in rows] == [f"000012-{index:06d}" for index in range(6)]
    for index, row in enumerate(rows):
        assert storage.read_range(record.tar, row["offset"], row["size"]) == make_image(12, index)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(Storage(tmp_path / name), 0)
    assert all_files(Storage(tmp_path / "a")) == all_files(Storage(tmp_path / "b"))


@pytest.mark.parametrize("fail", [True, False])
def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path, fail: bool) -> None:
    storage = Storage(tmp_path)

    def attempt() -> None:
        with ShardWriter(storage, 0, FINGERPRINT) as writer:
            writer.add(make_row(0, 0), b"image")
            if fail:
                raise RuntimeError("the sampler broke")

    if fail:
        with pytest.raises(RuntimeError, match="the sampler broke"):
            attempt()
    else:
        attempt()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("change", "image", "extension", "reason"),
    [
        ({"labl": 1}, b"x", "png", "unknown column 'labl'"),
        ({"label": None}, b"x", "png", "'label' must not be null"),
        ({}, b"x", "gif", "expected one of png, jpg, webp"),
        ({"prompt": "x" * (1 << 20)}, b"x", "png", "row of"),
    ],
)
def test_a_bad_sample_is_refused_and_the_shard_stays_usable(
    tmp_path: Path, change: dict[str, Any], image: bytes, extension: str, reason: str
) -> None:
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as writer:
        with pytest.raises(ValueError, match=reason):
            writer.add({**make_row(0, 0), **change}, image, extension)
        writer.add(make_row(0, 0), image)
        assert writer.commit().rows == 1


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_loses_and_repeats_nothing(tmp_path: Path, step: str) -> None:
    whole = Storage(tmp_path / "whole")
    write_shard(whole, 3)
    storage = Storage(tmp_path / "killed")
    assert run_worker(tmp_path / "killed", FACTORY_FAULT=f"{step}:3") == -signal.SIGKILL
    assert (3 in done_records(storage)) == (step == "done")
    assert run_worker(tmp_path / "killed") == 0
    assert all_files(storage) == all_files(whole)


def test_a_fault_can_strike_once_and_only_its_shard(tmp_path: Path) -> None:
    marker = tmp_path / "struck"
    fault = f"tar:3:{marker}"
    assert run_worker(tmp_path / "set", FACTORY_FAULT="tar:4") == 0
    assert run_worker(tmp_path / "other", FACTORY_FAULT=fault) == -signal.SIGKILL
    assert run_worker(tmp_path / "other", FACTORY_FAULT=fault) == 0


def test_two_attempts_with_equal_content_agree(any_storage: Storage) -> None:
    first = write_shard(any_storage, 0)
    assert write_shard(any_storage, 0) == first
    assert len(any_storage.list("shards")) == 2


def test_the_first_of_two_different_attempts_wins(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as slow:
        slow.add(make_row(0, 0), b"another image")
        first = write_shard(storage, 0)
        assert slow.commit() == first
    assert storage.list("shards") == sorted([first.tar, first.table])


def test_a_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_shard(storage, 0, fingerprint="other" * 5)
    before = all_files(storage)
    with pytest.raises(DataError, match=r"000000\.json: made by another plan"):
        write_shard(storage, 0)
    assert {name: data for name, data in all_files(storage).items() if name in before} == before


def test_what_did_not_reach_the_disk_is_never_declared_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as writer:
        writer.add(make_row(0, 0), b"image" * 100)
        writer._tar.close()
        writer._file.flush()
        os.truncate(writer._tar_path, 700)
        monkeypatch.setattr(writer._tar, "close", lambda: None)
        with pytest.raises(DataError, match="shard 0, sample 000000-000000, as written: cut short"):
            writer.commit()
    assert done_records(storage) == {}
    assert storage.list("shards") == storage.list("tmp") == []


@pytest.mark.parametrize(("samples", "reason"), [(1, "the tar ends before it"), (3, ".*the manifest has no more")])
def test_a_tar_of_fewer_or_more_samples_is_never_declared_done(tmp_path: Path, samples: int, reason: str) -> None:
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as writer:
        for index in range(samples):
            writer.add(make_row(0, index), b"image")
        writer._rows = [*writer._rows, *writer._rows][:2]
        with pytest.raises(DataError, match=f"shard 0, sample 000000-00000., as written: {reason}"):
            writer.commit()
    assert done_records(storage) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"tar": "../../etc/passwd"},
        {"tar": "shards/000001-000000000000.tar"},
        {"table": "/etc/passwd"},
        {"tar_sha256": "xyz"},
        {"shard": "0"},
        {"shard": True},
        {"rows": -1},
        {"kept": 7},
        {"tar_bytes": 1.5},
        {"extra": 1},
        {"fingerprint": None},
    ],
)
def test_damaged_done_records_are_data_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    storage = Storage(tmp_path)
    record = write_shard(storage, 0)
    storage.write("done/000000.json", json.dumps({**asdict(record), **change}).encode())
    with pytest.raises(DataError, match=r"done/000000\.json: damaged done record"):
        done_records(storage)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 70_000, b"\xff", b'{"shard": 0}'])
def test_done_records_that_are_no_records(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^x\.json: damaged done record: [^\n]*$"):
        DoneRecord.from_json(data, "x.json")


def test_a_done_record_under_another_number_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    record = write_shard(storage, 0)
    storage.write("done/000001.json", record.to_json())
    assert done_record(storage, 0) == record
    assert done_record(storage, 2) is None
    for call in (lambda: done_records(storage), lambda: done_record(storage, 1)):
        with pytest.raises(DataError, match=r"000001\.json: holds the record of shard 0"):
            call()
