"""One driver per folder: refusal, release, take-over from the dead on this machine and on others, rivals."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace

import pytest

from manifests.errors import DataError, FactoryError, GoneError
from manifests.storage import Storage
from pipeline.lease import Holder, Lease, _held, current, live


@pytest.fixture(params=["local", "object store"])
def storage(request, tmp_path):
    return Storage(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def held_by(storage: Storage, number: int = 1, **changes: object) -> Holder:
    """Plant a lease as another driver would have left it."""
    now = time.time()
    holder = Holder("gpu7", 4321, "gpu7 another-boot", "123", "token", since=now - 500, beat_at=now)
    holder = replace(holder, **changes)
    storage.write(f"lease/{number:06d}.json", holder.dump())
    return holder


def test_held_then_released(storage):
    with Lease(storage) as lease:
        lease.check()
        assert not lease.after_crash
        holder = live(storage)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert live(storage) is None
    with Lease(storage) as again:
        assert not again.after_crash
    number, last = current(storage)
    assert (number, last.released) == (2, True)
    assert storage.list("lease") == ["lease/000002.json"]


def test_whoever_reads_a_new_lease_at_once_finds_it_alive(storage, monkeypatch):
    create, seen = storage.create, []

    def look(name: str, data: bytes) -> bool:
        made = create(name, data)
        seen.append(live(storage))
        return made

    monkeypatch.setattr(storage, "create", look)
    with Lease(storage):
        assert seen == [current(storage)[1]]
    refused = Lease(storage)
    monkeypatch.setattr(storage, "create", lambda *_: False)
    with pytest.raises(FactoryError, match="in use"):
        refused.__enter__()
    assert refused._me.token not in _held


def test_second_driver_of_this_process_is_refused(storage):
    with Lease(storage), pytest.raises(FactoryError, match=f"in use by another driver .* pid {os.getpid()}, since 20"):
        Lease(storage).__enter__()


@pytest.mark.parametrize("ahead", [-3600, 0, 1e9])
def test_live_driver_elsewhere_is_refused_whatever_its_clock_says(storage, ahead):
    """Its beats look old or of the future by our clock, but they keep coming."""
    holder = held_by(storage, beat_at=time.time() + ahead)

    def beat(line: str) -> None:
        assert "waiting 2 s for a sign of life" in line
        storage.write("lease/000001.json", replace(holder, beat=1).dump())

    started = time.monotonic()
    with pytest.raises(FactoryError, match="in use by another driver .*gpu7, pid 4321, since ") as caught:
        Lease(storage, beat_every=1, on_line=beat).__enter__()
    assert caught.value.exit_code == 1
    assert time.monotonic() - started < 1.5  # at its first sign of life
    assert (live(storage) is not None) == (ahead == 0)


@pytest.mark.parametrize("ahead", [-61, 0, 61, 1e11])
def test_silent_driver_elsewhere_is_taken_over_with_an_event_and_a_line(storage, ahead):
    held_by(storage, beat_at=time.time() + ahead)
    assert (live(storage) is None) == bool(ahead)
    events, lines = [], []
    started = time.monotonic()
    with Lease(
        storage, lambda kind, **fields: events.append((kind, fields)), beat_every=0.1, on_line=lines.append
    ) as lease:
        assert time.monotonic() - started >= 0.2  # it watched for two beats
        assert lease.after_crash
    [(kind, fields)] = events
    assert kind == "warning"
    assert "taking over" in fields["message"]
    assert "gpu7, pid 4321" in fields["message"]
    assert lines[-1] == fields["message"]


def test_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    code = (
        "import os, sys; from manifests.storage import Storage; from pipeline.lease import Lease; "
        "Lease(Storage(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    storage = Storage(tmp_path / "run")
    assert not current(storage)[1].released
    assert live(storage) is None
    started = time.monotonic()
    with Lease(storage) as lease:
        assert lease.after_crash
    assert time.monotonic() - started < 5


def test_reused_pid_is_not_the_holder(storage):
    with Lease(storage):
        ours = current(storage)[1]
    held_by(storage, 9, machine=ours.machine, pid=os.getppid(), started="1")  # init has that pid, not the driver
    assert live(storage) is None
    held_by(storage, 9, machine=ours.machine, pid=os.getpid(), started=ours.started)  # our pid, but not our token
    with Lease(storage) as lease:
        assert lease.after_crash


def test_one_of_many_rivals_takes_over(storage):
    held_by(storage, beat_at=0)
    won, refused = [], []
    barrier = threading.Barrier(8)

    def rival() -> None:
        lease = Lease(storage, beat_every=0.05)
        barrier.wait()
        try:
            lease.__enter__()
            won.append(lease)
        except FactoryError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=rival) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].check()
    won[0].__exit__()


def test_frozen_driver_learns_that_it_was_replaced_and_overwrites_nothing(storage):
    lease = Lease(storage, beat_every=0.05)
    lease.__enter__()
    rival = held_by(storage, 2)
    lease._thread.join(10)  # it ends by itself once it knows
    with pytest.raises(FactoryError, match=r"taken over by another driver \(gpu7, pid 4321"):
        lease.check()
    lease.__exit__()
    assert current(storage) == (2, rival)


def test_heartbeats_change_the_record(storage):
    with Lease(storage, beat_every=0.02):
        until = time.monotonic() + 10
        while current(storage)[1].beat < 3:
            assert time.monotonic() < until


@pytest.mark.parametrize("leave", ["nothing", "the folder", "another folder"])
def test_a_folder_that_is_gone_costs_the_lease_and_is_not_made_again(tmp_path, leave):
    storage, lost = Storage(tmp_path / "run"), threading.Event()
    with Lease(storage, beat_every=0.05) as lease:
        lease.on_lost = lost.set
        if leave == "the folder":
            storage.delete("lease/000001.json")
        else:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        if leave == "another folder":
            (tmp_path / "run").mkdir()
        assert lost.wait(5)
        with pytest.raises(FactoryError, match="while this command worked in it"):
            lease.check()
        if leave != "the folder":
            with pytest.raises(GoneError):
                storage.write("x", b"")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([] if leave == "the folder" else ["000001.json"])
    with Lease(Storage(tmp_path / "run")):
        pass


def test_store_that_fails_for_a_while_costs_nothing_then_the_lease(storage, monkeypatch):
    lease = Lease(storage, beat_every=0.02)
    lease.__enter__()
    failed = threading.Semaphore(0)

    def fail(*_: object) -> None:
        failed.release()
        raise FactoryError("store is down")

    monkeypatch.setattr(storage, "write", fail)
    for _ in range(3):
        assert failed.acquire(timeout=10)
    lease.check()
    lease._stale_after = 0.1
    lease._thread.join(10)  # it ends by itself once the lease is lost
    with pytest.raises(FactoryError, match=r"no heartbeat reached .* for 0.1 s: store is down"):
        lease.check()
    lease.__exit__()


WRONG = dict.fromkeys(("host", "machine", "started", "token"), "x") | {"pid": 1, "since": 0, "beat_at": "yesterday"}


RIGHT = WRONG | {"beat_at": 1}
IMPOSSIBLE = (
    {"since": 1e300},
    {"beat_at": -1},
    {"pid": 0},
    {"pid": -1},
    {"pid": 1.5},
    {"pid": 2**80},
    {"beat": 10**400},
)
IMPOSSIBLE += ({"host": None}, {"host": "\ud83d"}, {"machine": ["x"]}, {"released": 7})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"[" * 10**5, b'{"host": "x"}', json.dumps(WRONG).encode(), b"\xff", b'{"since": Infinity}']
    + [json.dumps(RIGHT | changes).encode() for changes in IMPOSSIBLE],
)
def test_unreadable_lease_is_named(storage, data):
    storage.write("lease/000001.json", data)
    with pytest.raises(DataError, match=r"lease/000001.json: no lease record .* delete it if no driver runs"):
        Lease(storage).__enter__()
