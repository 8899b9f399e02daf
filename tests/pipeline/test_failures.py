"""Quarantine records: written, listed, read back, released, and named when damaged."""

import pytest

from manifests.errors import DataError
from manifests.shard import committed
from manifests.storage import Storage
from pipeline.events import Failure, failures, quarantine, quarantined, release


def test_round_trip_and_release(tmp_path):
    storage = Storage(tmp_path)
    assert failures(storage) == {}
    bad = Failure(12, 3, "ValueError: <b>\x1b[31m", "w0@host:1", "Traceback …")
    quarantine(storage, bad)
    quarantine(storage, Failure(3, 1, "old"))
    quarantine(storage, Failure(3, 2, "new"))
    assert failures(storage) == {3: Failure(3, 2, "new"), 12: bad}
    assert quarantined(storage) == {3, 12}
    release(storage, [12, 99])
    assert quarantined(storage) == {3}


@pytest.mark.parametrize("name", ["²", "1", "0000001234567", "٠٠٠٠٠١", "-00001", "000001.5", "x"])
def test_other_files_there_are_none(tmp_path, name):
    storage = Storage(tmp_path)
    for folder in ("failed", "done"):
        storage.write(f"{folder}/{name}.json", b"{}")
    assert quarantined(storage) == committed(storage) == set(failures(storage)) == set()


@pytest.mark.parametrize(
    "data",
    [b'{"shard": 1', b'{"shard": "x", "attempts": 1, "error": "e"}', b"[" * 10**5, b"null"]
    + [b'{"shard": %s, "attempts": 1, "error": "e"}' % shard for shard in (b"2", b"[1]", b"-1", b"1e400")],
)
def test_damaged_record_is_named(tmp_path, data):
    storage = Storage(tmp_path)
    storage.write("failed/000001.json", data)
    with pytest.raises(DataError, match=r"failed/000001.json: no quarantine record .*delete it"):
        failures(storage)
