"""Files of a version that did not know the newest columns are read, merged and verified; those columns are null."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from manifests.errors import DataError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.schema import ADDED, SCHEMA, write_options
from manifests.shard import done_name, done_records, make_record, publish, write_shard_table
from manifests.storage import Storage
from manifests.verify import verify
from tests.manifests.samples import FINGERPRINT, INFO, make_row, write_shard


def age(storage: Storage, shard: int) -> None:
    """Write a shard's table again as an earlier version did."""
    record = done_records(storage)[shard]
    table = pq.read_table(storage.path(record.table)).drop_columns(sorted(ADDED))
    path = storage.scratch() / "old.parquet"
    write_shard_table(table, path, shard, FINGERPRINT)
    old = make_record(shard, record.tar_sha256, record.tar_bytes, path, table.to_pylist(), FINGERPRINT)
    publish(storage, path, old.table)
    storage.write(done_name(shard), old.to_json())
    storage.delete(record.table)


def test_old_and_new_shards_make_one_manifest(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for shard in range(2):
        write_shard(storage, shard)
    age(storage, 0)
    merge(storage, INFO)
    assert pq.read_schema(storage.path("m.parquet")).equals(SCHEMA)
    assert verify(tmp_path) == []
    row = Manifest.open(tmp_path).row(1)
    assert row["logits"][1] == make_row(0, 1)["logits"][1] and [row[name] for name in ADDED] == [None]


def test_an_old_manifest_is_read(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_shard(storage, 0)
    age(storage, 0)
    merge(storage, INFO)
    whole = pq.read_table(storage.path("m.parquet"))
    pq.write_table(whole.drop_columns(sorted(ADDED)), storage.path("m.parquet"), **write_options())
    assert verify(tmp_path) == []
    manifest = Manifest.open(tmp_path)
    assert list(manifest.row(0)) == SCHEMA.names
    everything = manifest.select(kept=False)
    assert list(everything.column("label")) == [make_row(0, i)["label"] for i in range(6)]
    assert all(value != value or value is None for value in everything.column("skipped_updates"))
    with pytest.raises(DataError, match="none of its"):
        manifest.select("skipped_updates > 0", kept=False)


def test_other_columns_may_not_be_missing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_shard(storage, 0)
    merge(storage, INFO)
    whole = pq.read_table(storage.path("m.parquet"))
    pq.write_table(whole.drop_columns(["logits", *ADDED]), storage.path("m.parquet"))
    with pytest.raises(DataError, match="column 31 is missing, expected 'logits'"):
        Manifest.open(tmp_path)
