"""The teacher cache: the right answers, refused where they belong to something else."""

import pytest
import torch

from manifests.errors import DataError, Interrupted
from stages.distill import loop
from stages.distill.run import run_distill
from stages.distill.teacher_cache import from_top, to_top
from stages.settings import DistillSettings
from tests.distill.drawn import write_dataset

SMALL = {
    "epochs": 4,
    "batch_size": 8,
    "val_fraction": 0.2,
    "optimizer": {"lr": 0.05},
    "augment": {"cutmix": 0, "mixup": 0, "flip": True, "num_views": 2},
    "teacher_cache": {"enabled": True},
}


def settings(**changes) -> DistillSettings:
    return DistillSettings.model_validate(SMALL | changes)


def test_top_by_hand():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    values, classes = to_top(logits, 2)
    assert classes.tolist() == [[1, 3]]
    rest = ((torch.tensor(1.0).exp() + torch.tensor(2.0).exp()) / 2).log().item()
    assert values[0].tolist() == pytest.approx([4, 3, rest])
    full = from_top(values, classes, 4)
    assert full[0].tolist() == pytest.approx([rest, 4, rest, 3])
    assert full.softmax(1)[0, [1, 3]].tolist() == pytest.approx(logits.softmax(1)[0, [1, 3]].tolist())


@pytest.mark.parametrize("top", [None, 1])
def test_cached_answers_are_the_teachers(dataset, tmp_path, monkeypatch, top):
    computed, seen = loop.TeacherCache.targets, []

    def compare(self, batch):
        found = computed(self, batch).logits
        wanted = teachers[0].logits(batch.x)
        if top:  # what is kept of 3 classes: the best one, and the mean of the others
            found, wanted = found.softmax(1).max(1).values, wanted.softmax(1).max(1).values
        seen.append((found - wanted).abs().max().item())
        return computed(self, batch)

    teachers = []
    original = loop.train
    monkeypatch.setattr("stages.distill.run.train", lambda run: (teachers.append(run.teacher), original(run)))
    monkeypatch.setattr(loop.TeacherCache, "targets", compare)
    run_distill(settings(teacher_cache={"enabled": True, "top_k": top}), [(dataset, 1.0)], str(tmp_path))
    assert len(seen) == 4 * 5
    assert max(seen) < 2e-3


def test_a_shared_cache_gives_the_same_weights_and_refuses_others(dataset, tmp_path, monkeypatch):
    shared = {"enabled": True, "folder": str(tmp_path / "shared")}
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "own"))
    run_distill(settings(teacher_cache=shared), [(dataset, 1.0)], str(tmp_path / "one"))
    monkeypatch.setattr("stages.distill.teacher_cache._computed", None)  # from here on it is only read
    run_distill(settings(teacher_cache=shared), [(dataset, 1.0)], str(tmp_path / "two"))
    weights = {(tmp_path / run / "digits-cnn-small/model.safetensors").read_bytes() for run in ("own", "one", "two")}
    assert len(weights) == 1
    for changes, word in (
        ({"seed": 5}, r"augmentation\.seed: 0 -> 5"),
        ({"augment": SMALL["augment"] | {"crop": 0.3}}, r"augmentation\.crop"),
        ({"where": "label < 2"}, "selected"),
    ):
        with pytest.raises(DataError, match=f"answers to something else: .*{word}"):
            run_distill(settings(teacher_cache=shared, **changes), [(dataset, 1.0)], str(tmp_path / "three"))
    other = write_dataset(tmp_path / "d", seed=4)
    with pytest.raises(DataError, match="manifests"):
        run_distill(settings(teacher_cache=shared), [(other, 1.0)], str(tmp_path / "four"))
    path = tmp_path / "shared" / "logits.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="logits.safetensors is damaged"):
        run_distill(settings(teacher_cache=shared), [(dataset, 1.0)], str(tmp_path / "two"))


def test_interrupted_while_it_is_computed(dataset, tmp_path):
    with pytest.raises(Interrupted, match="before training"):
        run_distill(settings(), [(dataset, 1.0)], str(tmp_path), should_stop=lambda: True)
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path))


def test_refused_where_no_view_recurs():
    for changes, words in (
        ({"loss": {"gradcam": 1.0}}, "loss.gradcam 0"),
        ({"augment": {"num_views": 2, "mixup": 0}}, "augment.cutmix 0"),
        ({"augment": {"cutmix": 0, "mixup": 0}}, "needs augment.num_views"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(**changes)
