"""Builds ``m.parquet`` from the tables of finished shards. Called at the end of ``factory run synth`` and by rebuild.

Rows stream through in shard order and are cut into row groups of a fixed number of rows, so the file depends on the
rows alone: not on workers, attempts or the order in which shards finished.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.card import write_card
from manifests.dataset import MANIFEST, DatasetInfo
from manifests.errors import DataError
from manifests.local import temporary_name
from manifests.schema import SCHEMA, parquet_errors, read_table, write_options
from manifests.shard import DoneRecord, done_records
from manifests.storage import Storage, writing

ROW_GROUP, ROW_GROUP_BYTES = 1 << 17, 128 << 20
_AHEAD = 4


def merge(storage: Storage, info: DatasetInfo, shards: Iterable[int] | None = None) -> DatasetInfo:
    """Write ``m.parquet`` from ``shards`` (default: all finished ones), and what other tools read beside it
    (:mod:`manifests.card`); returns ``info`` with its tars filled in.

    Every table is checked against its done record, every tar for its size. Raises :class:`DataError` for a shard that
    is not done, was made by another plan, or whose files are missing or altered; the previous manifest then stays.
    """
    records = _chosen(storage, info.fingerprint, shards)
    full = info.with_tars(tuple(record.tar_info() for record in records))
    write_manifest(storage, MANIFEST, full, _tables(storage, records))
    write_card(storage, full, sum(record.kept for record in records))
    return full


def write_manifest(storage: Storage, name: str, info: DatasetInfo, tables: Iterable[pa.Table]) -> None:
    """Write the rows of ``tables``, in that order, as the manifest ``name``: whole or not at all, in bounded memory."""
    path = storage.scratch() / temporary_name("merge", ".parquet")
    schema = SCHEMA.with_metadata(info.to_metadata())
    try:
        with writing(path), pq.ParquetWriter(path, schema, **write_options()) as writer:
            filled = (table for table in tables if table.num_rows)
            first = next(filled, None)
            for group in _row_groups(chain([first], filled), _group_rows(first)) if first is not None else ():
                writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=group.num_rows)
        storage.put_file(path, name)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _chosen(storage: Storage, fingerprint: str, shards: Iterable[int] | None) -> list[DoneRecord]:
    done = done_records(storage)
    wanted = sorted(done if shards is None else set(shards))
    missing = [shard for shard in wanted if shard not in done]
    if missing:
        raise DataError(f"{storage.url}: shard {missing[0]} is not done ({len(missing)} of {len(wanted)} missing)")
    records = [done[shard] for shard in wanted]
    if not records:
        raise DataError(f"{storage.url}: no finished shard to merge")
    sizes = storage.sizes("shards")
    for record in records:
        if record.fingerprint != fingerprint:
            theirs, ours = record.fingerprint[:12], fingerprint[:12]
            raise DataError(f"{storage.url}: shard {record.shard} was made by plan {theirs}, this one is {ours}")
        if sizes.get(record.tar) != record.tar_bytes:
            found = f"has {sizes[record.tar]} bytes" if record.tar in sizes else "is missing"
            raise DataError(f"{storage.path(record.tar)}: {found}, expected {record.tar_bytes} (shard {record.shard})")
    return records


def load_shard_table(storage: Storage, record: DoneRecord) -> pa.Table:
    """A shard's rows, checked against its done record."""
    where = storage.path(record.table)
    data = storage.read(record.table, most=None)
    if hashlib.sha256(data).hexdigest() != record.table_sha256:
        raise DataError(f"{where}: altered (checksum differs from the done record of shard {record.shard})")
    table = read_table(data, where)
    shards = pc.unique(table["shard"]).to_pylist()
    if table.num_rows != record.rows or shards not in ([record.shard], []):
        raise DataError(f"{where}: does not hold the {record.rows} rows of shard {record.shard}")
    if (pc.sum(table["kept"]).as_py() or 0) != record.kept:
        raise DataError(f"{where}: does not keep the {record.kept} images that the done record of its shard counts")
    return table


def _tables(storage: Storage, records: list[DoneRecord]) -> Iterator[pa.Table]:
    """Tables in order, a few read ahead."""
    pending: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for record in records:
                pending.append(pool.submit(load_shard_table, storage, record))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _group_rows(first: pa.Table) -> int:
    """Rows of a row group: fewer where each carries thousands of logits, so that a group stays small in memory."""
    logits = first["logits"][0].as_py() or []
    return max(1, min(ROW_GROUP, ROW_GROUP_BYTES // (512 + 2 * len(logits))))


def _row_groups(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in pieces of exactly ``rows`` rows, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(held)
            yield _piece(joined.slice(0, rows))
            rest = joined.slice(rows)
            held, count = ([rest] if rest.num_rows else []), rest.num_rows
    if count:
        yield _piece(pa.concat_tables(held))


def _piece(table: pa.Table) -> pa.Table:
    with parquet_errors("merging"):
        return table.combine_chunks()
