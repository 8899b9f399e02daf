"""Drivers in processes of their own: Ctrl-C, SIGTERM and SIGKILL, and the same command again."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.executors.reaper import marked
from pipeline.lease import live

pytestmark = pytest.mark.timeout(180)
SHARDS = 8


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    from tests.pipeline.executors.conftest import Run

    run = Run(tmp_path_factory.mktemp("unbroken") / "run")
    run.execute(SHARDS)
    return run.files()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_running_shard(run, spawned, unbroken, number):
    driver = spawned(run.spawn(SHARDS, pause=0.3))
    driver.wait_for("shard_started", 2)
    driver.send(number)
    code, errors = driver.end()
    assert code == 130
    assert "stopping after the running shards; once more stops at once" in errors
    assert "of 8 shards done; the same command resumes" in errors
    assert "Traceback" not in errors
    assert len(run.events("shard_done")) == len(run.events("shard_started")) < SHARDS
    assert live(run.storage) is None
    assert run.execute(SHARDS).done == set(range(SHARDS))
    assert run.files() == unbroken


def test_second_signal_stops_at_once(run, spawned, unbroken):
    driver = spawned(run.spawn(SHARDS, {"2": "hang"}))
    driver.wait_for("shard_started", 3)
    driver.send(signal.SIGINT)
    driver.read_until("once more stops at once")  # two signals before the first is handled are one
    assert driver.process.poll() is None  # draining: it waits for the shard
    driver.send(signal.SIGINT)
    code, errors = driver.end(60)
    assert code == 130
    assert "2 of 8 shards done" in errors
    assert run.execute(SHARDS).done == set(range(SHARDS))
    assert run.files() == unbroken


def test_ctrl_c_in_a_terminal_drains_actors(run, spawned, cluster, unbroken):
    """A terminal sends SIGINT to the whole process group."""
    driver = spawned(run.spawn(SHARDS, pause=0.5, workers=2, address=cluster))
    driver.wait_for("shard_started", 2)
    driver.send(signal.SIGINT, group=True)
    code, errors = driver.end()
    assert code == 130, errors
    done = len(run.events("shard_done"))
    assert 2 <= done < SHARDS
    assert done == len(run.events("shard_started"))
    assert run.execute(SHARDS, workers=2).done == set(range(SHARDS))
    assert run.files() == unbroken


def test_second_signal_kills_actors(run, spawned, cluster):
    driver = spawned(run.spawn(SHARDS, {"0": "hang", "1": "hang"}, workers=2, address=cluster))
    driver.wait_for("shard_started", 2)
    driver.send(signal.SIGTERM)
    driver.read_until("once more stops at once")
    driver.send(signal.SIGTERM)
    code, errors = driver.end(60)
    assert code == 130, errors
    assert "0 of 8 shards done" in errors


def test_killed_driver_resumes_and_says_whose_lease_it_took(run, spawned, unbroken):
    """SIGKILL to a driver with a Ray of its own: nothing of it stays, the next one takes over at once."""
    driver = spawned(run.spawn(SHARDS, pause=0.3, workers=2))
    driver.wait_for("shard_done", 2)
    pids = descendants(driver.process.pid)
    assert {event["pid"] for event in run.events("shard_done")} < pids  # actors, and Ray's own processes
    driver.send(signal.SIGKILL)
    driver.process.wait()
    all_end(pids, within=10)

    second = spawned(run.spawn(SHARDS))
    code, errors = second.end()
    assert code == 0, errors
    assert [f"pid {driver.process.pid}" in event["message"] for event in run.events("warning")] == [True]
    assert run.files() == unbroken


def test_driver_killed_while_ray_starts(run, spawned):
    """Before Ray has answered, and whoever's children its processes are by now: nothing of it stays."""
    driver = spawned(run.spawn(SHARDS, workers=2))
    until = time.monotonic() + 60
    while not (started := [pid for pid in descendants(driver.process.pid) if b"gcs_server" in command(pid)]):
        assert time.monotonic() < until and driver.process.poll() is None
        time.sleep(0.02)
    reaper = next(pid for pid in descendants(driver.process.pid) if b"reaper.py" in command(pid))
    mark = command(reaper).split(b"\0")[-2].decode()
    assert {*started} <= marked(mark)
    driver.send(signal.SIGKILL)
    driver.process.wait()
    all_end({reaper}, within=10)
    assert not marked(mark)


