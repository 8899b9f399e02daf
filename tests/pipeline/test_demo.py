"""Both stages end to end on a tiny random prior: the demo's table, its picture, and a second call that resumes."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from manifests.errors import FactoryError, UsageError
from manifests.reader import Manifest
from pipeline.demo import PRIOR, UNGUIDED, PhotosResult, run_demo, run_photos
from pipeline.recipe import resolve
from stages.distill.results import DistillResult
from stages.distill.teacher_check import TeacherCheck
from stages.settings import SynthSettings
from tests.synth.tiny import save_stable_diffusion

TINY = (
    "synth.prior.steps=2",
    "synth.guidance.decoder=full",
    "synth.shards=1",
    "synth.groups_per_shard=1",
    "synth.group_size=40",
    "distill.epochs=1",
    "distill.batch_size=16",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, settings, result) of one demo."""
    folder = tmp_path_factory.mktemp("demo")
    prior = save_stable_diffusion(folder / "prior", "epsilon")
    sets = [f"synth.prior.path={prior}", *TINY]
    return folder / "out", sets, run_demo(str(folder / "out"), sets)


def test_the_table_has_teacher_guided_and_unguided_at_equal_images(demo):
    _, _, result = demo
    assert result.images == result.images_unguided == 40
    assert result.teacher > 0.9
    assert 0 <= result.guided <= 1
    table = list(result.lines())
    assert sum("%" in line for line in table) == 3
    assert any(result.picture in line for line in table)


def test_both_datasets_share_everything_but_the_method(demo):
    folder, _, _ = demo
    guided, unguided = (Manifest.open(folder / name).info for name in ("guided", "unguided"))
    assert (guided.recipe["synth"]["method"], unguided.recipe["synth"]["method"]) == ("diffdfkd", "dmkd")
    assert guided.recipe["synth"] | {"method": ""} == unguided.recipe["synth"] | {"method": ""}
    assert guided.prior == unguided.prior
    first, second = (Manifest.open(folder / name) for name in ("guided", "unguided"))
    assert list(first.column("prompt")) == list(second.column("prompt"))
    assert first.read(0) != second.read(0)


def test_the_picture_shows_both(demo):
    folder, _, _ = demo
    picture = Image.open(io.BytesIO((folder / "guidance.png").read_bytes()))
    assert picture.width > 2 * 64


def test_again_it_takes_up_where_it_stopped(demo):
    folder, sets, before = demo
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "guided/shards").iterdir()}
    after = run_demo(str(folder), sets)
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "guided/shards").iterdir()}
    assert replace(before, seconds=0) == replace(after, seconds=0)


def test_a_first_student_that_was_parked_is_one_line(demo, monkeypatch):
    folder, sets, _ = demo

    def learn(recipe, sources, out, **_):
        check = TeacherCheck(20, 0.9, 0.9, {"zero": 20}, None, None, ("zero", 1.0), None)
        return DistillResult(out, {}, check, 40, 0, 1, 1.0, 0.0, {}, {"digits-cnn-small": "loss is nan at step 0"})

    monkeypatch.setattr("pipeline.demo.run_distill", learn)
    with pytest.raises(FactoryError, match="^guided student: digits-cnn-small was parked: loss is nan at step 0$"):
        run_demo(str(folder), sets)


def test_the_unguided_half_leaves_out_what_it_would_not_use():
    sets = ["lca.every=2", "adversary.name=x", "guidance.adversarial=1"]
    recipe = resolve("demo", section="synth", sets=sets, environ={})
    guided, unguided = recipe.synth, recipe.changed(*UNGUIDED).synth
    assert SynthSettings.model_validate(unguided.model_dump()) == unguided
    assert (unguided.method, unguided.seed, unguided.prior) == ("dmkd", guided.seed, guided.prior)


def test_photographs_without_a_clone_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.demo.TEACHER", tmp_path / "benchmarks" / "cifar10-teacher")
    with pytest.raises(UsageError, match=r"--photos needs a clone of the repository: there is no .*cifar10-teacher"):
        run_photos(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_demo_with_photographs_measures_on_images_that_no_student_saw(tmp_path, monkeypatch):
    made, scored = {}, []

    def synth(recipe, out, place, title):
        made[out.removeprefix(f"{tmp_path}/")] = recipe.synth
        return SimpleNamespace(run=out, manifest=f"{out}/m.parquet", kept=recipe.synth.shards * 100)

    def distill(recipe, sources, out, test_data, title):
        student = SimpleNamespace(folder=f"{out}/resnet8", test=None)
        return SimpleNamespace(parked={}, students={"resnet8": student})

    def evaluate(folder, data, teacher):
        scored.append((folder, data))
        return SimpleNamespace(model_teacher_agreement=len(scored) / 10)

    for name, fake in (("run_synth", synth), ("run_distill", distill), ("picture", lambda *_: b"png")):
        monkeypatch.setattr(f"pipeline.demo.{name}", fake)
    monkeypatch.setattr("stages.distill.evaluate.evaluate", evaluate)
    found = run_photos(str(tmp_path))
    assert {name: (synth.method, synth.seed, synth.shards) for name, synth in made.items()} == {
        "guided": ("diffdfkd", 0, 4),
        "unguided": ("dmkd", 0, 4),
        "held-out/guided": ("diffdfkd", 1, 1),
        "held-out/unguided": ("dmkd", 1, 1),
    }
    assert {each.prior.path for each in made.values()} == {str(PRIOR)}
    assert found.agreement == {"guided": {"guided": 0.1, "unguided": 0.2}, "unguided": {"guided": 0.3, "unguided": 0.4}}
    assert scored[1] == (f"{tmp_path}/guided/distill/resnet8", f"{tmp_path}/held-out/unguided/m.parquet")
    assert (found.held_out, found.images, found.accuracy) == (100, {"guided": 400, "unguided": 400}, {})
    assert any("no accuracy: the repository holds no real photographs" in line for line in found.lines())


def test_accuracy_has_a_column_of_its_own_where_it_was_measured():
    agreement = {"guided": {"guided": 0.5, "unguided": 0.25}, "unguided": {"guided": 0.1, "unguided": 0.2}}
    images, accuracy = {"guided": 500, "unguided": 400}, {"teacher": 0.9, "guided": 0.6, "unguided": 0.5}
    lines = list(PhotosResult("o", agreement, 100, images, accuracy, "p", "s", 1.0).lines())
    assert lines[1].split()[-2:] == ["on", "real"] and lines[2].endswith("90.0%") and lines[3].endswith("60.0%")
    assert lines[4].split()[-4:] == ["400", "10.0%", "20.0%", "50.0%"]
