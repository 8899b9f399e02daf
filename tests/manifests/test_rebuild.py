from pathlib import Path

import pytest

from manifests.dataset import DatasetInfo
from manifests.errors import DataError
from manifests.integrity import rebuild, verify
from manifests.reader import Manifest
from manifests.shard import done_name, done_records
from manifests.storage import Storage
from manifests.tars import TarStream
from tests.manifests.samples import FINGERPRINT, INFO, all_files, flip, make_dataset, write_shard


@pytest.mark.parametrize("lost", [("m.parquet",), ("done/",), (".parquet",), ("m.parquet", "done/", ".parquet")])
def test_lost_files_come_back_as_they_were(any_storage: Storage, lost: tuple[str, ...]) -> None:
    storage = make_dataset(any_storage.url)
    before = all_files(storage)
    for name in before:
        if any(part in name for part in lost):
            storage.delete(name)
    result = rebuild(storage, INFO)
    assert result.damaged == {}
    assert all_files(storage) == before
    assert verify(storage.url) == []


def test_a_readable_manifest_replaces_the_plan(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    before = all_files(storage)
    storage.delete(done_name(1))
    rebuild(storage)
    assert all_files(storage) == before
    storage.delete("m.parquet")
    with pytest.raises(DataError, match="no such file; without it dataset.json is needed"):
        rebuild(storage)
    storage.write("dataset.json", INFO.to_json())
    rebuild(storage)
    storage.delete("dataset.json")
    assert all_files(storage) == before


def test_damaged_records_are_replaced(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    before = all_files(storage)
    storage.write(done_name(0), b"{")
    flip(storage, done_records_table(storage), 50)
    rebuild(storage, INFO)
    assert all_files(storage) == before


def done_records_table(storage: Storage) -> str:
    return next(name for name in storage.list("shards") if name.endswith(".parquet"))


def test_a_damaged_tar_is_reported_and_its_shard_becomes_undone(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    before = all_files(storage)
    flip(storage, done_records(storage)[1].tar, 700)
    result = rebuild(storage, INFO)
    assert [*result.damaged] == [1]
    assert "shard 1" in result.damaged[1]
    assert [tar.shard for tar in Manifest.open(tmp_path).info.tars] == [0, 2] == [*done_records(storage)]
    write_shard(storage, 1)
    rebuild(storage)
    assert all_files(storage) == before


@pytest.mark.parametrize("info", [None, INFO])  # with INFO only the done record tells of the shard
def test_a_missing_tar_is_reported_and_its_shard_becomes_undone(tmp_path: Path, info: DatasetInfo | None) -> None:
    storage = make_dataset(tmp_path)
    before = all_files(storage)
    storage.delete(done_records(storage)[1].tar)
    result = rebuild(storage, info)
    assert [*result.damaged] == [1] and "the tar of shard 1 is missing" in result.damaged[1]
    assert [*done_records(storage)] == [0, 2]
    write_shard(storage, 1)
    assert rebuild(storage).damaged == {}
    assert all_files(storage) == before


def test_a_damaged_byte_outside_the_samples_is_damage_too(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    flip(storage, done_records(storage)[1].tar, -1)
    assert [*rebuild(storage, INFO).damaged] == [1]


def test_of_two_tars_the_one_that_was_declared_done_counts(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    before = all_files(storage)
    other = Storage(tmp_path / "other")
    record = write_shard(other, 0, rows=2)
    storage.write(record.tar, other.read(record.tar))
    rebuild(storage, INFO)
    assert {name: data for name, data in all_files(storage).items() if name in before} == before


def with_another_tar(folder: Path, fingerprint: str = FINGERPRINT) -> tuple[Storage, dict[str, bytes]]:
    """A dataset and its files, and shard 0 once more: made with ``fingerprint``, first by name, no done record left."""
    storage, other = make_dataset(folder), Storage(folder.parent / "other")
    before, own = all_files(storage), done_records(storage)[0].tar
    record = write_shard(other, 0, 3, fingerprint)
    assert record.tar < own
    for name in (record.tar, record.table):
        storage.write(name, other.read(name))
    storage.delete(done_name(0))
    return storage, before


def test_of_two_tars_the_one_whose_table_is_of_this_plan_counts(tmp_path: Path) -> None:
    storage, before = with_another_tar(tmp_path / "set", "cd" * 32)
    assert rebuild(storage, INFO).damaged == {}
    assert all_files(storage).items() >= before.items()


def test_of_two_tars_the_one_that_the_manifest_lists_counts(tmp_path: Path) -> None:
    storage, before = with_another_tar(tmp_path / "set")
    assert rebuild(storage).damaged == {}
    assert all_files(storage).items() >= before.items()


def test_of_two_tars_none_counts_where_nothing_decides(tmp_path: Path) -> None:
    storage, _ = with_another_tar(tmp_path / "set", "cd" * 32)
    for name in storage.list("shards"):
        if name.endswith(".parquet"):
            storage.delete(name)
    result = rebuild(storage, INFO)
    assert [*result.damaged] == [0] and "shard 0 has 2 intact tars" in result.damaged[0]
    assert [*done_records(storage)] == [1, 2]


def test_rows_of_another_sample_are_refused(tmp_path: Path) -> None:
    import hashlib
    import io

    from manifests.dataset import file_name
    from manifests.tars import walk

    storage = make_dataset(tmp_path, shards=1)
    record = done_records(storage)[0]
    samples = [*walk(io.BytesIO(storage.read(record.tar)))]
    file = io.BytesIO()
    tar = TarStream(file)
    for sample, other in zip(samples, reversed(samples), strict=True):
        tar.add(f"{sample.key}.png", sample.image)
        tar.add(f"{sample.key}.cls", sample.label)
        tar.add(f"{sample.key}.json", other.json)
    tar.close()
    name = file_name(0, hashlib.sha256(file.getvalue()).hexdigest(), "tar")
    storage.delete(record.tar)
    storage.write(name, file.getvalue())
    with pytest.raises(DataError, match="nothing to rebuild from: .*sample 000000-000000: its row is that of another"):
        rebuild(storage, INFO)


def test_nothing_to_rebuild_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to rebuild from: no tars in shards/"):
        rebuild(Storage(tmp_path), INFO)
