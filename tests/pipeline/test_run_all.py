"""Both stages in one call on a tiny random prior, and lengths given as images and steps."""

import json

import pytest
from typer.testing import CliRunner

from manifests.errors import DataError, UsageError
from pipeline.cli import app
from pipeline.compare import Comparison, Entry, compare
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import Recipe, resolve
from pipeline.run_all import check, dry_run, image_count, run_all, with_images
from tests.pipeline.test_rounds import TINY
from tests.synth.tiny import save_stable_diffusion

INLINE = ExecutorSettings(retry_delay=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    prior = save_stable_diffusion(tmp_path_factory.mktemp("prior") / "prior", "epsilon")
    return resolve("demo", sets=[*TINY, f"synth.prior.path={prior}"], environ={})


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    """(folder, result)."""
    folder = tmp_path_factory.mktemp("all") / "run"
    return folder, run_all(recipe, str(folder), INLINE, quiet=True)


def test_dataset_and_students_are_in_one_folder(done):
    folder, result = done
    assert (folder / "m.parquet").exists()
    assert result.distill.students["digits-cnn-small"].folder == str(folder / "distill/digits-cnn-small")
    assert result.to_dict()["synth"]["rows"] == 20 and any("manifest:" in line for line in result.lines())


def test_the_same_call_again_makes_nothing_twice_and_the_missing_stage(done, recipe):
    folder, result = done
    tars = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*")}
    student = folder / "distill/digits-cnn-small/model.safetensors"
    weights = student.read_bytes()
    for path in sorted((folder / "distill").rglob("*"), reverse=True):  # as if stage 1 alone had been finished
        path.rmdir() if path.is_dir() else path.unlink()
    again = run_all(recipe, str(folder), INLINE, quiet=True)
    assert again.distill.students.keys() == result.distill.students.keys()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shards/*")} == tars
    assert student.read_bytes() == weights


def test_stage_2_is_checked_before_stage_1(recipe, tmp_path):
    with pytest.raises(UsageError, match="unknown architecture .resnet21.: did you mean resnet"):
        run_all(recipe.changed("distill.students=[resnet21]"), str(tmp_path / "run"), INLINE, quiet=True)
    with pytest.raises(DataError, match="nowhere"):
        run_all(recipe, str(tmp_path / "run"), INLINE, test_data=str(tmp_path / "nowhere"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_cost_of_steps_is_that_of_as_many_epochs(recipe):
    """19 of 20 images are trained on, in two batches an epoch."""
    by_epochs, by_steps = (check(recipe.changed(f"distill.{length}"), None) for length in ("epochs=3", "steps=6"))
    assert by_epochs == by_steps
    assert by_epochs.flop == 3 * check(recipe, None).flop


def test_images_become_whole_shards_and_say_so(recipe, capsys):
    assert with_images(recipe, None) is recipe
    assert image_count(with_images(recipe, 40).synth) == 40 and capsys.readouterr().err == ""
    assert image_count(with_images(recipe, 41).synth) == 60
    assert "a shard holds 20 (1 groups of 20), so 60 are made" in capsys.readouterr().err
    several = recipe.changed("synth.images.intermediates=1")
    assert with_images(several, 80).synth.shards == 2
    with pytest.raises(UsageError, match="expected 1 or more"):
        with_images(recipe, 0)


def test_the_last_layer_says_how_long(tmp_path):
    """Whoever names epochs over a recipe with steps means epochs."""
    (tmp_path / "mine.yaml").write_text("distill:\n  steps: 70\n  epochs: 3\n")
    file = str(tmp_path / "mine.yaml")
    assert resolve(file, environ={}).distill.length == "70 steps"
    assert resolve(file, sets=["distill.epochs=5"], environ={}).distill.length == "5 epochs"
    assert resolve(file, sets=["distill.epochs=5", "distill.steps=9"], environ={}).distill.length == "9 steps"
    (tmp_path / "child.yaml").write_text("extends: mine.yaml\ndistill: {epochs: 4}\n")
    assert resolve(str(tmp_path / "child.yaml"), environ={}).distill.length == "4 epochs"
    assert Recipe.load("demo", "distill.steps=8").changed("synth.seed=1").distill.length == "8 steps"
    assert "steps" not in Recipe.load("demo").model_dump(mode="json")["distill"]  # recorded recipes stay as they were


@pytest.mark.parametrize(
    "args",
    [
        ("run", "synth", "--images", "10", "--shards", "1"),
        ("run", "all", "--epochs", "1", "--steps", "1"),
    ],
)
def test_two_ways_to_say_one_thing_are_refused(args):
    error = CliRunner().invoke(app, args).exception
    assert isinstance(error, UsageError) and "give one of them" in str(error)


def test_a_dry_run_of_both_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    found = CliRunner().invoke(app, ["run", "all", "-c", "mine.yaml", "--steps", "5", "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "digits-cnn-small, 5 steps, in runs/" in found.stdout.replace(str(tmp_path) + "/", "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    remote = dry_run(recipe, "memory://bucket/run")  # whose students are made on this machine
    assert any("in runs/RECIPE-FINGERPRINT/distill, on this machine" in line for line in remote.lines())


def test_runs_are_compared_by_students_cost_and_settings(done, run_folder, tmp_path):
    """The dataset with a student, its stage 2 alone, and a dataset without any."""
    folder, result = done
    found = compare([str(folder), str(folder / "distill"), str(run_folder), str(run_folder)])
    first, alone, noise = found.entries
    student = result.distill.students["digits-cnn-small"]
    assert (first.student, first.images, first.agreement) == ("digits-cnn-small", student.images, student.val_agreement)
    assert (alone.parameters, alone.making) == (student.parameters, None) and first.making > 0
    assert (noise.student, noise.images, noise.training) == (None, 32, None)
    assert found.differences["synth.method"] == ["diffdfkd", "–", "noise"]
    assert "synth.seed" in found.differences and "synth.lca.kind" in found.differences  # stage 2 alone knows neither
    one, other = (compare([str(folder)]), compare([str(folder), str(folder)]))
    assert one == other and one.differences == {}
    lines = [*found.lines()]
    assert "images" in lines[0] and "accuracy" not in lines[0] and lines[3].split()[-1] == "–"


def test_a_page_of_the_comparison_escapes_what_it_shows(done, tmp_path):
    folder, _ = done
    assert CliRunner().invoke(app, ["compare", str(folder), "-o", str(tmp_path / "c.html")]).exit_code == 0
    page = (tmp_path / "c.html").read_text()
    assert "<meter" in page and "default-src 'none'" in page and "digits-cnn-small" in page
    hostile = Comparison([Entry("a/<b>", "x&y", 1, settings={})], {"k": ["<script>"]}).page().decode()
    assert "<script>" not in hostile and "&lt;script&gt;" in hostile and "x&amp;y" in hostile


def test_what_is_no_run_is_refused(tmp_path):
    error = CliRunner().invoke(app, ["compare", str(tmp_path)]).exception
    assert isinstance(error, DataError) and str(tmp_path) in str(error)
