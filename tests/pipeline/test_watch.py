"""What is seen of a run while it goes on: one line from all workers, progress.json, status, the growing sheet."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from manifests.errors import UsageError
from manifests.storage import Storage
from pipeline.lease import Lease
from pipeline.status import status
from pipeline.synth import run_synth
from pipeline.terminal import Pace
from pipeline.watch import PROGRESS, SHEET, GrowingSheet, Reached, Recorder, SynthWatch, read_reached
from stages.progress import ShardProgress, ShardWatch
from tests.pipeline.conftest import INLINE, small_recipe
from tests.pipeline.fake_worker import FACTORY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seen():
    return []


def show(seen):
    return lambda done, total, note: seen.append((done, total, note))


def test_the_reports_of_all_workers_become_one_line(seen):
    watch = SynthWatch(show(seen), images=10)
    watch.counts(2, 8, 0, 0)
    assert seen[-1] == (2, 8, "20 images")
    watch.counts(2, 8, 2, 1)
    watch.report(
        ShardProgress(3, 0.5, step=5, steps=20, rows=8, kept=4, judged=4, agrees=3, confidence=3.2, guided=0.25)
    )
    watch.report(ShardProgress(2, 0.25, step=7, steps=20, guided=0.75))
    done, total, note = seen[-1]
    assert (done, total) == (2.75, 8)
    shown = note.split(", ")
    assert shown[0] == "28 images" and shown[1].endswith("/s")
    assert shown[2:] == ["agreement 75%", "confidence 80%", "kept 50%", "step 7/20 (50% sure)", "2 running", "1 failed"]
    watch.lost(2)
    watch.finished(3, {"rows": 10, "kept": 10, "judged": 5, "agreement": 1.0, "confidence": 0.9}, 3)
    watch.counts(3, 8, 0, 0)
    assert seen[-1][2].split(", ")[2:] == ["agreement 100%", "confidence 90%", "kept 100%"]


def test_what_is_logged_of_a_shard_is_its_own(seen):
    watch = SynthWatch(images=10, log=lambda curve, step, metrics: seen.append((curve, step, metrics)))
    watch.counts(4, 8, 1, 0)
    watch.finished(4, {"rows": 10, "kept": 5, "judged": 10, "agreement": 0.6, "confidence": 0.9}, 5)
    ((curve, step, metrics),) = seen
    assert (curve, step) == ("synth", 5)
    assert {k: metrics[k] for k in ("images", "agreement", "confidence", "kept")} == {
        "images": 50, "agreement": 0.6, "confidence": 0.9, "kept": 0.5,
    }  # fmt: skip
    assert metrics["images_per_second"] > 0


def test_a_group_that_is_made_again_in_parts_goes_back(seen):
    watch = ShardWatch(0, 2, 4, seen.append)
    watch.begin_group()
    for _ in range(3):
        watch.step()
    watch.begin_group()
    row = {"kept": True, "confidence": 0.5, "label": 1, "teacher_label": 1, "timestep": 0}
    early = {"timestep": 500, "confidence": 0.0}  # a prediction: stored, but the teacher is to judge final images
    watch.end_group([row, row | early, row | {"kept": False, "teacher_label": 2, "confidence": 1.0}])
    assert seen[0].share == 1 / 10 and len(seen) == 2  # steps within a second are one report
    assert (seen[1].share, seen[1].rows, seen[1].agrees, seen[1].kept, seen[1].confidence) == (0.5, 3, 1, 2, 1.5)
    assert watch.judgment == {"judged": 2, "agreement": 0.5, "confidence": 0.75}
    watch.begin_group()
    for _ in range(9):  # more than were counted on: a group is never more than done
        watch.step()
    watch.end_group()
    assert seen[-1].share == 1


def test_pace_counts_what_this_run_did():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.left(90, 100) is None
    now[0] = 30.0
    assert pace.left(93, 100) == pytest.approx(70)
    assert pace.left(100, 100) is None


def test_a_reader_sees_within_a_shard_and_nothing_is_left_at_the_end(run_folder, tmp_path):
    storage = Storage(run_folder)
    recorder = Recorder(storage, lambda *_: None)
    recorder(1.25, 2, "25 images, step 3/20")
    with Lease(storage):
        found = status(storage)
        assert found.reached == read_reached(storage) and found.reached.done == 1.25
        assert "at       1.25 of 2: 25 images, step 3/20" in list(found.lines())
        storage.write(PROGRESS, b"[1")
        assert status(storage).reached is None
    recorder.finish()
    assert not storage.exists(PROGRESS)


def test_one_time_left_for_all(run_folder):
    storage = Storage(run_folder)
    storage.write(PROGRESS, json.dumps(vars(Reached(1000.0, 1, 2, 60.0, "x"))).encode())
    with Lease(storage):
        assert status(storage, now=1010.0).seconds_left == 50


def test_a_run_that_people_see_has_a_sheet_and_a_quiet_one_does_not(tmp_path, capsys):
    loud = run_synth(small_recipe("shards=2"), str(tmp_path / "loud"), INLINE, worker=FACTORY)
    quiet = run_synth(small_recipe("shards=2"), str(tmp_path / "quiet"), INLINE, worker=FACTORY, quiet=True)
    assert loud.sheet == str(tmp_path / "loud" / SHEET) and f"contact sheet: {loud.sheet}" in list(loud.lines())
    assert quiet.sheet is None and not (tmp_path / "quiet" / SHEET).exists()
    assert status(Storage(loud.run)).sheet == loud.sheet
    assert not (tmp_path / "loud" / PROGRESS).exists()
    assert "synth: 2/2, 40 images" in capsys.readouterr().err


def test_the_sheet_grows_from_finished_shards_alone(run_folder, tmp_path):
    storage = Storage(run_folder)
    sheet = GrowingSheet(storage, [f"class {i}" for i in range(10)], [0])
    sheet.add(7)  # not done: nothing of it, but of the earlier one
    first = Image.open(io.BytesIO(storage.read(SHEET)))
    sheet._next = 0.0
    sheet.add(1)
    second = Image.open(io.BytesIO(storage.read(SHEET)))
    assert second.height == first.height and second.width > first.width
    before = storage.read(SHEET)
    sheet.add(1)  # too soon
    assert storage.read(SHEET) == before
    storage.delete(SHEET)


def test_folders_of_runs(tmp_path, capsys):
    for name in ("round-001", "round-002"):
        run_synth(small_recipe("shards=1"), str(tmp_path / name), INLINE, worker=FACTORY, quiet=True)
    (tmp_path / "notes").mkdir()
    found = status(Storage(tmp_path))
    assert (found.state, len(found.runs)) == ("complete", 2)
    assert "complete, 1 of 1 shards done" in list(found.lines())[1]


def test_a_terminal_shows_a_bar_and_the_note(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "run",
        "synth",
        "--method",
        "noise",
        "--shards",
        "2",
        "--no-report",
    ]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, stdout=follower, stderr=follower, stdin=follower,
        env=os.environ | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux's end of file
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text and "━" in text and "2/2" in text
    assert "200 images" in text and "manifest: " in text


def test_tensorboard_continues_the_same_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for shards in (2, 4):
        recipe = small_recipe(f"shards={shards}", "loggers=[tensorboard]")
        made = run_synth(recipe, str(tmp_path / "run"), INLINE, worker=FACTORY, quiet=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard/synth")).Reload()
    assert [e.step for e in events.Scalars("images")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("images")] == [20, 40, 60, 80]
    assert [e.value for e in events.Scalars("kept")] == pytest.approx([0.8] * 4)
    plain = run_synth(small_recipe("shards=4"), str(tmp_path / "plain"), INLINE, worker=FACTORY, quiet=True)
    assert plain.fingerprint == made.fingerprint  # loggers decide no image


def test_a_logger_that_is_not_there_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"loggers: mlflow needs pip install 'dfkd-factory\[mlflow\]'"):
        run_synth(small_recipe("loggers=[mlflow]"), str(tmp_path / "run"), INLINE, worker=FACTORY)
    assert not (tmp_path / "run").exists()
