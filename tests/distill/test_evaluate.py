"""Scores by hand, and every kind of labeled data."""

import io
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manifests.errors import DataError
from stages.digits import load_split, write_split
from stages.distill.eval_data import labeled_images
from stages.distill.evaluate import DataIdentity, calibration_error, evaluate, evaluate_net, reliability, scores
from stages.distill.export import export_onnx
from stages.distill.run import run_distill
from stages.models.loading import load_model, save_model
from stages.models.source import EMBEDDED
from stages.settings import ModelSettings
from tests.distill.drawn import NAMES, square, teacher_files
from tests.distill.short import settings


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [(f"s{i}", square(i % 3, rng), i % 3) for i in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    for name, data in teacher_files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_folder(path, samples, names):
    for key, image, label in samples:
        (path / names[label]).mkdir(parents=True, exist_ok=True)
        (path / names[label] / f"{key}.png").write_bytes(image)
    return str(path)


def write_parquet(path, samples, image="png", label="label", wrap=lambda data: data):
    columns = {
        "key": [k for k, _, _ in samples],
        image: [wrap(d) for _, d, _ in samples],
        label: [c for _, _, c in samples],
    }
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_every_container_gives_the_same_scores(samples, model, tmp_path):
    paths = [
        write_tar(tmp_path / "a.tar", [m for k, d, c in samples for m in ((f"{k}.png", d), (f"{k}.cls", b"%d" % c))]),
        write_tar(
            tmp_path / "b.tar",
            [m for k, d, c in samples for m in ((f"x/{k}.json", json.dumps({"label": c}).encode()), (f"x/{k}.png", d))],
        ),
        write_parquet(tmp_path / "a.parquet", samples),
        write_parquet(tmp_path / "b.parquet", samples, "image", "cls", lambda data: {"bytes": data, "path": None}),
        write_folder(tmp_path / "named", samples, NAMES),
    ]
    found = [evaluate(model, path) for path in paths]
    assert found[0].images == 7
    for other in found[1:]:
        assert other.confusion == found[0].confusion
        assert other.ece == pytest.approx(found[0].ece)


def test_what_labels_mean_is_said(samples, model, tmp_path):
    found = evaluate(model, write_folder(tmp_path / "named", samples, NAMES))
    assert found.class_order == "labels are matched to the model's classes by name"
    two = [sample for sample in samples if sample[2] != 1]
    found = evaluate(model, write_parquet(tmp_path / "a.parquet", two))
    assert found.class_order == (
        "labels are numbers without names, read as the model's class numbers (0 = left, 1 = right, 2 = top); "
        "2 of the 3 classes have images"
    )


def broken_model(folder, change) -> str:
    """A model folder with changed weights."""
    net, config = load_model(str(folder))
    with torch.no_grad():
        change(net.state_dict())
    save_model(folder.parent / "broken", net, config)
    return str(folder.parent / "broken")


def test_weights_and_logits_that_are_no_numbers_are_no_score(samples, model, tmp_path):
    data = write_parquet(tmp_path / "a.parquet", samples)
    shutil.copytree(model, tmp_path / "m")
    name = next(iter(load_model(model)[0].state_dict()))
    for value in (float("nan"), float("inf")):
        bad = broken_model(tmp_path / "m", lambda state, value=value: state[name].view(-1)[0].fill_(value))
        with pytest.raises(DataError, match=f"model '.*broken': {re.escape(name)} holds NaN or infinite values"):
            evaluate(bad, data)
    huge = broken_model(tmp_path / "m", lambda state: [v.mul_(1e30) for v in state.values() if v.is_floating_point()])
    with pytest.raises(DataError, match=r"gives NaN or infinite logits to 7 of the 7 images of .*a\.parquet: check"):
        evaluate(huge, data)


def test_folders_that_are_no_classes_are_named_not_numbered(samples, tmp_path):
    path = write_folder(tmp_path / "a", samples, NAMES)
    before = list(labeled_images(path, NAMES))
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
    assert list(labeled_images(path, NAMES)) == before
    (tmp_path / "a" / "left").rename(tmp_path / "a" / "lfet")
    with pytest.raises(DataError, match=r"a has 3 sub-folders, of which 1 name no class of the model: lfet"):
        list(labeled_images(path, NAMES))
    with pytest.raises(DataError, match=r"3 name no class of the model: lfet, right, top .* knows x, y"):
        list(labeled_images(path, ("x", "y")))


def test_files_that_cannot_be_read_are_named_before_the_training(samples, model, dataset, tmp_path):
    path = write_folder(tmp_path / "a", samples, NAMES)
    for spoil in (lambda file: file.symlink_to("nowhere"), os.mkfifo):
        bad = tmp_path / "a/top/z.png"
        spoil(bad)
        for read in (
            lambda: labeled_images(path, NAMES),
            lambda: run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "out"), test_data=path),
        ):
            with pytest.raises(DataError, match=f"^cannot read {bad}: (No such file|it is no regular file)"):
                read()
        assert not (tmp_path / "out").exists()
        bad.unlink()
    assert evaluate(model, path).images == 7


