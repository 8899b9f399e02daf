import errno
import os
import pickle
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import MagicMock, Mock

import pytest

from manifests.errors import DataError, FactoryError, StoreError, UsageError
from manifests.storage import Storage, split


def test_round_trip_on_every_store(any_storage: Storage) -> None:
    storage = any_storage
    assert storage.list("shards") == []
    assert storage.size("a.json") is None
    storage.write("shards/b.tar", b"0123456789")
    storage.write("shards/a.tar", b"old")
    storage.write("shards/a.tar", b"new!")
    storage.write("top.json", b"{}")
    assert storage.sizes("shards") == {"shards/a.tar": 4, "shards/b.tar": 10}
    assert storage.list("") == ["top.json"]
    assert storage.read("shards/a.tar") == b"new!"
    assert storage.read_range("shards/b.tar", 3, 4) == b"3456"
    assert [*storage.read_many(["shards/b.tar", "top.json"])] == [b"0123456789", b"{}"]
    with storage.open("shards/b.tar") as file:
        assert file.read(2) == b"01"
        file.seek(-2, 2)
        assert file.read() == b"89"
    storage.delete("top.json")
    storage.delete("top.json")
    assert not storage.exists("top.json")


def test_create_keeps_the_first_on_every_store(any_storage: Storage) -> None:
    assert any_storage.create("done/0.json", b"first")
    assert not any_storage.create("done/0.json", b"second")
    assert any_storage.read("done/0.json") == b"first"


def test_put_file_moves_a_finished_file_on_every_store(any_storage: Storage, tmp_path: Path) -> None:
    for content in (b"one", b"two and more"):
        local = any_storage.scratch() / "finished"
        local.write_bytes(content)
        any_storage.put_file(local, "shards/x.tar")
        assert any_storage.read("shards/x.tar") == content
        assert not local.exists()


def test_missing_and_short_files_are_data_errors_that_name_them(any_storage: Storage) -> None:
    any_storage.write("short.tar", b"123")
    for call in (any_storage.read, any_storage.open):
        with pytest.raises(DataError, match=r"nowhere\.tar: no such file"):
            call("nowhere.tar")
    with pytest.raises(DataError, match=r"short\.tar: ends inside"):
        any_storage.read_range("short.tar", 1, 5)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\\b", "a\0b", "./a", "a\nb"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path)
    for call in (storage.read, storage.size, storage.delete, storage.open):
        with pytest.raises(DataError, match="unsafe file name"):
            call(name)
    with pytest.raises(DataError, match="unsafe file name"):
        storage.write(name, b"")


def test_only_one_of_many_racing_creators_wins(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(storage.create("lock", b"%d" % n)))  # type: ignore[misc]
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 1
    assert storage.list("tmp") == []


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", refuse)
    storage = Storage(tmp_path)
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second")
    assert storage.read("a") == b"first"
    assert storage.list("tmp") == []


