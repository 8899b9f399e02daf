"""A whole dataset's life in a real S3-compatible store on loopback, also one that keeps failing."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.backends import RemoteBackend
from manifests.errors import FactoryError, StoreError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import done_records
from manifests.storage import Storage
from tests.manifests.flaky_proxy import FlakyProxy, every
from tests.manifests.samples import INFO, all_files, make_dataset, make_image, write_shard


def test_a_remote_dataset_equals_a_local_one(s3_url: str, tmp_path: Path) -> None:
    remote, local = make_dataset(s3_url), make_dataset(tmp_path)
    assert all_files(remote) == all_files(local)
    assert done_records(remote) == done_records(local)
    manifest = Manifest.open(s3_url, verify=True)
    assert manifest.digest == Manifest.open(tmp_path).digest
    selection = manifest.where("label == 1")
    here = Manifest.open(tmp_path).where("label == 1")
    assert dict(selection.scan()) == dict(here.scan())
    assert selection.row(2) == here.row(2)


def test_create_is_decided_by_the_store(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3_url)
    assert storage.create("done/0.json", b"first")
    monkeypatch.setattr(RemoteBackend, "size", lambda *_: None)
    assert not storage.create("done/0.json", b"second")
    assert storage.read("done/0.json") == b"first"


METHODS = ("size", "read", "read_range", "read_many", "write", "create", "put_file", "sizes")


def flaky(monkeypatch: pytest.MonkeyPatch, every: int) -> list[str]:
    """Every ``every``-th request fails, half of them after the store has done its work."""
    failed: list[str] = []
    count = 0

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count % every:
                return method(*args)
            failed.append(name)
            if len(failed) % 2 and name not in ("put_file",):
                method(*args)
            raise ConnectionResetError("connection reset by peer")

        return call

    for name in METHODS:
        monkeypatch.setattr(RemoteBackend, name, wrap(name, getattr(RemoteBackend, name)))
    return failed


@pytest.mark.usefixtures("no_delays")
def test_a_store_that_fails_every_third_request_loses_nothing(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_files(make_dataset(tmp_path))
    failed = flaky(monkeypatch, 3)
    storage = make_dataset(s3_url)
    assert len(failed) > 10
    assert all_files(storage) == expected
    assert [*Manifest.open(s3_url).where(include_rejected=True).scan()][7] == (7, make_image(1, 1))


@pytest.mark.usefixtures("no_delays")
def test_a_store_that_goes_down_stops_clearly_and_the_run_resumes(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_files(make_dataset(tmp_path, shards=2))
    storage = Storage(s3_url)
    write_shard(storage, 0)
    with pytest.MonkeyPatch.context() as patch:
        flaky(patch, 1)
        with pytest.raises(FactoryError, match="connection reset by peer"):
            write_shard(storage, 1)
    assert [*done_records(storage)] == [0]
    write_shard(storage, 1)
    merge(storage, INFO)
    assert all_files(storage) == expected


def test_remote_temporary_files_go_with_their_storage(s3_url: str) -> None:
    storage = Storage(s3_url)
    scratch = storage.scratch()
    write_shard(storage, 0)
    assert [*scratch.iterdir()] == []
    del storage
    gc.collect()
    assert not scratch.exists()


@pytest.mark.usefixtures("no_delays")
def test_bad_connections_lose_nothing(s3_url: str, flaky_s3: FlakyProxy, tmp_path: Path) -> None:
    """Every third request is refused, dropped, cut in mid-upload, answered in half, late, or done without an answer."""
    expected = all_files(make_dataset(tmp_path))
    flaky_s3.plan = every(3, "busy", "drop", "cut", "short", "slow", "lost")
    storage = make_dataset(s3_url)
    assert all_files(storage) == expected
    assert len({fault for fault, _, _ in flaky_s3.happened}) == 6
    assert {"cut", "lost"} & {fault for fault, method, _ in flaky_s3.happened if method == "PUT"}


@pytest.mark.usefixtures("no_delays")
def test_uploads_that_break_off_every_time_leave_no_shard(
    s3_url: str, flaky_s3: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = Storage(s3_url)
    write_shard(storage, 0)
    flaky_s3.plan = lambda number, method, path: "cut" if method == "PUT" and ".tar" in path else ""
    with pytest.raises(StoreError, match=r"shards/000001-[0-9a-f]+\.tar: cannot write: "):
        write_shard(storage, 1)
    assert all("/000000-" in name for name in storage.sizes("shards"))
    assert [*done_records(storage)] == [0] and not [*storage.scratch().iterdir()]
    flaky_s3.plan = lambda number, method, path: ""
    write_shard(storage, 1)
    merge(storage, INFO)
    assert all_files(storage) == all_files(make_dataset(tmp_path, shards=2))
