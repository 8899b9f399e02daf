from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import merge as merge_module
from manifests.errors import DataError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.schema import SCHEMA
from manifests.shard import DoneRecord, done_records
from manifests.storage import Storage
from tests.manifests.samples import INFO, flip, make_dataset, write_shard


def rows_of(storage: Storage) -> pa.Table:
    return pq.read_table(storage.path("m.parquet")).replace_schema_metadata(None)


def test_the_manifest_holds_the_rows_of_its_shards_in_order(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    tables = [pq.read_table(storage.path(name)) for name in storage.list("shards") if name.endswith("parquet")]
    expected = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    assert rows_of(storage).equals(expected)
    assert pq.read_schema(storage.path("m.parquet")).equals(SCHEMA)
    assert storage.list("tmp") == []


def test_bytes_do_not_depend_on_the_order_in_which_shards_finished(tmp_path: Path) -> None:
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        storage = Storage(tmp_path / name)
        for shard in order:
            write_shard(storage, shard)
        merge(storage, INFO)
    assert (tmp_path / "a/m.parquet").read_bytes() == (tmp_path / "b/m.parquet").read_bytes()


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), size=st.integers(1, 8))
def test_row_groups_are_cut_alike_however_rows_arrive(counts: list[int], size: int) -> None:
    starts = [sum(counts[:index]) for index in range(len(counts))]
    tables = [pa.table({"n": pa.array(range(a, a + n), pa.int64())}) for a, n in zip(starts, counts, strict=True)]
    groups = [*merge_module._row_groups(tables, size)]
    total = sum(counts)
    assert [number for group in groups for number in group["n"].to_pylist()] == [*range(total)]
    assert [group.num_rows for group in groups] == [size] * (total // size) + ([total % size] if total % size else [])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_dataset(tmp_path_factory.mktemp("many"), shards=6, rows=3)


@settings(max_examples=12, deadline=None)
@given(cut=st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_merging_is_associative(many: Storage, cut: set[int]) -> None:
    parts = []
    for shards in (cut, {*range(6)} - cut, {*range(6)}):
        merge(many, INFO, shards)
        parts.append(rows_of(many))
    joined = pa.concat_tables(parts[:2]).sort_by("key")
    assert joined.equals(parts[2])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_last_merge_counts_however_shards_were_added(many: Storage, data: st.DataObject) -> None:
    """(a + b) + c = a + (b + c), byte for byte."""
    order = data.draw(st.permutations(range(6)))
    stops = [*data.draw(st.sets(st.integers(1, 5))), 6]
    for stop in sorted(stops):
        merge(many, INFO, order[:stop])
    grown = many.read("m.parquet")
    merge(many, INFO)
    assert many.read("m.parquet") == grown


def test_growing_only_adds(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, shards=2)
    before = rows_of(storage)
    write_shard(storage, 5)
    info = merge(storage, INFO)
    assert [tar.shard for tar in info.tars] == [0, 1, 5]
    assert rows_of(storage).slice(0, before.num_rows).equals(before)
    assert Manifest.open(tmp_path).info == info


def test_broken_parts_are_named_and_the_old_manifest_stays(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    old = storage.read("m.parquet")
    record = done_records(storage)[1]
    tar, table = record.tar, record.table

    def refused(reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            merge(storage, INFO)
        assert storage.read("m.parquet") == old
        assert storage.list("tmp") == []

    whole = storage.read(table)
    flip(storage, table, len(whole) // 2)
    refused(f"{table}: altered .* shard 1")
    storage.delete(table)
    refused(f"{table}: no such file")
    storage.write(table, whole)
    storage.write(tar, storage.read(tar)[:-512])
    refused(f"{tar}: has .* bytes, expected .*shard 1")
    storage.delete(tar)
    refused(f"{tar}: is missing, .*shard 1")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished shard"):
        merge(Storage(tmp_path / "empty"), INFO)
    storage = make_dataset(tmp_path / "set", shards=2)
    with pytest.raises(DataError, match=r"shard 7 is not done \(1 of 2 missing\)"):
        merge(storage, INFO, [1, 7])
    write_shard(storage, 2, fingerprint="e" * 64)
    with pytest.raises(DataError, match="shard 2 was made by plan eeeeeeeeeeee, this one is abababababab"):
        merge(storage, INFO)


def test_only_a_few_tables_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = make_dataset(tmp_path, shards=20, rows=2)
    loaded: list[int] = []
    load = merge_module.load_shard_table

    def counted(storage: Storage, record: DoneRecord) -> pa.Table:
        loaded.append(record.shard)
        return load(storage, record)

    monkeypatch.setattr(merge_module, "load_shard_table", counted)
    tables = merge_module._tables(storage, [*done_records(storage).values()])
    next(tables)
    assert len(loaded) <= merge_module._AHEAD + 1
    tables.close()  # type: ignore[attr-defined]


def test_many_logits_make_smaller_row_groups() -> None:
    def table(logits: int) -> pa.Table:
        return pa.table({"logits": pa.array([[0.0] * logits], pa.list_(pa.float16()))})

    assert merge_module._group_rows(table(10)) == 1 << 17
    assert merge_module._group_rows(table(21_841)) == (128 << 20) // (512 + 2 * 21_841)


def test_shards_without_rows_are_merged_and_select_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_shard(storage, 0, rows=0)
    merge(storage, INFO)
    with pytest.raises(DataError, match="none of its 0 rows"):
        Manifest.open(tmp_path).where()
    write_shard(storage, 1, rows=2)
    merge(storage, INFO)
    assert len(Manifest.open(tmp_path)) == 2