def _failing(times: int, error: Exception, then: Callable[..., Any], before: bool = True) -> Callable[..., Any]:
    count = 0

    def call(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > times:
            return then(*args)
        if not before:
            then(*args)
        raise error

    return call


@pytest.mark.usefixtures("no_delays")
class TestRetries:
    def make(self, request: pytest.FixtureRequest) -> Storage:
        storage = Storage(f"memory://{request.node.name}/set")
        storage.write("a", b"content")
        return storage

    def test_a_store_that_recovers_is_not_noticed(self, request: pytest.FixtureRequest) -> None:
        storage = self.make(request)
        backend: Any = storage._backend
        for name, call in (("read", lambda: storage.read("a")), ("write", lambda: storage.write("a", b"content"))):
            setattr(backend, name, _failing(3, ConnectionError("reset"), getattr(backend, name)))
            call()
        assert storage.read("a") == b"content"

    def test_a_store_that_stays_down_is_one_clear_line(self, request: pytest.FixtureRequest) -> None:
        storage = self.make(request)
        backend: Any = storage._backend
        backend.read = _failing(99, ConnectionError("connection\nreset"), backend.read)
        with pytest.raises(FactoryError, match=r"set/a: cannot read: connection reset$") as caught:
            storage.read("a")
        assert caught.value.exit_code == 1

    def test_create_whose_reply_was_lost_still_counts_as_made(self, request: pytest.FixtureRequest) -> None:
        storage = self.make(request)
        backend: Any = storage._backend
        backend.create = _failing(1, TimeoutError(), backend.create, before=False)
        assert storage.create("lock", b"mine")

    def test_create_that_lost_a_race_while_retrying_does_not(self, request: pytest.FixtureRequest) -> None:
        storage = self.make(request)
        backend: Any = storage._backend
        create = backend.create
        backend.create = _failing(1, TimeoutError(), lambda path, data: create(path, b"theirs"), before=False)
        assert not storage.create("lock", b"mine")


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (storage.write, storage.create):
        with pytest.raises(FactoryError, match="cannot write: No space left on device"):
            write("a" if write == storage.write else "b", b"new")
    assert storage.read("a") == b"old"
    assert not storage.exists("b")
    assert storage.list("tmp") == []


def test_a_file_deleted_during_a_listing_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    for name in ("a", "b"):
        storage.write(f"done/{name}", b"12")
    gone = Mock(is_file=lambda **_: True, stat=Mock(side_effect=FileNotFoundError))
    entries = [gone, *os.scandir(tmp_path / "done")]
    monkeypatch.setattr("os.scandir", lambda _: MagicMock(__enter__=lambda _: iter(entries)))
    assert storage.sizes("done") == {"done/a": 2, "done/b": 2}


def replace_within_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every folder were a file system of its own."""
    replace = os.replace

    def refusing(source: str, target: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        places = ((source, src_dir_fd), (target, dst_dir_fd))
        if len({os.stat(os.path.dirname(name) or ".", dir_fd=folder).st_ino for name, folder in places}) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr("os.replace", refusing)


def test_put_file_onto_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    replace_within_a_folder(monkeypatch)
    local = storage.scratch() / "finished"
    for content in (b"one", b"two and more"):
        local.write_bytes(content)
        storage.put_file(local, "shards/x.tar")
        assert storage.read("shards/x.tar") == content
    local.write_bytes(b"three")

    def full(source: BinaryIO, target: BinaryIO, length: int) -> None:
        target.write(b"th")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(StoreError, match="cannot write: No space left on device"):
        storage.put_file(local, "shards/x.tar")
    assert storage.list("shards") == ["shards/x.tar"] and storage.list("tmp") == ["tmp/finished"]


def test_storages_can_be_pickled(any_storage: Storage) -> None:
    any_storage.write("a", b"1")
    assert pickle.loads(pickle.dumps(any_storage)).read("a") == b"1"


def test_urls() -> None:
    assert Storage("file:///tmp/x").url == "/tmp/x"
    assert Storage("/tmp/x/").is_local
    assert Storage("memory://a/b/").url == "memory://a/b"
    storage, name = split("memory://a/b/m.parquet")
    assert (storage.url, name) == ("memory://a/b", "m.parquet")
    assert split("m.parquet")[0].url == str(Path.cwd())
    assert split("/m.parquet")[0].url == "/"
    for bad in ("nosuchscheme://x/y", ""):
        with pytest.raises(UsageError):
            Storage(bad)
    with pytest.raises(UsageError, match="expected the path of a file"):
        split("s3://bucket")


def test_a_store_that_is_down_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is tried four times; the next ones once each, until the store answers again."""
    storage, slept, up = Storage(f"memory://{uuid.uuid4().hex}"), [], False

    def size(path: str) -> int | None:
        if not up:
            raise ConnectionResetError("connection reset by peer")
        return None

    monkeypatch.setattr("manifests.storage.time.sleep", slept.append)
    monkeypatch.setattr(storage._backend, "size", size)
    for waited in (3, 3, 3):
        with pytest.raises(StoreError, match="x: cannot look up: connection reset by peer"):
            storage.size("x")
        assert len(slept) == waited
    up = True
    assert storage.size("x") is None
    up = False
    with pytest.raises(StoreError):
        storage.size("x")
    assert len(slept) == 6 and slept[0] < slept[1] < slept[2]  # backoff


def test_records_are_bounded_before_they_are_read(any_storage, monkeypatch):
    any_storage.write("a", b"x" * 100)
    assert any_storage.read("a", most=100) == b"x" * 100
    with pytest.raises(DataError, match="has more than 99 bytes"):
        any_storage.read("a", most=99)


def test_lines_of_any_length_are_read_in_parts(any_storage):
    any_storage.write("a", b"one\n" + b"x" * 50 + b"\ntwo\n\n" + b"y" * 20)
    assert [*any_storage.lines("a", most=20)] == [b"one\n", b"two\n", b"\n"]
    assert [*any_storage.lines("a", 55, most=21)] == [b"two\n", b"\n", b"y" * 20]
    assert [*any_storage.lines("a", 55, 58)] == [b"two"]


@pytest.mark.timeout(20)
def test_a_terabyte_of_zeros_is_no_log(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.write(b"one\n")
        file.truncate(1 << 40)
    lines = Storage(tmp_path).lines("a")
    assert next(lines) == b"one\n"
    with pytest.raises(DataError, match="has a line of more than 67108864 bytes"):
        next(lines)


URLS = ["", "file://", "file://host/x", "http://[", "s3://", "s3:///", "no-such://x", "a\udcff", "memory::", "::"]


@pytest.mark.parametrize("url", URLS)
def test_impossible_urls_are_one_line(url):
    with pytest.raises(FactoryError) as caught:
        Storage(url).list("")
    assert len(str(caught.value).splitlines()) == 1
