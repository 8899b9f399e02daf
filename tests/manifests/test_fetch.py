"""Many ranges at once, from stores that behave and from stores that do not."""

import threading
import time
from concurrent.futures import Future

import pytest

from manifests import fetch as fetch_module
from manifests.errors import DataError, StalledError, StoreError
from manifests.fetch import AT_ONCE, Range, fetch, parts
from manifests.storage import Patience, Storage
from tests.manifests.flaky_proxy import FlakyProxy, every

DATA = bytes(range(256)) * 40
RANGES = [Range("a", start, 37) for start in range(0, 10_000, 100)]


def ranges_of(storage: Storage, ranges: list[Range] = RANGES, **patience: float) -> list[bytes | DataError]:
    found = dict(fetch(storage, ranges, Patience(**patience)))  # type: ignore[arg-type]
    assert sorted(found) == [*range(len(ranges))]
    return [found[number] for number in range(len(ranges))]


def test_every_range_arrives(any_storage: Storage) -> None:
    any_storage.write("a", DATA)
    assert ranges_of(any_storage) == [DATA[start : start + 37] for _, start, _ in RANGES]
    assert b"".join(each for each in ranges_of(any_storage, parts("a", len(DATA))) if isinstance(each, bytes)) == DATA


def test_what_is_missing_or_short_is_said_and_the_rest_arrives(any_storage: Storage) -> None:
    any_storage.write("a", DATA)
    bad = [Range("b", 0, 5), Range("a", len(DATA) - 3, 5), Range("a", len(DATA) + 5, 5)]
    *good, missing, short, behind = ranges_of(any_storage, [*RANGES, *bad])
    assert good == [DATA[start : start + 37] for _, start, _ in RANGES]
    assert "b: no such file" in str(missing)
    assert all(isinstance(each, DataError) and "cut short" in str(each) for each in (short, behind))


def test_bad_connections_lose_nothing(s3_url: str, flaky_s3: FlakyProxy) -> None:
    storage = Storage(s3_url)
    storage.write("a", DATA)
    flaky_s3.plan = every(3, "busy", "drop", "short", "slow", "lost")
    assert ranges_of(storage) == [DATA[start : start + 37] for _, start, _ in RANGES]
    assert len({fault for fault, _, _ in flaky_s3.happened}) == 5


def test_a_silent_store_is_named_and_then_ends_the_run(s3_url: str, flaky_s3: FlakyProxy) -> None:
    storage = Storage(s3_url)
    storage.write("a", DATA)
    flaky_s3.plan = lambda number, method, path: "drop"
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(
        StalledError, match=r"a, 37 bytes from 0 and [0-9]+ more requests: nothing has arrived for"
    ) as caught:
        [*fetch(storage, RANGES, Patience(2.0, lines.append, 0.5))]
    assert caught.value.exit_code == 3 and time.monotonic() - started < 10
    assert len(lines) == 1 and "waiting for s3://" in lines[0]


class Fake:
    """A remote store of one file whose answers come when the test says."""

    is_local = False

    def __init__(self, hangs: int = 0, error: Exception | None = None) -> None:
        self.hangs, self.error, self.most, self.under_way = hangs, error, 0, 0
        self.lock = threading.Lock()

    def path(self, name: str) -> str:
        return f"fake://{name}"

    def start_range(self, name: str, offset: int, size: int) -> "Future[bytes]":
        future: Future[bytes] = Future()
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.hangs -= 1
            if self.hangs >= 0:
                return future

        def answer() -> None:
            with self.lock:
                self.under_way -= 1
            if not future.set_running_or_notify_cancel():
                return
            if self.error:
                future.set_exception(self.error)
            else:
                future.set_result(DATA[offset : offset + size])

        threading.Timer(0.02, answer).start()
        return future


def test_requests_are_under_way_together_but_not_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Fake()
    assert len(ranges_of(store)) == 100  # type: ignore[arg-type]
    assert 32 <= store.most <= AT_ONCE
    monkeypatch.setattr(fetch_module, "BYTES_AT_ONCE", 10 * 37)
    store = Fake()
    ranges_of(store)  # type: ignore[arg-type]
    assert store.most == 10


def test_a_single_hung_connection_is_replaced() -> None:
    assert len(ranges_of(Fake(hangs=3), stall_seconds=0.9)) == 100  # type: ignore[arg-type]


class Narrow(Fake):
    """Brings nothing while more than four requests are under way."""

    def start_range(self, name: str, offset: int, size: int) -> "Future[bytes]":
        future: Future[bytes] = Future()
        future.add_done_callback(lambda _: setattr(self, "under_way", self.under_way - 1))
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def answer() -> None:
            if self.under_way <= 4 and future.set_running_or_notify_cancel():
                future.set_result(DATA[offset : offset + size])

        threading.Timer(0.02, answer).start()
        return future


def test_a_narrow_connection_is_asked_for_less_at_once() -> None:
    store = Narrow()
    assert len(ranges_of(store, stall_seconds=3)) == 100  # type: ignore[arg-type]
    assert store.most == AT_ONCE


def test_a_refusal_is_not_repeated() -> None:
    store = Fake(error=PermissionError("Access Denied"))
    with pytest.raises(StoreError, match="a: cannot read: Access Denied"):
        ranges_of(store)  # type: ignore[arg-type]
    assert store.most <= AT_ONCE
