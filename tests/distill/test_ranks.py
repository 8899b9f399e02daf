"""Several processes train as one: the same images in the same order, the same weights to rounding or better."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import FactoryError, UsageError
from manifests.reader import Manifest
from stages.distill.batches import Batches, Pixels, batch_bounds, check_parts
from stages.distill.rows import EpochOrder, select_rows
from stages.distill.run import run_distill
from stages.distill.runtime import ALONE, Ranks
from tests.distill.drawn import write_dataset
from tests.distill.pair import Pair, alone, distill
from tests.distill.short import TWO, settings, weights

GROUP = "resnet8-gn"
EVERY = {
    "students": [GROUP],
    "batch_size": 7,
    "loss": {"kd": 1, "ce": 0.5, "variants_ce": 0.5, "cam": 1, "gradcam": 1},
    "optimizer": {"lr": 0.05, "clip": 1.0},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def derived(tmp_path_factory) -> str:
    """A dataset with images made from others, few and unevenly spread."""
    folder = tmp_path_factory.mktemp("derived") / "d"
    return write_dataset(folder, source_key=lambda i: f"000000-{i - 1:06d}" if i % 5 == 1 else None)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def joined(found):
    """The rows of each step, laid end to end over the ranks."""
    return [(step, [row for part in parts for row in part]) for step, parts in _by_step(found)]


def _by_step(found):
    for steps in zip(*(each["rows"] for each in found), strict=True):
        assert len({step for step, _ in steps}) == 1
        yield steps[0][0], [rows for _, rows in steps]


@given(st.integers(0, 1000), st.integers(1, 40))
def test_parts_cover_everything_once_in_order_and_evenly(count, size):
    parts = [list(range(count))[Ranks(rank, size).part(count)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(2, 3000), st.integers(2, 300))
def test_batches_use_every_image_and_differ_by_one(length, batch_size):
    sizes = np.diff(batch_bounds(length, batch_size))
    assert sizes.sum() == length
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 2


def test_batches_too_small_to_share_are_refused():
    check_parts(40, 8, 4)
    with pytest.raises(UsageError, match=r"batches of 8 images \(of 40 in all\) cannot be shared by 5 workers"):
        check_parts(40, 8, 5)
    check_parts(3, 2, 1)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_parts_of_a_batch_laid_end_to_end_are_the_batch(derived, size, memory):
    """Mixed views included: a view's partner may lie in another process's part."""
    asked, cpu = settings(batch_size=7), torch.device("cpu")
    rows = select_rows([(Manifest.open(derived), 1.0)], asked)
    order, pixels = EpochOrder(rows, np.arange(len(rows)), asked), Pixels(rows, memory, cpu)
    whole = Batches(rows, order, pixels, asked, cpu)
    parts = [Batches(rows, order, pixels, asked, cpu, Ranks(rank, size)) for rank in range(size)]
    for step in range(2 * whole.steps):
        one, shared = whole.make(step), [part.make(step) for part in parts]
        for name in ("x", "labels", "partner_labels", "lam", "derived"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(part, name) for part in shared])), name
        for name in ("rows", "turns"):
            assert np.array_equal(getattr(one, name), np.concatenate([getattr(part, name) for part in shared]))
        assert {(part.count, part.derived_count) for part in shared} == {(one.count, int(one.derived.sum()))}
        assert sum(part.share for part in shared) == pytest.approx(1)


def test_group_norm_two_equal_one_to_rounding_with_every_loss_term(pair, derived, tmp_path):
    one = alone(settings(**EVERY), derived, str(tmp_path / "one"))
    two = pair(distill, settings(**EVERY), derived, str(tmp_path / "two"))
    assert joined(two) == one["rows"]
    assert any(len(rows) % 2 for _, rows in one["rows"])  # parts of unequal size
    assert two[0]["weights"] == two[1]["weights"]
    found, wanted = (safetensors.torch.load(weights(tmp_path / name, GROUP)) for name in ("two", "one"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for line, alike in zip(lines(tmp_path / "two", GROUP), lines(tmp_path / "one", GROUP), strict=True):
        for name in ("loss", "kd", "ce", "variants_ce", "cam", "gradcam"):
            assert line[name] == pytest.approx(alike[name], rel=1e-4), name
        assert (line["val_agreement"], line["val_accuracy"]) == (alike["val_agreement"], alike["val_accuracy"])


def test_batch_norm_two_match_one_by_accuracy(pair, dataset, tmp_path):
    asked = settings(students=["resnet8"], epochs=8, loss={"kd": 0, "ce": 1}, augment={"cutmix": 0, "mixup": 0})
    one = alone(asked, dataset, str(tmp_path / "one"), dataset)["results"].students["resnet8"].test.accuracy
    found = pair(distill, asked, dataset, str(tmp_path / "two"), dataset)
    two = found[0]["results"].students["resnet8"].test.accuracy
    assert found[0]["weights"] == found[1]["weights"]  # running statistics included
    assert min(one, two) > 0.9, (one, two)


def test_stopped_together_two_resume_to_the_same_bits(pair, dataset, tmp_path):
    asked = settings(**TWO, checkpoint_seconds=1e9)
    whole = pair(distill, asked, dataset, str(tmp_path / "whole"))
    steps = []
    for stop in (2, 5):  # inside an epoch, over its end
        parts = pair(distill, asked, dataset, str(tmp_path / "parts"), None, stop)
        assert [part["error"] for part in parts] == ["Interrupted", "Interrupted"]
        steps += joined(parts)
    parts = pair(distill, asked, dataset, str(tmp_path / "parts"))
    assert steps + joined(parts) == joined(whole)
    assert parts[0]["weights"] == parts[1]["weights"] == whole[0]["weights"]
    for name in TWO["students"]:
        assert weights(tmp_path / "parts", name) == weights(tmp_path / "whole", name)


@pytest.mark.parametrize("first", [1, 2])
def test_resumed_with_another_number_no_sample_is_lost_or_repeated(pair, dataset, tmp_path, first):
    asked, where = settings(students=[GROUP]), str(tmp_path / "parts")
    one = alone(asked, dataset, str(tmp_path / "one"))
    if first == 1:
        begun, ended = [alone(asked, dataset, where, stop=7)], pair(distill, asked, dataset, where)
    else:
        begun, ended = pair(distill, asked, dataset, where, None, 7), [alone(asked, dataset, where)]
    assert {each["error"] for each in begun} == {"Interrupted"}
    assert joined(begun) + joined(ended) == one["rows"]
    found, wanted = (safetensors.torch.load(weights(tmp_path / name, GROUP)) for name in ("parts", "one"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_students_in_one_pass_equal_their_solo_runs(pair, dataset, tmp_path):
    both = pair(distill, settings(**TWO), dataset, str(tmp_path / "both"))
    for name in TWO["students"]:
        solo = pair(distill, settings(students=[name]), dataset, str(tmp_path / name))
        assert solo[0]["weights"][name] == both[0]["weights"][name]


def spoil_weights(student, step):
    if student.name == "resnet8" and step == 4:
        torch.nn.init.constant_(student.net.linear.weight, float("nan"))


def spoil_forward(student, step):
    if student.name == "resnet8" and step == 4:
        student.forward = exhausted


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")


def test_a_student_that_diverges_in_one_is_parked_in_both(pair, dataset, tmp_path):
    solo = pair(distill, settings(), dataset, str(tmp_path / "solo"))
    found = pair(distill, settings(**TWO), dataset, str(tmp_path / "both"), None, 0, spoil_weights)
    reason = "loss is nan at step 4; a smaller learning rate or optimizer.clip may help"
    for each in found:
        assert each["parked"] == {"resnet8": reason}
        assert each["weights"]["digits-cnn-small"] == solo[0]["weights"]["digits-cnn-small"]
    assert found[0]["events"].count("student_parked") == 1


def test_the_teachers_answers_are_shared_out_and_the_same_bytes(pair, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.distill.teacher_cache.CHUNK", 5)
    asked = settings(
        students=[GROUP], augment={"num_views": 2, "cutmix": 0, "mixup": 0}, teacher_cache={"enabled": True, "top_k": 2}
    )
    alone(asked, dataset, str(tmp_path / "one"))
    pair(small_chunks)
    pair(distill, asked, dataset, str(tmp_path / "two"))
    one, two = ((tmp_path / name / "teacher-cache" / "logits.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def small_chunks(ranks):
    from stages.distill import teacher_cache

    teacher_cache.CHUNK = 5


def test_words_reach_everyone_from_the_lowest_that_has_any(pair):
    assert pair(words) == [(b"\x00one", b"", None, b"zero"), (b"\x00one", b"", None, b"zero")]
    assert ALONE.share(b"x") == b"x"
    assert ALONE.any([True, False]) == [True, False]


def words(ranks):
    second = None if ranks.first else b"\x00one"
    return ranks.share(second), ranks.share(b""), ranks.share(None), ranks.share(b"zero" if ranks.first else b"one")


def test_a_lack_of_memory_ends_in_a_line_and_the_same_command_resumes(dataset, tmp_path):
    """It says nothing about a student: nobody is parked, and the weights are those of a run that had the memory."""
    whole = alone(settings(**TWO), dataset, str(tmp_path / "whole"))
    asked = settings(**TWO, checkpoint_seconds=0)
    found = alone(asked, dataset, str(tmp_path / "run"), spoil=spoil_forward)
    assert found["error"] == "FactoryError" and not found["parked"]
    line = "the training does not fit the memory (CUDA out of memory. Tried to allocate 2 GiB.): free memory and repeat"
    assert found["message"].startswith(line)
    again = alone(asked, dataset, str(tmp_path / "run"))
    assert again["events"].count("run_resumed") == 1 and not again["parked"]
    assert again["weights"] == whole["weights"]


CACHED = {"augment": {"num_views": 2, "cutmix": 0, "mixup": 0}, "teacher_cache": {"enabled": True, "top_k": 2}}


@pytest.mark.parametrize(
    ("where", "extra"),
    [
        ("loop.teacher_targets", {}),
        ("loop.validate", {}),
        ("batches.Pixels.take", {}),
        ("teacher_cache.to_top", CACHED),
        ("export.measure", {}),
        ("run.Student", {}),
    ],
)
def test_a_lack_of_memory_elsewhere_is_the_same_line(dataset, tmp_path, monkeypatch, where, extra):
    monkeypatch.setattr(f"stages.distill.{where}", exhausted)
    with pytest.raises(FactoryError, match=r"^the training does not fit the memory \(CUDA out of memory\. Tried"):
        run_distill(settings(**extra), [(dataset, 1.0)], str(tmp_path / "run"))


def test_a_checkpoint_that_does_not_fit_the_memory_is_not_called_damaged(dataset, tmp_path):
    alone(settings(), dataset, str(tmp_path / "run"))
    for name in ("torch.load", "stages.distill.student.Student.load"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, exhausted)
            assert "does not fit the memory" in alone(settings(), dataset, str(tmp_path / "run"))["message"]
