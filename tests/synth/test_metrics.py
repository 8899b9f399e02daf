"""Dataset metrics against hand-computed values."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import DataError
from manifests.merge import merge
from manifests.reader import Manifest
from pipeline.inspect import summarize
from stages.models.loading import dataset_teacher
from stages.synth.metrics import mean_pairwise_cosine, measure, near_duplicates, vendi_score
from tests.distill.drawn import write_dataset

RIGHT_ANGLES = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
TWO_AND_ONE = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])


def test_pairwise_cosine_by_hand():
    assert mean_pairwise_cosine(RIGHT_ANGLES) == pytest.approx(0)
    assert mean_pairwise_cosine(TWO_AND_ONE) == pytest.approx(1 / 3)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [3.0, 4.0]])) == pytest.approx(0.6)
    assert mean_pairwise_cosine(TWO_AND_ONE[:1]) is None


def test_vendi_score_by_hand():
    assert vendi_score(RIGHT_ANGLES) == pytest.approx(3)
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    thirds = math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    assert vendi_score(TWO_AND_ONE) == pytest.approx(thirds)  # more rows than columns: the smaller matrix is used
    assert vendi_score(torch.cat([TWO_AND_ONE, torch.zeros(3, 2)], 1)) == pytest.approx(thirds)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_vendi_score_lies_between_one_and_the_number_of_rows(n, width, seed):
    features = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    assert 1 - 1e-9 <= vendi_score(features) <= min(n, width) + 1e-9


def test_near_duplicates_are_all_but_the_first_of_a_kind():
    assert near_duplicates(RIGHT_ANGLES, 0.9) == []
    repeated = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [9.0, 0.0], [6.0, 8.0]])
    assert near_duplicates(repeated, 0.9) == [(1, 0), (3, 0), (4, 2)]
    assert near_duplicates(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), 0.59) == [(1, 0)]
    assert near_duplicates(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), 0.61) == []


def test_measures_the_kept_images_of_each_class(tmp_path):
    manifest = Manifest.open(write_dataset(tmp_path, 24, kept=lambda i: i != 0))
    teacher = dataset_teacher(manifest)
    seen = []
    found = measure(manifest, teacher, on_images=lambda *done: seen.append(done))
    assert found["images"] == 23 and seen[-1] == (23, 23)
    assert {name: facts["images"] for name, facts in found["classes"].items()} == {"left": 7, "right": 8, "top": 8}
    assert found["bn_gap"] > 0 and len(found["published_bn"]) == 2
    assert 0 <= found["teacher_accuracy"] <= 1
    facts = found["classes"]["left"]
    assert -1 <= facts["cosine"] <= 1 <= facts["vendi"] <= 7
    assert measure(manifest, teacher, per_class=2)["images"] == 6
    assert measure(manifest, teacher, same=0.0)["near_duplicates"] == 23 - 3
    assert measure(manifest, teacher, same=1.1)["near_duplicates"] == 0


def test_classes_of_one_name_are_told_apart(tmp_path):
    manifest = Manifest.open(write_dataset(tmp_path, 24))
    merge(manifest.storage, replace(manifest.info, class_names=("crane", "crane", "top")))
    manifest = Manifest.open(tmp_path)
    found = measure(manifest, dataset_teacher(manifest), same=0.0)
    assert {name: f["images"] for name, f in found["classes"].items()} == {"crane (0)": 8, "crane (1)": 8, "top": 8}
    assert found["near_duplicates"] == 24 - 3
    assert {name: f.rows for name, f in summarize(manifest).classes.items()} == dict.fromkeys(found["classes"], 8)


def test_the_teacher_looks_once_at_each_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.synth.metrics.BATCH", 3)
    manifest = Manifest.open(write_dataset(tmp_path, 24))
    teacher, sizes = dataset_teacher(manifest), []
    teacher.net.register_forward_hook(lambda net, args, out: sizes.append(len(out)))
    found = measure(manifest, teacher)
    assert sizes == [3, 3, 2] * 3
    assert found["bn_gap"] is not None and found["near_duplicates"] is not None


def test_classes_must_fit(tmp_path):
    manifest = Manifest.open(write_dataset(tmp_path, 6))
    teacher = dataset_teacher(manifest)
    teacher.num_classes = 4
    with pytest.raises(DataError, match="has 3 classes, the teacher 4"):
        measure(manifest, teacher)