def test_second_driver_is_refused_while_the_first_lives(run, spawned, unbroken):
    first = spawned(run.spawn(SHARDS, pause=0.2))
    first.wait_for("shard_started")
    code, errors = spawned(run.spawn(SHARDS)).end()
    assert code == 1
    assert "is in use by another driver (" in errors
    assert f"pid {first.process.pid}, since 20" in errors
    assert first.end()[0] == 0
    assert run.files() == unbroken


@pytest.mark.parametrize("step", ["checked", "table"])
def test_killed_driver_whose_worker_is_inside_the_commit(run, spawned, cluster, unbroken, step):
    """The driver dies while its actor is frozen at ``step``; the actor then wakes up without one."""
    mark = run.marks / "frozen"
    fault = {"FACTORY_FAULT": f"{step}:3:{mark}:stop"}
    driver = spawned(run.spawn(SHARDS, workers=2, address=cluster, environment=fault))
    until = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < until and driver.process.poll() is None
        time.sleep(0.02)
    worker = int(mark.read_text())
    driver.send(signal.SIGKILL)
    driver.process.wait()
    os.kill(worker, signal.SIGCONT)
    outcome = run.execute(SHARDS, workers=2)
    assert not outcome.interrupted, "this process got a SIGTERM or SIGINT, e.g. from `timeout`: no fault of the run"
    assert (outcome.failed, outcome.done) == ({}, set(range(SHARDS)))
    assert run.files() == unbroken
    until = time.monotonic() + 60  # until Ray ends what belonged to the killed driver
    while alive(worker):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert run.files() == unbroken


def test_actors_of_a_killed_driver_end_on_a_cluster_that_stays(run, spawned, cluster):
    driver = spawned(run.spawn(SHARDS, {"3": "hang"}, meet=2, workers=2, address=cluster))
    driver.wait_for("shard_started", 4)
    pids = {int(mark.name.removeprefix("worker-")) for mark in run.marks.glob("worker-*")}
    assert len(pids) == 2
    driver.send(signal.SIGKILL)
    driver.process.wait()
    all_end(pids, within=10)


def descendants(pid: int) -> set[int]:
    parents, found = running(), {pid}
    while new := {each for each, parent in parents.items() if parent in found and each not in found}:
        found |= new
    return found - {pid}


def running() -> dict[int, int]:
    """Each process that has not ended, with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may end while it is read
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(path.parent.name)] = int(parent)
    return found


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def all_end(pids: set[int], within: float) -> None:
    until = time.monotonic() + within
    while left := pids & set(running()):
        assert time.monotonic() < until, [command(pid) for pid in left]
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def deleted(folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # what was written during the first time


def replaced(folder):
    moved(folder)
    folder.mkdir()


def emptied(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("happens", [moved, deleted, replaced, emptied])
@pytest.mark.parametrize("inside", ["a long shard", "short shards", "actors"])
def test_a_folder_that_goes_stops_its_driver_and_is_not_made_again(run, spawned, request, happens, inside):
    settings = {"workers": 2, "address": request.getfixturevalue("cluster")} if inside == "actors" else {}
    driver = spawned(run.spawn(500, {"2": "hang"} if inside == "a long shard" else {}, pause=0.05, **settings))
    driver.wait_for("shard_started", 3)
    happens(run.folder)
    left = contents(run.folder)
    code, errors = driver.end(10)
    assert (code, len(errors.splitlines())) == (1, 1), errors
    assert str(run.folder) in errors and "while this command worked in it" in errors
    if happens is not emptied:  # there, what was under way may still arrive
        assert contents(run.folder) == left


def contents(folder):
    return sorted(str(path) for path in (folder, *folder.rglob("*")) if path.exists())