def test_labeled_files_and_folders_may_be_links_as_in_a_hubs_cache(samples, model, tmp_path):
    folder = Path(write_folder(tmp_path / "a", samples, NAMES))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert evaluate(model, str(folder)).images == 7
    write_split("validation", blobs / "7")
    (tmp_path / "v.parquet").symlink_to("blobs/7")
    assert len([*labeled_images(str(tmp_path / "v.parquet"), tuple(map(str, range(10))))]) > 7


def test_our_own_manifest_is_labeled_data_too(dataset, model):
    found = evaluate(model, dataset, teacher=ModelSettings(name=model))
    assert found.images == 48
    assert found.model_teacher_agreement == 1.0
    assert found.teacher_accuracy == found.accuracy


def test_a_teacher_of_other_classes_is_no_judge(dataset, model):
    with pytest.raises(DataError, match=f"{model} has 3 classes, the teacher 10"):
        evaluate(model, dataset, ModelSettings(name="embedded:digits"))
    with pytest.raises(DataError, match=f"{model} and the teacher have the same classes in another order"):
        evaluate(model, dataset, ModelSettings(name=model, class_names=NAMES[::-1]))
    with pytest.raises(DataError, match="in another order: 'left' is class 0 and class 1"):
        evaluate(model, dataset, ModelSettings(name=model, class_names=("bottom", "left", "middle")))
    unnamed = ModelSettings(name=model, class_names=("class 0", "class 1", "class 2"))
    assert evaluate(model, dataset, unnamed).model_teacher_agreement == 1.0


def test_images_of_unequal_size(samples, model, tmp_path):
    large = write_parquet(tmp_path / "a.parquet", [(k, resized(d, 8 + i), c) for i, (k, d, c) in enumerate(samples)])
    assert evaluate(model, large).images == 7


def resized(data, side):
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_scores_are_the_same_bits_for_any_number_of_threads(model, tmp_path):
    rng = np.random.default_rng(0)
    many = [(f"s{i}", square(i % 3, rng) if i % 7 else resized(square(i % 3, rng), 11), i % 3) for i in range(300)]
    data = write_parquet(tmp_path / "a.parquet", many)
    teacher = ModelSettings(name=model)
    assert evaluate(model, data, teacher, threads=1) == evaluate(model, data, teacher, threads=5)


def test_a_network_that_fails_is_one_line(samples, model, tmp_path):
    net, config = load_model(model)
    net.register_forward_hook(lambda *_: 1 // 0)
    data = write_folder(tmp_path / "a", samples, NAMES)
    with pytest.raises(DataError, match="^model 'digits-cnn-small' cannot take images of 1×8×8: integer division"):
        evaluate_net(net, config, data)


def test_progress_counts_every_image(samples, model, tmp_path):
    seen = []
    evaluate(model, write_folder(tmp_path / "a", samples, NAMES), on_progress=lambda *args: seen.append(args))
    assert seen[-1] == (7, 7, "images")


def test_black_boxes_are_scored_too(samples, model, tmp_path):
    data = write_folder(tmp_path / "a", samples, NAMES)

    def scored(name, size, channels, names):
        spec = {"size": size, "channels": channels, "mean": [0] * channels, "std": [1] * channels}
        box = {"name": name, "num_classes": len(names), "class_names": names, "input": spec}
        (tmp_path / "t.yaml").write_text(json.dumps(box))
        return evaluate(str(tmp_path / "t.yaml"), data)

    assert scored("tests.models.nets:opinions", 8, 3, (*NAMES, "a", "b")).images == 7
    pytest.importorskip("onnxruntime")
    exported = export_onnx(model, str(tmp_path / "m.onnx"))
    assert scored(exported.file, 8, 1, NAMES).confusion == evaluate(model, data).confusion


def test_metrics_by_hand():
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    teacher = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]])
    found = scores(logits, torch.tensor([0, 1, 0, 0]), ("a", "b", "c"), teacher, "by name", DataIdentity("x", "0" * 64))
    assert found.accuracy == 0.75
    assert found.per_class == {"a": 2 / 3, "b": 1.0, "c": None}
    assert found.confusion == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found.model_teacher_agreement == 0.75
    assert found.teacher_accuracy == 0.5
    assert found.top5_accuracy is None
    assert found.macro_f1 == pytest.approx((2 * 2 / (2 * 2 + 0 + 1) + 2 * 1 / (2 * 1 + 1 + 0)) / 2)  # c: left out
    confidence = math.exp(2) / (math.exp(2) + 2)
    assert found.ece == pytest.approx(abs(0.75 - confidence))  # one bin holds all four


