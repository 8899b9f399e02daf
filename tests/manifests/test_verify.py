import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import DataError
from manifests.integrity import rebuild, verify
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.schema import SCHEMA, write_options
from manifests.shard import ShardWriter, done_name, done_records
from manifests.storage import Storage
from tests.manifests.samples import FINGERPRINT, INFO, flip, make_dataset, make_row, write_shard


def lines(storage: Storage, deep: bool = True) -> list[str]:
    return [str(problem) for problem in verify(storage.url, deep)]


def write_plan(storage: Storage, shards: int, fingerprint: str = FINGERPRINT) -> None:
    storage.write("plan.json", json.dumps({"fingerprint": fingerprint, "shards": shards}).encode())


def test_a_whole_dataset_has_no_problem(any_storage: Storage) -> None:
    storage = make_dataset(any_storage.url)
    write_plan(storage, 3)
    assert lines(storage) == lines(storage, deep=False) == []
    assert verify(storage.path("m.parquet")) == []


def test_a_dataset_of_rejected_images_alone_is_whole(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as writer:
        writer.add(make_row(0, 4), b"image")
        writer.commit()
    merge(storage, INFO)
    assert lines(storage) == []
    storage.delete(done_name(0))
    assert lines(storage) == []
    assert rebuild(storage).info.rows == 1


def test_a_published_dataset_needs_only_manifest_and_tars(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    for record in done_records(storage).values():
        storage.delete(done_name(record.shard))
        storage.delete(record.table)
    assert lines(storage) == []
    flip(storage, Manifest.open(tmp_path).info.tars[2].name, 520)
    assert any("shard 2, sample 000002-000000: the image was altered" in line for line in lines(storage))


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (600 - 512, "shard 1, sample 000001-000000: damaged tar header"),
        (520, "shard 1, sample 000001-000000: the image was altered"),
        (1536 + 20, "shard 1, sample 000001-000000: "),
        (-1, "shard 1: "),
    ],
)
def test_shard_and_sample_of_a_flipped_byte_are_named(tmp_path: Path, position: int, expected: str) -> None:
    storage = make_dataset(tmp_path)
    flip(storage, done_records(storage)[1].tar, position)
    found = lines(storage)
    assert any(line.startswith(expected) for line in found), found
    assert any("sha256 differs" in line for line in found)
    assert all(line.startswith("shard 1") for line in found)


def test_every_lost_sample_of_a_cut_tar_is_named(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    record = done_records(storage)[0]
    fourth = pq.read_table(storage.path(record.table))["offset"][3].as_py()
    storage.write(record.tar, storage.read(record.tar)[: fourth + 5])
    found = lines(storage)
    assert any(line.startswith("shard 0, sample 000000-000003: cut short") for line in found)
    for index in (4, 5):
        assert f"shard 0, sample 00000{0}-00000{index}: the image was altered or cut off (checksum differs)" in found
    assert any("expected 20480" in line for line in lines(storage, deep=False))


def test_problems_of_every_other_file(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    write_plan(storage, 5)
    records = done_records(storage)
    assert lines(storage) == ["plan.json: 2 of 5 shards are not done: 3, 4"]
    write_plan(storage, 3)

    storage.write(done_name(0), b"{}")
    assert any(line.startswith("done/000000.json: damaged done record") for line in lines(storage))
    storage.write(done_name(0), records[0].to_json())

    table = storage.read(records[1].table)
    flip(storage, records[1].table, 100)
    assert any(line.startswith("shard 1: ") and "altered" in line for line in lines(storage))
    storage.delete(records[1].table)
    assert any(line.startswith("shard 1: ") for line in lines(storage, deep=False))
    storage.write(records[1].table, table)

    tar = storage.read(records[2].tar)
    storage.delete(records[2].tar)
    assert f"shard 2: {records[2].tar} is missing" in lines(storage)
    storage.write(records[2].tar, tar)

    write_plan(storage, 3, "f" * 64)
    assert f"done/000001.json: made by another plan ({FINGERPRINT[:12]})" in lines(storage)
    storage.write("plan.json", b"[")
    assert lines(storage)[0].startswith("plan.json: damaged")
    write_plan(storage, 3)

    write_shard(storage, 3)
    write_plan(storage, 4)
    assert lines(storage) == ["m.parquet: shard 3 is not in it"]
    storage.delete("m.parquet")
    assert lines(storage) == ["m.parquet: no such file"]


def test_an_altered_description_is_named(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    storage.write("dataset.json", INFO.to_json())
    assert lines(storage) == []
    storage.write("dataset.json", INFO.to_json().replace(b"zero", b"nine"))
    assert lines(storage)[0].startswith("dataset.json: damaged description: it was altered")
    storage.write("dataset.json", replace(INFO, fingerprint="f" * 64).to_json())
    assert lines(storage) == ["dataset.json: made by another plan (ffffffffffff)"]


def test_a_manifest_that_disagrees_with_its_shards_is_named(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    table = pq.read_table(storage.path("m.parquet"))
    labels = table["label"].to_pylist()
    labels[8] += 1
    column = table.schema.get_field_index("label")
    changed = table.set_column(column, SCHEMA.field("label"), pa.array(labels, pa.int32()))
    pq.write_table(changed, storage.path("m.parquet"), **write_options())
    assert lines(storage) == ["m.parquet: differs from the shards: column 'label' of shard 1, sample 000001-000002"]


def test_the_manifest_of_a_larger_dataset_is_named(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path / "set")
    storage.write("m.parquet", make_dataset(tmp_path / "larger", rows=9).read("m.parquet"))
    assert "m.parquet: shard 0 is another tar" in lines(storage)


def test_a_manifest_with_rows_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    for record in done_records(storage).values():
        storage.delete(done_name(record.shard))
    table = pq.read_table(storage.path("m.parquet"))
    column = table.schema.get_field_index("lca")
    mixes = [[None], *table["lca"].to_pylist()[1:]]
    changed = table.set_column(column, SCHEMA.field("lca"), pa.array(mixes, SCHEMA.field("lca").type))
    pq.write_table(changed, storage.path("m.parquet"), **write_options())
    assert "m.parquet: column 'lca' has a list that holds null" in lines(storage)


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset here"):
        verify(tmp_path)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_dataset(tmp_path_factory.mktemp("victim"), shards=2, rows=3)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_noticed_or_harmless(victim: Storage, data: st.DataObject) -> None:
    """Tars, tables and done records are covered by sha256. In m.parquet only bytes that change no value may pass."""
    names = ["m.parquet", *(name for folder in ("shards", "done") for name in victim.list(folder))]
    name = data.draw(st.sampled_from(names))
    original = victim.read(name)
    before, records = Manifest.open(victim.url), done_records(victim)
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    victim.write(name, bytes(changed))
    try:
        if verify(victim.url):
            return
        if name.startswith("done/"):
            assert done_records(victim) == records  # white space
            return
        assert name == "m.parquet"
        after = Manifest.open(victim.url)
        assert after.info == before.info
        assert after.where(include_rejected=True).to_table() == before.where(include_rejected=True).to_table()
    finally:
        victim.write(name, original)
