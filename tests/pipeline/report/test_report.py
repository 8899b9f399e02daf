"""What the page is made of, without a browser: counts, choices of images, students, and what commands write."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError
from manifests.integrity import verify
from manifests.reader import Manifest
from manifests.schema import SCHEMA
from manifests.storage import Storage
from manifests.where import compile_where
from pipeline import cli, report, synth
from pipeline.events import EventLog
from pipeline.repair import leftovers
from pipeline.report import columns as counting
from pipeline.report import make_report
from pipeline.report.columns import Columns, nice_stops, packed, read_columns, slider
from pipeline.report.facts import cost
from pipeline.report.pictures import Pictures, cuts, flags, gallery_rows, trajectories
from pipeline.report.students import confusion
from stages.distill.run import run_distill
from stages.models.teacher import Teacher
from tests.distill.drawn import write_dataset
from tests.distill.short import settings
from tests.pipeline.fake_worker import FACTORY
from tests.pipeline.report.drawn import ATTACKS, write_hostile


@pytest.fixture
def factory(monkeypatch, capsys):
    """``factory ARGS`` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(synth.run_synth, "__kwdefaults__", synth.run_synth.__kwdefaults__ | {"worker": FACTORY})

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["factory", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(
    st.lists(st.one_of(st.none(), st.floats(-2, 9, width=32), st.sampled_from([0.7, 0.005, 0.0, 1.0])), min_size=1),
    st.sampled_from(["confidence", "entropy", "cosine"]),
)
def test_every_stop_of_a_slider_selects_what_where_selects(values, name):
    column = pa.array(values, pa.float32())
    each = slider(name, np.asarray(column.to_numpy(zero_copy_only=False), np.float32))
    if each is None:
        assert column.null_count == len(column)
        return
    assert len(each.stops) < counting.MISSING
    table = pa.table({name: column, "row": np.arange(len(values))})
    for place in {0, len(each.stops) // 3, len(each.stops) - 2, len(each.stops) - 1}:
        passes = each.passed > place if each.operator == ">=" else each.passed <= place
        passes &= each.passed != counting.MISSING
        where = compile_where(f"{name} {each.operator} {each.stops[place]}", SCHEMA)
        assert np.flatnonzero(passes).tolist() == table.filter(where)["row"].to_pylist()


@given(st.floats(-10, 10, width=32), st.floats(0, 10, width=32))
def test_stops_enclose_their_range(low, width):
    high = float(np.float32(low + width))
    stops = nice_stops(low, high)
    assert 2 <= len(stops) <= 204
    assert np.float32(stops[0]) <= np.float32(low) and np.float32(stops[-1]) >= np.float32(high)


def some_columns(label, confidence, kept) -> Columns:
    n = len(label)
    missing = np.full(n, -1)
    values = {
        "label": np.array(label),
        "kept": np.array(kept),
        "scores": {"confidence": np.array(confidence, np.float32)},
        "teacher_label": np.array(label),
        "timestep": np.zeros(n, int),
        "final": np.ones(n, bool),
        "loss_bn": np.full(n, np.nan),
        "reject_reasons": {},
        "same_bytes": [],
    }
    return Columns(**(values | dict.fromkeys(("step", "trajectory", "group"), missing)))


def test_a_gallery_is_sorted_by_confidence_and_shows_rejected_images():
    columns = some_columns([1, 0, 1, 1, 1, 1], [0.2, 0.5, 0.9, 0.4, np.nan, 0.6], [True, True, True, False, True, True])
    chosen = gallery_rows(columns, classes=2, affordable=100)
    assert {label: rows.tolist() for label, rows in chosen.items()} == {0: [1], 1: [2, 5, 3, 0, 4]}
    few = gallery_rows(columns, classes=2, affordable=8)
    assert [len(rows) for rows in few.values()] == [1, 4]
    assert 3 in few[1].tolist()  # the rejected one
    assert len(gallery_rows(columns, classes=2, affordable=1)) == 1


def test_trajectories_run_from_noise_to_the_final_image(tmp_path):
    columns = read_columns(Manifest.open(write_hostile(tmp_path)))
    strips = trajectories(columns)
    assert len(strips) == 8
    assert all(columns.step[rows].tolist() == [2, 5, 9] for rows in strips)


def test_a_cut_shows_the_partners_box(tmp_path):
    """λ = 1 − 2·4/64, so a latent of 8 × 8 cells; on an image of 8 pixels the box is 2 high and 4 wide, at (3, 1)."""
    mix = {"step": 4, "timestep": 500, "partner": 1, "y": 1, "x": 3, "h": 2, "w": 4, "lam": 1 - 8 / 64}
    write_dataset(
        tmp_path, 4, shards=1,
        label=lambda i: 0, class_name=lambda i: "left", trajectory=lambda i: i // 2, step=lambda i: (4, 9)[i % 2],
        timestep=lambda i: (500, 0)[i % 2], lca=lambda i: [mix] if i == 1 else [],
    )  # fmt: skip
    manifest = Manifest.open(tmp_path)
    pictures, columns = Pictures(manifest), read_columns(manifest)
    (cut,) = cuts(pictures, columns, "cutmix")
    assert cut.box == (3 / 8, 1 / 8, 4 / 8, 2 / 8)
    assert [picture.row for picture in (*cut.before, *cut.partner, *cut.after)] == [0, 2, 1]
    own, other = pictures.pixels(0), pictures.pixels(2)
    expected = own.copy()
    expected[1:3, 3:7] = other[1:3, 3:7]
    assert cut.composed == report.pictures.encoded(expected)
    assert cuts(pictures, columns, "mixup") == []


def test_flags_count_what_is_suspicious(tmp_path):
    write_dataset(
        tmp_path, 12, shards=1,
        teacher_label=lambda i: i % 3 if i else 2, confidence=lambda i: 0.3 if i in (2, 5) else 0.9,
        timestep=lambda i: 0, kept=lambda i: i != 5,
    )  # fmt: skip
    manifest = Manifest.open(tmp_path)
    columns, pictures = read_columns(manifest), Pictures(manifest)
    found = flags(pictures, columns, [["000000-000004", "000000-000001"]], 11)
    counts = {flag.title: (flag.count, flag.total, [[p.row for p in group] for group in flag.groups]) for flag in found}
    assert counts == {
        "The teacher sees another class": (1, 11, [[0]]),
        "The teacher is unsure": (1, 11, [[2]]),
        "Near-duplicates": (1, 11, [[1, 4]]),
    }


def test_a_loss_unlike_that_of_other_groups_is_flagged(tmp_path):
    write_dataset(
        tmp_path, 20, shards=1, timestep=lambda i: 0, group=lambda i: i // 2,
        loss_bn=lambda i: 9.0 if i // 2 == 3 else 1 + i // 2 / 100,
    )  # fmt: skip
    manifest = Manifest.open(tmp_path)
    (flag,) = flags(Pictures(manifest), read_columns(manifest), [], 0)
    assert (flag.count, [picture.row for picture in flag.groups[0]]) == (2, [6, 7])


def test_a_large_dataset_is_sampled_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "MAX_ROWS", 50)
    folder = write_hostile(tmp_path)
    assert packed(read_columns(Manifest.open(folder)), 6)["rows"] == 50
    assert b"Counted on 50 of 120 rows" in make_report(folder).html


def test_damaged_images_are_named_and_the_rest_is_shown(tmp_path):
    manifest = Manifest.open(write_dataset(tmp_path, 12, shards=1))
    row, (tar,) = manifest.row(3), manifest.info.tars
    data = bytearray((tmp_path / tar.name).read_bytes())
    data[row["offset"] + 20] ^= 1
    (tmp_path / tar.name).write_bytes(data)
    text = make_report(str(tmp_path)).html.decode()
    assert "Images that cannot be read: 1. The first: " in text and row["key"] in text
    (tmp_path / tar.name).unlink()
    assert "Images that cannot be read: 12." in make_report(str(tmp_path)).html.decode()


def test_students_are_read_from_their_folder_alone(tmp_path):
    dataset = write_dataset(tmp_path / "run", 48)
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "run/distill"))
    (tmp_path / "run/distill").rename(tmp_path / "moved")
    text = make_report(dataset).html.decode()
    assert "Students: no finished training" in text
    text = make_report(dataset, [str(tmp_path / "moved")], test_data=dataset).html.decode()
    assert "digits-cnn-small" in text and "training loss" in text
    assert "Teacher right, student wrong" in text
    assert f"factory export student {tmp_path}/moved/digits-cnn-small" in text
    other = write_dataset(tmp_path / "other", 48, seed=1)
    assert "trained on another dataset" in make_report(other, [str(tmp_path / "moved")]).html.decode()
    with pytest.raises(DataError, match="no finished training"):
        make_report(dataset, [str(tmp_path / "run")])