def test_top5_accuracy_by_hand():
    rising, equal = torch.arange(7.0), torch.zeros(7)
    logits, labels = torch.stack([rising, rising, rising, equal, equal]), torch.tensor([6, 2, 1, 4, 5])
    names = tuple("abcdefg")
    found = scores(logits, labels, names, None, "by name", DataIdentity("x", "0" * 64))
    assert found.top5_accuracy == 3 / 5  # ranks 1, 5, 6; of equals the first five
    assert found.accuracy == 1 / 5
    # class a: predicted twice, never a label: 0; g: one right, two wrong predictions; c, b, e, f: never predicted
    assert found.macro_f1 == pytest.approx((2 * 1 / (2 * 1 + 2 + 0)) / 6)
    assert found.to_dict()["top5_accuracy"] == 3 / 5


def test_classes_of_one_name_are_told_apart():
    found = scores(
        torch.eye(3), torch.tensor([0, 1, 1]), ("crane", "owl", "crane"), None, "by name", DataIdentity("x", "")
    )
    assert found.per_class == {"crane (0)": 1.0, "owl": 0.5, "crane (2)": None}
    assert "teacher_accuracy" not in found.to_dict()


def test_calibration_error_by_hand():
    # confidences 0.6 (right), 0.6 (wrong) and 0.9 (right): 2/3·|0.5 − 0.6| + 1/3·|1 − 0.9|
    logits = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1]]).log()
    labels = torch.tensor([0, 1, 0])
    assert calibration_error(logits, labels) == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.1, abs=1e-6)
    points = reliability(logits, labels, bins=2)
    assert points == [(3, pytest.approx(0.7, abs=1e-6), pytest.approx(2 / 3))]
    (low, first, half), (high, second, whole) = reliability(logits, labels)
    assert (low, high, half, whole) == (2, 1, 0.5, 1.0) and (first, second) == pytest.approx((0.6, 0.9), abs=1e-6)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "sample 'a' has no label"),
        ([("a.cls", b"1")], r"holds no labeled image; left out: 1 sample without an image \(a\)"),
        ([("a.png", b"x"), ("a.cls", b"1")], "sample 'a' is no image"),
        ([("a.png", b"x"), ("a.cls", b"7")], "sample 'a' has label 7, but the model has classes 0…2"),
        ([], "holds no labeled image"),
    ],
)
def test_bad_tars(members, message, model, tmp_path):
    with pytest.raises(DataError, match=message):
        evaluate(model, write_tar(tmp_path / "a.tar", members))


def test_bad_data(samples, model, tmp_path):
    with pytest.raises(DataError, match=r"it has key, pixels, label"):
        evaluate(model, write_parquet(tmp_path / "a.parquet", samples, "pixels"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"not a readable Parquet file"):
        evaluate(model, str(tmp_path / "b.parquet"))
    (tmp_path / "c.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="damaged or no tar"):
        evaluate(model, str(tmp_path / "c.tar"))
    with pytest.raises(DataError, match="d.zip: no such file or folder"):
        evaluate(model, str(tmp_path / "d.zip"))
    with pytest.raises(DataError, match="no such file"):
        evaluate(model, str(tmp_path / "e.parquet"))


def test_embedded_teacher_on_its_validation_digits(tmp_path):
    path = write_split("validation", tmp_path / "v.parquet")
    found = evaluate(str(EMBEDDED["embedded:digits"]), str(path))
    assert found.images == len(load_split("validation")[1])
    assert found.accuracy >= 0.98


def test_digit_splits_share_nothing():
    parts = [load_split(split) for split in ("train", "validation", "test")]
    assert sum(len(labels) for _, labels in parts) == 1797
    assert len(parts[2][1]) == 899
    seen = [{image.tobytes() for image in images} for images, _ in parts]
    assert not (seen[0] & seen[2] or seen[1] & seen[2] or seen[0] & seen[1])
