"""``factory init``: recipes that describe the teacher they were made for, and say what was guessed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manifests.errors import DataError, UsageError
from pipeline.cli import app
from pipeline.init import Facts, load_draft, recipe_text, write_recipe
from pipeline.recipe import resolve
from stages.models import nets
from stages.models.build import build_net
from stages.models.source import ModelConfig
from stages.models.source import resolve as resolve_model
from stages.settings import InputSettings, ModelSettings

NORMALIZED = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--size", "32")


def factory(*args, **given):
    return CliRunner().invoke(app, [str(arg) for arg in args], **given)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Of a resnet20 with 7 classes, as a training loop saves them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({"model": nets.build("resnet20", 7).state_dict(), "epoch": 3}, "mine.pt")
    return "mine.pt"


def test_a_weights_file_is_recognized_and_its_recipe_resolves(weights, tmp_path):
    done = factory("init", weights, "--classes", "a,b,c,d,e: e,f,y", *NORMALIZED)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "architecture: resnet20, recognized by the shapes in mine.pt" in done.stderr
    assert "weights: model of mine.pt (beside it: epoch)" in done.stderr and "guessed" not in done.stderr
    assert done.stdout == f"recipe: {tmp_path / 'mine.yaml'}\n" and "next: factory run all -c mine.yaml" in done.stderr
    recipe = resolve("mine.yaml", environ={})
    teacher = recipe.synth.teacher
    assert (teacher.name, teacher.weights, teacher.num_classes) == ("resnet20", "mine.pt", 7)
    assert teacher.class_names == ("a", "b", "c", "d", "e: e", "f", "y")  # text, whatever YAML would make of y
    assert teacher.input == InputSettings(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert recipe.distill.students == ("resnet8",) and recipe.synth.shards * recipe.synth.group_size == 1500
    assert resolve_model(ModelSettings(name="mine.yaml")).config.architecture == "resnet20"  # what eval reads


def test_every_line_is_explained(weights):
    draft = load_draft(weights, Facts(size=32, mean="0.5 0.5 0.5", std="1 1 1"), lambda question, proposed: proposed)
    for line in recipe_text(draft, None, "x.yaml").splitlines():
        assert (
            "#" in line
            or line.rstrip().endswith((":", "]", ",", "["))
            or "name:" in line
            or "path:" in line
            or not line
        )


def test_what_was_taken_unasked_is_called_a_guess(weights):
    done = factory("init", weights, "--yes")
    assert done.exit_code == 0, done.exception
    assert "warning: mean and std and size guessed" in done.stderr
    text = Path("mine.yaml").read_text()
    assert "# GUESSED: mean and std, size" in text and "num_classes: 7 # the shape of its last layer" in text


def test_without_a_person_and_yes_nothing_is_guessed(weights, tmp_path):
    error = factory("init", weights).exception
    assert isinstance(error, UsageError) and "Number of classes" in str(error) and "--yes takes 7" in str(error)
    assert not (tmp_path / "mine.yaml").exists()


def test_a_recipe_that_is_there_is_kept(weights, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    error = factory("init", weights, "--yes").exception
    assert isinstance(error, UsageError) and "--force" in str(error)
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert factory("init", weights, "--yes", "--force").exit_code == 0
    assert "resnet20" in (tmp_path / "mine.yaml").read_text()
    with pytest.raises(UsageError, match=r"ends in \.yaml"):
        write_recipe("x", tmp_path / "x.txt")
    with pytest.raises(UsageError, match="unknown key"):
        write_recipe("synth: {sheds: 3}", tmp_path / "x.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pt", "mine.yaml"]


@pytest.mark.parametrize("name", ["wrn-16-2", "resnet18", "digits-cnn"])
def test_architectures_are_told_apart(tmp_path, name):
    """By the shapes in the file alone; ImageNet networks with the stem that fits."""
    stem = "small" if name == "resnet18" else "native"
    spec = InputSettings(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    names = tuple(map(str, range(4)))
    config = ModelConfig(architecture=name, num_classes=4, channels=3, input=spec, class_names=names, stem=stem)
    file = tmp_path / "x.pth"
    torch.save(build_net(config).state_dict(), file)
    given = Facts(size=32, mean="0.5 0.5 0.5", std="0.5 0.5 0.5")
    draft = load_draft(str(file), given, lambda question, proposed: proposed)
    assert draft.source.config == draft.source.config.model_copy(update={"architecture": name, "stem": stem})
    assert draft.settings.num_classes == 4


def test_what_fits_nothing_is_asked_for(tmp_path):
    file = tmp_path / "x.pt"
    torch.save(torch.nn.Linear(3, 4).state_dict(), file)
    with pytest.raises(UsageError, match="fits no built-in architecture: say what it fills, e.g. --arch"):
        load_draft(str(file), Facts(), lambda question, proposed: proposed)
    with pytest.raises(DataError, match="cannot read"):
        load_draft(str(tmp_path / "gone.pt"), Facts(), lambda question, proposed: proposed)
    with pytest.raises(UsageError, match="is no weights file"):
        load_draft("resnet20", Facts(architecture="resnet20"), lambda question, proposed: proposed)


def test_a_model_folder_needs_no_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = factory("init", "embedded:digits", "-o", "digits.yaml")
    assert done.exit_code == 0, done.exception
    assert "input: 8 px, luminance" in done.stderr
    recipe = resolve("digits.yaml", environ={})
    assert recipe.synth.teacher.name == "embedded:digits" and recipe.synth.prior.path == "embedded:strokes32"


def test_class_names_from_files(weights, tmp_path):
    (tmp_path / "by_label.json").write_text(json.dumps({str(i): f"c{i}" for i in range(7)}))
    (tmp_path / "lines.txt").write_text("\n".join(f"c{i}" for i in range(7)))
    for file in ("by_label.json", "lines.txt"):
        assert factory("init", weights, "--classes", file, "--force", *NORMALIZED).exit_code == 0
        assert resolve("mine.yaml", environ={}).synth.teacher.class_names == tuple(f"c{i}" for i in range(7))
    error = factory("init", weights, "--classes", "8", "--force", *NORMALIZED).exception
    assert isinstance(error, DataError) and "7 classes, but 8" in str(error)