def test_the_teacher_is_asked_once_for_all_students(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "run", 48)
    two = settings().model_copy(update={"students": ("digits-cnn-small", "digits-cnn")})
    run_distill(two, [(dataset, 1.0)], str(tmp_path / "run/distill"), test_data=dataset)
    asked, logits = [], Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, x: asked.append(len(x)) or logits(self, x))
    text = make_report(dataset, test_data=dataset, measure=False).html.decode()
    assert text.count("Teacher right, student wrong") == 2
    assert asked == [2, 48]  # the probe of a loaded teacher, and the images
    assert text.count("reliability: accuracy by confidence on test images") == 2
    assert "below the diagonal: surer than right" in text


def test_counted_work_is_of_the_log(tmp_path):
    dataset = Storage(tmp_path)
    with EventLog(dataset) as events:
        parts = {"denoiser": 1.5e9, "x": 0}
        events.write("work_counted", flop_per_trajectory=2e9, images_per_trajectory=2, parts=parts)
        events.write("shard_done", shard=0, rows=10, seconds=1.0)
    assert dict(cost(dataset, 5))["compute per 1,000 images"] == "1.0 TFLOP, counted: denoiser 75.0%"
    for broken in ({}, {"images_per_trajectory": 0}, {"parts": [1]}, {"flop_per_trajectory": "x"}):
        with EventLog(dataset) as events:
            full = {"flop_per_trajectory": 2e9, "images_per_trajectory": 2, "parts": {}}
            events.write("work_counted", **(full | broken if broken else {}))
        assert "compute per 1,000 images" not in dict(cost(dataset, 5))


