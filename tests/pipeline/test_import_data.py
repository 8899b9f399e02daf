"""``factory import``: digits as pictures from elsewhere, labeled or not, killed and resumed, then distilled."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from manifests.errors import DataError, UsageError
from manifests.integrity import verify
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.import_data import import_data
from pipeline.recipe import Recipe
from pipeline.repair import collect
from stages.digits import CLASS_NAMES, load_split
from stages.models.loading import load_teacher
from stages.models.source import resolve
from stages.settings import ModelSettings
from tests.pipeline.test_killed import ROOT, tree

SMALL = ("synth.groups_per_shard=2", "synth.group_size=10", "synth.teacher.name=embedded:digits", "synth.device=cpu")
SETS = [text for setting in SMALL for text in ("--set", setting)]


def recipe(*settings):
    return Recipe().changed("name=import", *SMALL, *settings)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def digits():
    images, labels = load_split("test")
    return [png(image) for image in images[:50]], labels[:50].tolist()


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """50 pictures in class folders and one that is none."""
    root = tmp_path_factory.mktemp("digits")
    for i, (data, label) in enumerate(zip(*digits, strict=True)):
        (root / CLASS_NAMES[label]).mkdir(exist_ok=True)
        (root / CLASS_NAMES[label] / f"{i:03d}.png").write_bytes(data)
    (root / "zero" / "bad.png").write_bytes(b"no image")
    (root / "zero" / "notes.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return import_data(recipe(), str(folder), str(out), license_="CC0 [x](http://y)"), out


def test_labels_of_folders_and_the_teachers_columns(unbroken, digits):
    result, out = unbroken
    assert (result.images, result.bad, result.dataset.rows, result.dataset.shards) == (51, 1, 50, 3)
    assert "left out: 1 of 51" in "\n".join(result.lines()) and not verify(str(out))
    rows = Manifest.open(result.dataset.manifest)
    assert sorted(rows.column("label")) == sorted(digits[1]) and {*rows.column("method")} == {"import"}
    teacher = load_teacher(resolve(ModelSettings(name="embedded:digits")))
    from stages.models.inputs import to_unit
    from stages.synth.scores import stored_images

    shares = teacher.logits(stored_images(rows, range(50))).softmax(1)
    assert np.allclose(rows.column("confidence"), shares.max(1).values, atol=1e-5)
    assert np.allclose(rows.column("entropy"), -(shares * shares.clamp_min(1e-30).log()).sum(1), atol=1e-4)
    assert (rows.column("teacher_label") == rows.column("label")).mean() > 0.9
    picture = np.asarray(Image.open(io.BytesIO(digits[0][digits[1].index(8)])).convert("RGB"))
    first = stored_images(rows, [0])[0]
    assert (first == teacher.input.view(to_unit(torch.from_numpy(picture.copy())[None]))[0]).all()
    card = (out / "README.md").read_text()
    assert "50 imported images" in card and "CC0 \\[x\\](http\\://y)" in card and "**Source**: digits" in card


def test_killed_and_resumed_it_is_the_same(folder, unbroken, tmp_path):
    command = [sys.executable, "-m", "pipeline.cli", "import", str(folder), "--teacher", "embedded:digits", *SETS]
    command += ["--out", str(tmp_path), "--license", "CC0 [x](http://y)"]
    environment = {**os.environ, "FACTORY_FAULT": "tar:1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert len([*(tmp_path / "done").iterdir()]) == 1
    result = import_data(recipe(), str(folder), str(tmp_path))  # what was said of the license stays
    collect(Storage(tmp_path))
    assert tree(tmp_path) == tree(unbroken[1]) and (result.images, result.bad) == (51, 1)


def test_without_labels_the_teachers_answer_is_the_label(digits, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, data in enumerate(digits[0][:12]):
        (flat / f"{i}.png").write_bytes(data)
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for i in sorted(range(12), key=str):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(digits[0][i])
            tar.addfile(info, io.BytesIO(digits[0][i]))
    order = [digits[0][i] for i in sorted(range(12), key=str)]
    pq.write_table(pa.table({"image": order}), tmp_path / "plain.parquet")
    found = {}
    for name in ("flat", "plain.tar", "plain.parquet"):
        result = import_data(recipe(), str(tmp_path / name), str(tmp_path / f"out-{name}"))
        assert result.labels.startswith("the teacher's answers, since")
        rows = Manifest.open(result.dataset.manifest)
        assert (rows.column("label") == rows.column("teacher_label")).all() and len(rows) == 12
        found[name] = rows.column("xxh3")
    assert found["flat"] == found["plain.tar"] == found["plain.parquet"]
    with pytest.raises(DataError, match="label"):
        import_data(recipe(), str(tmp_path / "plain.tar"), str(tmp_path / "x"), labels="data")
    assert not (tmp_path / "x").exists()


def test_one_label_that_does_not_fit_does_not_drop_the_others(digits, tmp_path):
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        for i, label in enumerate((1, 2, 77)):
            for name, data in ((f"{i}.png", digits[0][i]), (f"{i}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"77.*--labels teacher takes the teacher's answers"):
        import_data(recipe(), str(tmp_path / "few.tar"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_that_are_none_are_no_dataset(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 images could be decoded"):
        import_data(recipe(), str(tmp_path / "flat"), str(tmp_path / "out"))


def test_labels_of_the_data_can_be_left_aside(folder, tmp_path):
    result = import_data(recipe("synth.min_confidence=0.99"), str(folder), str(tmp_path / "out"), labels="teacher")
    rows = Manifest.open(result.dataset.manifest).where(include_rejected=True)
    assert (rows.column("label") == rows.column("teacher_label")).all()
    assert ((rows.column("confidence") >= 0.99) == rows.column("kept")).all() and result.dataset.kept < 50


def test_what_is_refused_leaves_nothing_behind(folder, unbroken, tmp_path):
    with pytest.raises(DataError, match="holds another plan"):
        import_data(recipe(), str(folder), str(unbroken[1]), labels="teacher")
    with pytest.raises(UsageError, match="would lie inside"):
        import_data(recipe(), str(folder), str(folder / "run"))
    with pytest.raises(UsageError, match="is a dataset already: factory rescore"):
        import_data(recipe(), str(unbroken[1]), str(tmp_path / "again"))
    with pytest.raises(DataError, match="no such file or folder"):
        import_data(recipe(), str(tmp_path / "none"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_it_is_mixed_with_synthetic_images(unbroken, folder, tmp_path):
    from pipeline.distill import run_distill
    from pipeline.synth import run_synth

    small = ("synth.method=dmkd", "synth.shards=1", "synth.groups_per_shard=1", "synth.group_size=10")
    made = run_synth(Recipe.load("demo", *small, "synth.prior.steps=1"), str(tmp_path / "synth"), quiet=True)
    training = Recipe.load("demo", "distill.epochs=1", "distill.students=[resnet8]", "distill.where=entropy < 1.5")
    sources = [(made.manifest, 1.0), (unbroken[0].dataset.manifest, 0.3)]
    with pytest.raises(DataError, match="distill from manifests of one size"):
        run_distill(training, sources, str(tmp_path / "refused"), quiet=True)
    fitting = import_data(recipe("synth.images.size=32"), str(folder), str(tmp_path / "fitting"))
    assert Manifest.open(fitting.dataset.manifest).info.image_size == 32
    sources = [(made.manifest, 1.0), (fitting.dataset.manifest, 0.3)]
    result = run_distill(training, sources, str(tmp_path / "student"), quiet=True)
    assert (Path(result.students["resnet8"].folder) / "model.safetensors").exists()
