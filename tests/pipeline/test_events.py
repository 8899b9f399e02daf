"""The events log: appends, survives a torn line, and is read back in order, locally and remotely."""

import json
import tracemalloc

from manifests.storage import Storage
from pipeline.events import LOCAL, EventLog, Loud, read_events


def test_local_events_append_across_drivers(tmp_path):
    storage = Storage(tmp_path)
    for shard in (0, 1):
        with EventLog(storage) as log:
            log.write("shard_done", shard=shard, rows=5)
    assert [(e["kind"], e["shard"]) for e in read_events(storage)] == [("shard_done", 0), ("shard_done", 1)]


def test_a_torn_last_line_costs_only_itself(tmp_path):
    storage = Storage(tmp_path)
    EventLog(storage).write("run_started", shards=2)
    with open(tmp_path / LOCAL, "ab") as file:
        file.write(b'{"time": 1, "kind": "shard_d')
    assert len([*read_events(storage)]) == 1
    EventLog(storage).write("run_finished")
    assert [e["kind"] for e in read_events(storage)] == ["run_started", "run_finished"]


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    no_events = b'[1]\n{"kind": "x"}\n{"time": "y", "kind": "x"}\n\xff\n{"time": 1, "kind": "x", "shard": []}\n'
    no_events += b'{"time": 1e999, "kind": "x"}\n{"time": 1, "kind": "x", "rows": 1%s}\n' % (b"0" * 400)
    no_events += b"[" * 10**5 + b"\n"
    (tmp_path / LOCAL).write_bytes(no_events + b'{"time": 1, "kind": "ok"}\n')
    assert [*read_events(Storage(tmp_path))] == [{"time": 1, "kind": "ok"}]


def test_a_long_log_is_read_in_constant_memory(tmp_path):
    line = b'{"time": 1, "kind": "shard_done", "shard": 0, "error": "%s"}\n' % (b"x" * 900)
    with open(tmp_path / LOCAL, "wb") as file:
        for _ in range(20_000):
            file.write(line)
        file.write(b"9" * (3 << 20) + b"\n" + line)  # a line longer than any of this program
    tracemalloc.start()
    assert sum(1 for _ in read_events(Storage(tmp_path))) == 20_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_folder_without_events_has_none(tmp_path):
    assert [*read_events(Storage(tmp_path))] == []


def test_remote_events_are_buffered_and_kept_per_driver():
    storage = Storage("memory://events-test/run")
    now = [100.0]
    with EventLog(storage, clock=lambda: now[0]) as log:
        log.write("run_started")  # urgent: visible at once
        log.write("shard_done", shard=0)
        assert [e["kind"] for e in read_events(storage)] == ["run_started"]
        now[0] += 6
        log.write("shard_done", shard=1)
        assert len([*read_events(storage)]) == 3
        log.write("shard_done", shard=2)
    now[0] += 1
    with EventLog(storage, clock=lambda: now[0]) as log:
        log.write("run_finished")
    assert [e["kind"] for e in read_events(storage)] == ["run_started"] + 3 * ["shard_done"] + ["run_finished"]


def test_a_remote_log_is_rewritten_in_small_parts(monkeypatch):
    monkeypatch.setattr("pipeline.events.FULL", 3)
    storage = Storage("memory://events-test/parts")
    with EventLog(storage, clock=lambda: 100.0) as log:
        for shard in range(7):
            log.write("warning", shard=shard)  # urgent: written at once
    assert [len(storage.read(name).splitlines()) for name in storage.list("events")] == [3, 3, 1]
    assert [event["shard"] for event in read_events(storage)] == [*range(7)]


def test_a_line_is_json_with_time_and_kind(tmp_path):
    EventLog(Storage(tmp_path), clock=lambda: 1.23456).write("warning", message="schöne\nZeile")
    lines = (tmp_path / LOCAL).read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == {"time": 1.235, "kind": "warning", "message": "schöne\nZeile"}


def test_a_split_group_is_told_once_and_logged_each_time(tmp_path, capsys):
    with EventLog(Storage(tmp_path)) as log:
        loud = Loud(log)
        for group in (6, 7):
            loud.write("group_split", group=group, micro_batch=25)
    assert capsys.readouterr().err.splitlines() == ["out of memory: group 6 was done in micro-batches of 25"]
    assert [event["group"] for event in read_events(Storage(tmp_path))] == [6, 7]
