"""What a low agreement is put down to."""

import numpy as np
import pytest
import torch

from manifests.reader import Manifest
from stages.distill.batches import Batches, Pixels
from stages.distill.rows import EpochOrder, select_rows
from stages.distill.teacher_check import check_teacher
from stages.models.inputs import InputSpec
from stages.models.loading import dataset_teacher
from stages.settings import DistillSettings
from stages.synth.scores import stored_images
from tests.distill.drawn import NAMES, TEACHER, write_dataset


class TeacherCache:
    """A teacher that answers what it is told to: ``answers[i]`` to the i-th image of class order 0, 1, 2, 0, …"""

    class_names, num_classes, has_batchnorm = NAMES, 3, False

    def __init__(self, answers):
        self.answers = torch.tensor(answers)

    def logits(self, x):
        return torch.nn.functional.one_hot(self.answers[: len(x)], 3).float() * 100


def check(tmp_path, answers, **columns):
    return check_as(tmp_path, TeacherCache(answers), **columns)


def check_as(tmp_path, teacher, **columns):
    path = write_dataset(tmp_path / "d", count=12, shards=1, **columns)
    settings, cpu = DistillSettings(val_fraction=0), torch.device("cpu")
    rows = select_rows([(Manifest.open(path), 1.0)], settings)
    order = EpochOrder(rows, np.arange(12), settings)
    batches = Batches(rows, order, Pixels(rows, 1.0, cpu), settings, cpu)
    return check_teacher(teacher, batches, np.arange(12))


def test_classes_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherCache, "class_names", ("crane", "crane", "top"))
    assert check(tmp_path, [0, 1, 2] * 4).classes == {"crane (0)": 4, "crane (1)": 4, "top": 4}


def test_the_numbers(tmp_path):
    found = check(tmp_path, [0, 1, 2] * 3 + [0, 0, 0], teacher_label=lambda i: 0 if i < 3 else None)
    assert found.teacher_label_agreement == pytest.approx(10 / 12)
    assert found.confidence == pytest.approx(1)
    assert found.classes == {"left": 4, "right": 4, "top": 4}
    assert found.recorded_agreement == pytest.approx(1 / 3)
    assert found.commonest == ("left", 0.5)
    assert found.reordered == pytest.approx(10 / 12)
    assert found.warnings(0.8) == []


@pytest.mark.parametrize(
    ("answers", "columns", "words"),
    [
        ([1, 2, 0] * 4, {}, "classes seem to be in another order"),
        ([0, 0, 0] * 4, {}, "answers 'left' to 100.0% of the images"),
        ([0, 2, 0, 1, 0, 1] * 2, {"teacher_label": lambda i: i % 3}, "only 16.7% of its answers are those recorded"),
        ([1, 1, 1, 0, 0, 0] * 2, {"teacher_label": lambda i: 1 - i // 3 % 2}, "with too little guidance or none"),
        ([1] * 12, {"label": lambda i: 0}, "wrong weights, normalization or class order"),
        ([1, 1, 1, 0, 0, 0] * 2, {}, "wrong weights, normalization or class order, or data made without guidance"),
    ],
)
def test_likely_causes(tmp_path, answers, columns, words):
    line = check(tmp_path, answers, **columns).warnings(0.9)[0]
    assert words in line


def test_statistics_unlike_the_teachers_are_told(tmp_path):
    path = write_dataset(tmp_path / "m", count=12, shards=1)
    teacher = dataset_teacher(Manifest.open(path))
    assert check(tmp_path / "none", [0, 1, 2] * 4).bn_gap is None
    images = stored_images(Manifest.open(path), range(12))
    norms = [module for module in teacher.net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # as if it had been trained on these images
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    teacher.logits(images)
    teacher.net.eval()
    right = check_as(tmp_path / "right", teacher)
    assert right.bn_gap == pytest.approx(0, abs=0.01) and not right.warnings(0.0)
    teacher.input = InputSpec(TEACHER.input.model_copy(update={"mean": (0.9,), "std": (0.1,)}))
    wrong = check_as(tmp_path / "wrong", teacher)
    assert wrong.warnings(0.0) == [
        f"the teacher's BatchNorm gap is {wrong.bn_gap:.2f} (1 or more): wrong weights or "
        "normalization, in synthesis as well if it was given the same, or images unlike those it was trained on"
    ]


def test_classes_without_images(tmp_path):
    found = check(tmp_path, [0, 1] * 6, label=lambda i: i % 2)
    assert found.warnings(0.5) == ["no image of 1 of 3 classes: top"]