def test_recorded_test_data_is_not_opened(tmp_path):
    """A results.json that somebody else wrote must not put files of this machine on a page that may be shared."""
    dataset = write_dataset(tmp_path / "run", 48)
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "run/distill"), test_data=dataset)
    text = make_report(dataset).html.decode()
    assert "Teacher right, student wrong" not in text
    assert f"are shown with --test-data {dataset}" in text


def test_names_in_results_are_text_and_stay_in_their_folder(tmp_path):
    dataset, folder = write_dataset(tmp_path / "run", 48), tmp_path / "run/distill"
    run_distill(settings(), [(dataset, 1.0)], str(folder), test_data=dataset)
    results = load_checked((folder / "results.json").read_bytes())
    (student,) = results["students"].values()

    def with_students(**changes):
        (folder / "results.json").write_bytes(dump_checked(results | changes))
        return make_report(dataset).html.decode()

    name = "<script>window.attacked = 1<x>"
    text = with_students(students={name: student}, parked={ATTACKS[0]: ATTACKS[1]})
    assert text.count("<script") == 2 and ATTACKS[1] not in text
    assert "&lt;script&gt;window.attacked = 1&lt;x&gt;" in text
    assert "Students: " in with_students(students={"../../elsewhere": student})
    uneven = student["test"] | {"confusion": [[1], [2, 3]]}
    assert "does not fit its classes" in with_students(students={"digits-cnn-small": student | {"test": uneven}})


def test_a_large_confusion_matrix_becomes_its_commonest_mistakes():
    matrix = np.eye(40, dtype=int) * 5
    matrix[3, 7], matrix[8, 1] = 4, 2
    found = confusion(matrix.tolist(), [str(i) for i in range(40)])
    assert found.cells == [(3, 7, 4, 4 / 9), (8, 1, 2, 2 / 7)]
    whole = confusion([[1, 1], [0, 0]], ["a", "b"])
    assert whole.whole and whole.cells == [(0, 0, 1, 0.5), (0, 1, 1, 0.5), (1, 0, 0, 0.0), (1, 1, 0, 0.0)]


def test_text_of_the_dataset_is_escaped_everywhere(tmp_path):
    text = make_report(write_hostile(tmp_path)).html.decode()
    assert text.count("<script") == text.count("</script>") == 2
    shown = text.split('id="data"')[0]
    assert not any(attack in shown for attack in (ATTACKS[1], ATTACKS[4], "\u202e", "\x1b"))
    assert "49" not in shown.split("<tbody>")[1].split("</tbody>")[0]  # {{ 7 * 7 }}


def test_a_dataset_without_scores_has_a_page(tmp_path):
    page = make_report(write_dataset(tmp_path, 6, teacher={"architecture": "unknown"}), measure=True)
    assert b"No row has a confidence" in page.html and b"Not measured" in page.html


def test_the_command_writes_its_page_and_nothing_else(tmp_path, factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    write_dataset(folder, 12)
    before = files(folder)
    code, out, _ = factory("report", "run", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["report"], found["rows"]) == ("report-run.html", 12)
    assert found["bytes"] == (tmp_path / "report-run.html").stat().st_size
    assert factory("report", "run/m.parquet", "--out", "a/b.html", "--no-metrics")[0] == 0
    assert b"Left out with --no-metrics" in (tmp_path / "a/b.html").read_bytes()
    assert files(folder) == before
    code, _, err = factory("report", "absent")
    assert code == 3 and err.count("\n") == 1
    code, _, err = factory("report", "run", "--students", "run")
    assert code == 3 and "no finished training" in err


NOISE = ("--method", "noise", "--set", "groups_per_shard=1", "--set", "group_size=10", "--set", "images.size=8")


def test_a_run_leaves_a_report_that_nothing_minds(tmp_path, factory):
    run = tmp_path / "run"
    code, out, err = factory("run", "synth", *NOISE, "--shards", 1, "--out", run, "--json")
    assert code == 0 and json.loads(out)["rows"] == 10
    assert f"report: {run}/report.html" in err
    assert b"10 images" in (run / "report.html").read_bytes()
    assert verify(run) == []
    assert leftovers(Storage(run)).foreign == []
    (run / "report.html").unlink()
    assert factory("run", "synth", *NOISE, "--shards", 1, "--out", run, "--no-report")[0] == 0
    assert not (run / "report.html").exists()


def test_a_report_that_fails_is_a_line(tmp_path, factory, monkeypatch):
    monkeypatch.setattr(report, "make_report", lambda *args: 1 / 0)
    code, _, err = factory("run", "synth", *NOISE, "--shards", 1, "--out", tmp_path / "run")
    assert code == 0 and "no report: division by zero" in err
