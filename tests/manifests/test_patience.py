"""Waiting for a store has an end, and says what it waits for; what cannot be a folder is refused at once."""

import socket
import threading
import time

import pytest

from manifests import storage as module
from manifests.errors import DataError, StalledError, UsageError
from manifests.manifest_file import ManifestFile
from manifests.storage import Storage, split


@pytest.fixture
def silent(monkeypatch):
    """The port of a server that takes every connection and never answers; waits are short, their lines returned too."""
    lines = []
    for name, value in {"stall_seconds": 1.5, "warn_seconds": 0.3, "on_wait": lines.append}.items():
        monkeypatch.setattr(module.PATIENCE, name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1], lines
    for connection, _ in kept:
        connection.close()


def test_a_silent_http_server_ends_the_wait_in_one_line(silent):
    port, lines = silent
    url = f"http://127.0.0.1:{port}/set"
    started = time.monotonic()
    with pytest.raises(
        StalledError, match=rf"{url}/m.parquet: no answer for [12] s; .* FACTORY_STALL_SECONDS"
    ) as caught:
        ManifestFile(Storage(url), "m.parquet")
    assert caught.value.exit_code == 3
    assert 1.4 < time.monotonic() - started < 20  # not 60; a busy machine answers late itself
    assert lines == [f"waiting for {url}/m.parquet: no answer for 0 s; this goes on for 1 s more"]


def test_a_silent_object_store_is_waited_for_once(silent, s3_url, monkeypatch):
    from s3fs import S3FileSystem

    port, lines = silent
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(module, "DOWN_SECONDS", 0.2)
    S3FileSystem.clear_instance_cache()
    storage = Storage(s3_url)
    started = time.monotonic()
    for call in (
        lambda: storage.create("lease/000001.json", b"x"),
        lambda: storage.read("plan.json"),
        lambda: storage.write("x", b"x"),
        lambda: storage.list("done"),
    ):
        with pytest.raises(StalledError, match="no answer for"):
            call()
    assert time.monotonic() - started < 5
    assert len(lines) == 1
    S3FileSystem.clear_instance_cache()


def test_an_upload_may_take_as_long_as_its_size_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(module.PATIENCE, "stall_seconds", 0.2)
    monkeypatch.setattr(module, "SLOWEST", 1000)
    storage = Storage("memory://slow")
    write = storage._backend.write
    monkeypatch.setattr(storage._backend, "write", lambda *args: time.sleep(0.5) or write(*args))
    storage.write("large", b"x" * 1000)
    assert storage.read("large") == b"x" * 1000
    with pytest.raises(StalledError):
        storage.write("small", b"x")


def test_a_missing_bucket_is_said_as_such(s3_url):
    missing = Storage("s3://there-is-no-such-bucket/run")
    for call in (
        lambda: missing.read("plan.json"),
        lambda: missing.open("m.parquet"),
        lambda: missing.write("x", b"x"),
        lambda: missing.create("x", b"x"),
    ):
        with pytest.raises(DataError, match="there is no bucket 'there-is-no-such-bucket'") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"plan\.json: no such file$"):
        Storage(s3_url).read("plan.json")


@pytest.mark.parametrize(
    "url", ["", " ", "s3://", "s3:///", "gs://", "file://", "http://", "memory://", "a\udcff", "a\0b"]
)
def test_what_cannot_be_a_folder_is_refused_at_once(url):
    for refused in (lambda: Storage(url), lambda: split(f"{url}\udcff/m.parquet")):
        with pytest.raises(UsageError) as caught:
            refused()
        str(caught.value).encode()
        assert "\n" not in str(caught.value)
