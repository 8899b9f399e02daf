"""Reading a dataset writes nothing into it: results go to a place that recipe and fingerprint decide."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from manifests.dataset import DatasetInfo
from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline import cli
from pipeline.outputs import default_folder
from tests.distill.drawn import write_dataset

SHORT = ("--epochs", "1", "--batch-size", "8", "--set", "val_fraction=0.2", "--no-report")


@pytest.fixture
def factory(monkeypatch, capsys, tmp_path):
    """``factory ARGS`` in this process, below ``tmp_path / "work"``: (exit code, stdout, stderr)."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["factory", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def contents(folder):
    """Every entry with its bytes and times: also a file that was written and removed again shows in its folder."""
    return {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in (folder, *folder.rglob("*"))
    }


def test_no_command_that_reads_a_run_writes_into_it(factory, run_folder, tmp_path):
    teacher = ("--teacher", "embedded:digits", "--set", "allow_other_teacher=true", "--set", "min_agreement=0")
    before = contents(run_folder)
    for read in (run_folder, run_folder / "m.parquet"):
        assert factory("inspect", read)[0] == 0
        assert factory("report", read, "--no-metrics")[0] == 0
        assert factory("verify", read)[0] == 0
    assert factory("status", run_folder)[0] == 0
    code, _, err = factory("run", "distill", "-m", run_folder / "m.parquet", *SHORT[:-1], *teacher)
    assert code == 0, err
    (folder,) = (tmp_path / "work/runs").iterdir()
    assert f"students go to runs/{folder.name}/distill\n" in err
    assert {path.name for path in folder.iterdir()} == {"distill", "sheet.png"}
    student = folder / "distill/digits-cnn-small"
    assert factory("export", "student", student, "--torch-export", tmp_path / "s.pt2")[0] == 0
    assert factory("eval", student, run_folder / "m.parquet")[0] == 0
    assert contents(run_folder) == before
    assert factory("status", run_folder)[1].splitlines()[-1].split() == ["trained", str(folder / "distill")]
    assert factory("report", run_folder, "--no-metrics")[0] == 0
    assert f"factory export student {student}" in (tmp_path / "work/report-run.html").read_text()
    (folder / "distill/results.json").unlink()
    assert json.loads(factory("status", run_folder, "--json")[1])["trainings"] == {str(folder / "distill"): False}


def test_a_training_beside_a_foreign_manifest_is_never_resumed(factory, tmp_path):
    manifest = write_dataset(tmp_path / "data")
    assert factory("run", "distill", "-m", manifest, "-o", tmp_path / "data/distill", *SHORT)[0] == 0
    planted = contents(tmp_path / "data")
    assert factory("run", "distill", "-m", manifest, *SHORT)[0] == 0
    assert contents(tmp_path / "data") == planted
    (made,) = (tmp_path / "work/runs").iterdir()
    assert (made / "distill/results.json").exists()
    shutil.rmtree(made)  # and the place is the same again, wherever the dataset lies
    (tmp_path / "data").rename(tmp_path / "moved")
    assert factory("run", "distill", "-m", tmp_path / "moved/m.parquet", *SHORT)[0] == 0
    assert made.exists()


def test_the_default_place_is_never_inside_the_dataset(factory, tmp_path, monkeypatch):
    manifest = write_dataset(tmp_path / "data")
    before = contents(tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    for folder in ("data", "link", "data/shards"):
        monkeypatch.chdir(tmp_path / folder)
        code, _, err = factory("run", "distill", "-m", manifest, *SHORT)
        assert code == 2 and "inside the dataset" in err and "--out" in err and len(err.splitlines()) == 1
        code, out, err = factory("inspect", manifest)
        assert code == 0 and "48 rows" in out and "--sheet" in err
        assert factory("report", manifest)[0] == 2
    assert contents(tmp_path / "data") == before
    assert factory("run", "distill", "-m", manifest, "--out", tmp_path / "data/distill", *SHORT)[0] == 0


@pytest.mark.parametrize("text", ["..", "../../x", "/etc", "a/../../b", "", "\x1b[31m", "~", "C:\\x", "." * 300])
def test_names_from_a_manifest_stay_below_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    info = DatasetInfo(text, {}, {}, {}, 8, ("a",))
    place = default_folder(SimpleNamespace(info=info, storage=Storage(tmp_path / "data")), text)
    assert os.path.dirname(os.path.abspath(place)) == str(tmp_path / "runs")
    assert place.isprintable() and len(place) < 80


def test_a_dataset_of_the_name_of_its_default_place_is_spared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset("runs/mine-print-0")
    with pytest.raises(UsageError, match="inside the dataset"):
        default_folder(Manifest.open("runs/mine-print-0"), "mine")
