"""A whole run of stage 2: what it writes, that it resumes exactly, that students do not disturb each other."""

import hashlib
import json
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, FactoryError, Interrupted, UsageError
from manifests.storage import Storage
from stages.distill import batches, checkpoint, loop, runtime, streaming, student
from stages.distill.evaluate import DataIdentity, Scores
from stages.distill.run import DistillResult, run_distill
from stages.models.loading import load_model
from stages.models.source import config_json
from stages.settings import ModelSettings
from tests.distill.drawn import SIDE, TEACHER, teacher_files, write_dataset
from tests.distill.short import REGION, TWO, settings, weights

SCORE = Scores(
    class_order="by name", data=DataIdentity("x", "0" * 64), images=48, accuracy=0.5, ece=0.1, per_class={},
    confusion=[], model_teacher_agreement=1.0, teacher_accuracy=1.0,
)  # fmt: skip


def test_a_run_writes_a_student_that_loads(dataset, tmp_path):
    events, steps = [], []
    results = run_distill(
        settings(), [(dataset, 1.0)], str(tmp_path), test_data=dataset,
        on_event=lambda kind, **fields: events.append((kind, fields)),
        progress=lambda done, total, note: steps.append((done, total)),
    )  # fmt: skip
    found = results.students["digits-cnn-small"]
    assert results.images + results.val_images == 48
    assert found.test.images == 48
    assert results.teacher_accuracy == found.test.teacher_accuracy
    stored = load_checked((tmp_path / "results.json").read_bytes())
    assert stored == json.loads(json.dumps(results.to_dict()))
    assert DistillResult.from_dict(stored) == results
    net, config = load_model(tmp_path / "digits-cnn-small")
    assert config.class_names == ("left", "right", "top")
    assert sum(p.numel() for p in net.parameters()) == found.parameters
    lines = [json.loads(line) for line in (tmp_path / "digits-cnn-small" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"kd", "lr", "val_agreement", "val_accuracy", "seconds", "data_wait"} <= set(lines[0])
    card = (tmp_path / "digits-cnn-small" / "README.md").read_text()
    assert "fingerprint print-0" in card
    assert "accuracy" in card
    assert steps[-1] == (15, 15)
    assert [kind for kind, _ in events].count("teacher_checked") == 1


@pytest.mark.parametrize("extra", [{}, REGION], ids=["kd", "region"])
def test_students_in_one_pass_equal_their_solo_runs(dataset, tmp_path, extra):
    run_distill(settings(**TWO, **extra), [(dataset, 1.0)], str(tmp_path / "both"))
    for name in TWO["students"]:
        run_distill(settings(students=[name], **extra), [(dataset, 1.0)], str(tmp_path / name))
        assert weights(tmp_path / "both", name) == weights(tmp_path / name, name)


def test_streaming_equals_the_cache(dataset, tmp_path):
    for memory in (0.0, 1.0):
        run_distill(settings(memory_gb=memory, **REGION), [(dataset, 1.0)], str(tmp_path / str(memory)))
    assert weights(tmp_path / "0.0") == weights(tmp_path / "1.0")


def diverging(monkeypatch, *names):
    """From step 4 on, the loss of the students ``names`` is NaN."""
    original = student.student_terms

    def terms(net, *args):
        found = original(net, *args)
        counts[net] = counts.get(net, 0) + 1
        spoilt = type(net).__name__ in names and counts[net] > 4
        return {name: value * float("nan") if spoilt else value for name, value in found.items()}

    counts: dict = {}
    monkeypatch.setattr(student, "student_terms", terms)


def test_few_large_images_are_looked_at_at_once(dataset, tmp_path, monkeypatch):
    asked = settings(teacher_cache={"enabled": True}, augment={"num_views": 2, "cutmix": 0, "mixup": 0})
    taken, take = [], batches.Pixels.take
    monkeypatch.setattr(batches.Pixels, "take", lambda self, rows: (taken.append(len(rows)), take(self, rows))[1])
    for out, at_once, most in (("all", streaming.AT_ONCE, 48), ("few", 5 * SIDE * SIDE * 3, asked.batch_size)):
        monkeypatch.setattr(streaming, "AT_ONCE", at_once)
        run_distill(asked, [(dataset, 1.0)], str(tmp_path / out))
        assert max(taken) == most
        taken.clear()
    assert weights(tmp_path / "all") == weights(tmp_path / "few")


def test_a_diverged_student_is_parked_and_the_others_go_on(dataset, tmp_path, monkeypatch):
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "solo"))
    diverging(monkeypatch, "ResNetCifar")
    events = []
    both = settings(**TWO)
    results = run_distill(
        both, [(dataset, 1.0)], str(tmp_path / "both"), on_event=lambda kind, **fields: events.append(kind)
    )
    assert list(results.students) == ["digits-cnn-small"]
    assert "nan at step 4" in results.parked["resnet8"]
    assert events.count("student_parked") == 1
    assert weights(tmp_path / "both") == weights(tmp_path / "solo")
    assert not (tmp_path / "both" / "resnet8" / "model.safetensors").exists()


def test_no_student_left_is_an_error(dataset, tmp_path, monkeypatch):
    diverging(monkeypatch, "DigitsCNN")
    for _ in range(2):  # the same command again says the same
        with pytest.raises(FactoryError, match="no student is left: digits-cnn-small: loss is nan"):
            run_distill(settings(checkpoint_seconds=0), [(dataset, 1.0)], str(tmp_path))


@pytest.mark.parametrize("stop", [6, 0])  # inside the second epoch, never
def test_best_weights_are_those_of_the_best_epoch_also_of_an_earlier_part(dataset, tmp_path, monkeypatch, stop):
    """Redone epochs may end otherwise, on a GPU or with other workers: what was best is part of the checkpoint."""
    scores = iter((0.5, 0.4, 0.3))
    seen = []

    def scored(run, student):
        seen.append({name: value.clone() for name, value in student.result.state_dict().items()})
        return {"val_agreement": next(scores), "val_accuracy": 0.0}

    monkeypatch.setattr(loop, "validate", scored)
    asked, steps = settings(select="best", checkpoint_seconds=1e9), iter(range(1, 100))
    if stop:
        with pytest.raises(Interrupted):
            run_distill(asked, [(dataset, 1.0)], str(tmp_path), should_stop=lambda: next(steps) == stop)
    results = run_distill(asked, [(dataset, 1.0)], str(tmp_path))
    saved = safetensors.torch.load(weights(tmp_path))
    assert len(seen) == 3 and all(torch.equal(value, saved[name]) for name, value in seen[0].items())
    assert results.students["digits-cnn-small"].val_agreement == 0.5


def test_without_averaged_weights(dataset, tmp_path):
    run_distill(settings(optimizer={"ema": 0.0, "name": "adamw", "lr": 0.01}), [(dataset, 1.0)], str(tmp_path))
    state = torch.load(tmp_path / checkpoint.STATE, weights_only=True)["students"]["digits-cnn-small"]
    saved = safetensors.torch.load(weights(tmp_path))
    assert state["average"] is None
    assert all(torch.equal(saved[name], value) for name, value in state["net"].items())


def test_channels_last_learns_the_same_to_rounding(dataset, tmp_path):
    run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "plain"))
    run_distill(settings(epochs=1, channels_last=True), [(dataset, 1.0)], str(tmp_path / "last"))
    plain, last = (safetensors.torch.load(weights(tmp_path / run)) for run in ("plain", "last"))
    for name, value in plain.items():
        assert torch.allclose(value.float(), last[name].float(), rtol=1e-3, atol=1e-4), name


def test_bf16_learns_nearly_the_same_and_keeps_weights_in_fp32(dataset, tmp_path):
    asked = {"epochs": 4, "loss": {"kd": 1.0, "cam": 0.5, "gradcam": 0.5}}
    answers = []
    original = loop.teacher_targets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "teacher_targets", lambda *args: answers.append(original(*args)) or answers[-1])
        full = run_distill(settings(**asked), [(dataset, 1.0)], str(tmp_path / "full"))
        half = run_distill(settings(**asked, dtype="bf16"), [(dataset, 1.0)], str(tmp_path / "half"))
    first, other = answers[0], answers[len(answers) // 2]
    assert not torch.equal(first.logits, other.logits)  # the same batch, in less precision
    for one, two in ((first.logits, other.logits), *zip(first.gradcams, other.gradcams, strict=True)):
        assert torch.allclose(one, two.float(), rtol=0.05, atol=0.05)
    plain, mixed = (safetensors.torch.load(weights(tmp_path / run)) for run in ("full", "half"))
    assert all(value.dtype == plain[name].dtype for name, value in mixed.items())
    assert weights(tmp_path / "full") != weights(tmp_path / "half")
    ends = [run.students["digits-cnn-small"].val_agreement for run in (full, half)]
    assert abs(ends[0] - ends[1]) < 0.25


def test_bf16_warns_where_the_cpu_is_slower_at_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False}, raising=False)
    assert "fp32 is faster here" in runtime.slow_precision("bf16", cpu)
    assert runtime.slow_precision("fp32", cpu) == runtime.slow_precision("bf16", gpu) == ""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert runtime.slow_precision("bf16", cpu) == ""
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert runtime.slow_precision("bf16", cpu) == ""  # not known, nothing said


def test_a_compiled_student_is_saved_under_plain_names(dataset, tmp_path, monkeypatch):
    compiled = []
    original = torch.compile  # without the minutes that a real backend takes
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or original(net, backend="eager"))
    run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "plain"))
    run_distill(settings(epochs=1, compile=True), [(dataset, 1.0)], str(tmp_path / "compiled"))
    assert len(compiled) == 1
    assert weights(tmp_path / "plain") == weights(tmp_path / "compiled")
    with pytest.raises(ValueError, match="compile excludes"):
        settings(compile=True, loss={"cam": 1.0})


def test_clipping_bounds_the_step_and_notices_infinite_gradients(dataset, tmp_path, monkeypatch):
    norms = []
    original = student.nn.utils.clip_grad_norm_

    def clip(parameters, most):
        parameters = list(parameters)
        original(parameters, most)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return torch.tensor(float("inf") if len(norms) == 3 else 1.0)

    monkeypatch.setattr(student.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(FactoryError, match="gradients are not finite at step 2"):
        run_distill(settings(optimizer={"clip": 0.01}), [(dataset, 1.0)], str(tmp_path))
    assert max(norms) <= 0.0101


def test_the_test_data_is_looked_at_once_unless_asked(dataset, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "stages.distill.loop.evaluate_net",
        lambda *a: seen.append(a) or SCORE,
    )
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "once"), test_data=dataset)
    assert len(seen) == 1
    run_distill(settings(eval_every=1), [(dataset, 1.0)], str(tmp_path / "often"), test_data=dataset)
    assert len(seen) == 1 + 3 + 1


def test_a_student_without_a_score_is_kept(dataset, tmp_path, monkeypatch):
    def refuse(net, config, data, teacher):
        raise DataError("NaN or infinite logits to 48 of the 48 images")

    warnings = []
    monkeypatch.setattr("stages.distill.loop.evaluate_net", refuse)
    results = run_distill(
        settings(eval_every=1), [(dataset, 1.0)], str(tmp_path), test_data=dataset,
        on_event=lambda kind, **fields: warnings.append(fields["message"]) if kind == "warning" else None,
    )  # fmt: skip
    expected = "digits-cnn-small has no score on the test data: NaN or infinite logits to 48 of the 48 images"
    assert [line for line in warnings if "score" in line] == [expected] * (3 + 1)
    assert results.students["digits-cnn-small"].test is None
    assert results.teacher_accuracy is None and "teacher_accuracy" not in results.to_dict()
    assert load_model(tmp_path / "digits-cnn-small")


def changed_student(values, **changes):
    """Results with other facts of their only student."""
    ((name, facts),) = values["students"].items()
    return values | {"students": {name: facts | changes}}


class TestScores:
    """A measured test score stays until another is measured, or the weights change."""

    def again(self, dataset, out, said=None, **changes):
        def tell(kind, **fields):
            if said is not None and kind in ("note", "warning"):
                said.append(fields["message"])

        test_data = changes.pop("test_data", None)
        return run_distill(settings(**changes), [(dataset, 1.0)], str(out), test_data=test_data, on_event=tell)

    @pytest.mark.parametrize("changes", [TWO, {"select": "best"}], ids=["two", "best"])
    def test_a_command_without_test_data_keeps_it(self, dataset, tmp_path, changes):
        said = []
        first = self.again(dataset, tmp_path, test_data=dataset, **changes)
        second = self.again(dataset, tmp_path, said, **changes)
        for name, facts in first.students.items():
            test = facts.test
            assert second.students[name].test == test and test.data.path == dataset
            assert facts.weights_sha256 == hashlib.sha256(weights(tmp_path, name)).hexdigest()
            card = (tmp_path / name / "README.md").read_text()
            assert f"accuracy {test.accuracy:.1%}, " in card and test.data.sha256 in card
            line = f"{name}: its test score was measured before and is kept: {test.accuracy:.1%} on 48 images of "
            assert line + dataset in said
        assert second.teacher_accuracy == first.teacher_accuracy
        assert load_checked((tmp_path / "results.json").read_bytes()) == json.loads(json.dumps(second.to_dict()))

    def test_other_test_data_replaces_it(self, dataset, tmp_path):
        other = write_dataset(tmp_path / "other", count=20, seed=1)
        scores = [
            self.again(dataset, tmp_path / "out", test_data=data).students["digits-cnn-small"].test
            for data in (dataset, other, dataset, None)
        ]
        assert [score.images for score in scores] == [48, 20, 48, 48]
        assert scores[0] == scores[2] == scores[3] != scores[1]

    def test_test_data_that_give_no_score_do_not_erase_it(self, dataset, tmp_path, monkeypatch):
        first = self.again(dataset, tmp_path, test_data=dataset)

        def refuse(net, config, data, teacher):
            raise DataError("the last image is cut short")

        monkeypatch.setattr("stages.distill.loop.evaluate_net", refuse)
        second = self.again(dataset, tmp_path, test_data=dataset)
        name = "digits-cnn-small"
        assert second.students[name].test == first.students[name].test

    def test_other_weights_do_not_inherit_it(self, dataset, tmp_path):
        said = []
        self.again(dataset, tmp_path, test_data=dataset)
        (tmp_path / "checkpoint.pt").unlink()
        found = self.again(dataset, tmp_path, said, seed=5)
        assert found.students["digits-cnn-small"].test is None and found.teacher_accuracy is None
        assert any(line.startswith("digits-cnn-small: its weights changed since its test score: ") for line in said)
        assert "(read once, at the end): not given" in (tmp_path / "digits-cnn-small" / "README.md").read_text()

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda values: b"{",
            lambda values: json.dumps(values | {"checksum": "0" * 64}).encode(),
            lambda values: dump_checked(values | {"students": []}),
            lambda values: dump_checked(values | {"students": {"a": {"weights_sha256": "x", "test": None}}}),
            lambda values: dump_checked(changed_student(values, weights_sha256="x")),
            lambda values: dump_checked(changed_student(values, test=asdict(SCORE) | {"accuracy": "99"})),
            lambda values: dump_checked(changed_student(values, test=asdict(SCORE) | {"images": -1})),
            lambda values: dump_checked(changed_student(values, test=asdict(SCORE) | {"data": {"path": "x"}})),
            lambda values: dump_checked(changed_student(values, test=asdict(SCORE) | {"teacher_accuracy": None})),
            lambda values: dump_checked(
                changed_student(
                    values, test=asdict(SCORE) | dict.fromkeys(("model_teacher_agreement", "teacher_accuracy"))
                )
            ),
        ],
    )
    def test_damaged_results_are_refused_until_measured_again(self, dataset, tmp_path, spoil):
        self.again(dataset, tmp_path, epochs=1, test_data=dataset)
        file = tmp_path / "results.json"
        file.write_bytes(spoil(load_checked(file.read_bytes())))
        before = file.read_bytes()
        with pytest.raises(
            DataError, match=r"results\.json is damaged .* again with --test-data, or delete it"
        ) as error:
            self.again(dataset, tmp_path, epochs=1)
        assert "\n" not in str(error.value) and file.read_bytes() == before
        assert self.again(dataset, tmp_path, epochs=1, test_data=dataset).teacher_accuracy >= 0


class TestTeacher:
    def test_the_copy_is_checked_before_it_is_used(self, tmp_path):
        path = write_dataset(tmp_path / "d")
        copy = tmp_path / "d" / "teacher" / "model.safetensors"
        data = bytearray(copy.read_bytes())
        data[-1] ^= 1
        copy.write_bytes(data)
        with pytest.raises(DataError, match="was altered: sha256 .* expected"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))
        assert not (tmp_path / "out" / "run.json").exists()

    def test_an_external_teacher_is_asked_for(self, tmp_path):
        path = write_dataset(
            tmp_path / "d", teacher={"kind": "external", "architecture": "mine:net", "sha256": "ab" * 32}
        )
        with pytest.raises(DataError, match=f"does not carry its teacher, its sha256 is {'ab' * 32}: name the teacher"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))

    def test_another_teacher_only_on_request(self, dataset, tmp_path):
        named = tmp_path / "mine"
        named.mkdir()
        files = teacher_files()
        state = safetensors.torch.load(files["model.safetensors"])
        state["classifier.bias"] += 1
        files["model.safetensors"] = safetensors.torch.save(state)
        files["config.json"] = config_json(TEACHER, files["model.safetensors"])
        for name, data in files.items():
            (named / name).write_bytes(data)
        mine = ModelSettings(name=str(named))
        with pytest.raises(DataError, match="was made for a teacher with sha256"):
            run_distill(settings(), [(dataset, 1.0)], str(tmp_path / "out"), teacher=mine)
        run_distill(settings(allow_other_teacher=True), [(dataset, 1.0)], str(tmp_path / "out"), teacher=mine)

    def test_class_count_must_match(self, dataset, tmp_path):
        with pytest.raises(DataError, match="has 3 classes, the teacher 10"):
            run_distill(
                settings(allow_other_teacher=True), [(dataset, 1.0)], str(tmp_path / "out"), teacher=ModelSettings()
            )

    def test_a_teacher_that_disagrees_is_warned_about(self, dataset, tmp_path):
        events = []
        note = lambda kind, **fields: events.append((kind, fields))  # noqa: E731
        run_distill(settings(min_agreement=1.0), [(dataset, 1.0)], str(tmp_path), on_event=note)
        assert any(kind == "warning" and "(below 100%): " in fields["message"] for kind, fields in events)


def test_an_altered_image_is_named(tmp_path):
    path = write_dataset(tmp_path / "d", shards=1)
    (tar,) = (tmp_path / "d" / "shards").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first image
    tar.write_bytes(data)
    with pytest.raises(DataError, match="sample '000000-000000' was altered"):
        run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))


def test_bad_images_are_left_out_on_request(tmp_path):
    path = write_dataset(tmp_path / "d")
    first, second = sorted((tmp_path / "d" / "shards").glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[600] ^= 1
    first.write_bytes(data)
    second.unlink()
    with pytest.raises(DataError, match="missing tar of shard 1"):
        run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))
    events = []
    results = run_distill(
        settings(skip_bad=True), [(path, 1.0)], str(tmp_path / "out"),
        on_event=lambda kind, **fields: events.append((kind, fields.get("message", ""))),
    )  # fmt: skip
    assert results.images + results.val_images == 23
    assert any("25 images are left out; the first: " in text and "'000000-000000'" in text for _, text in events)
    data[600] ^= 1
    first.write_bytes(data)  # other rows than the checkpoint's
    with pytest.raises(DataError, match="manifests"):
        run_distill(settings(skip_bad=True), [(path, 1.0)], str(tmp_path / "out"))


def test_settings_that_do_nothing_are_told_and_refused_where_nothing_trains(dataset, tmp_path):
    said = []
    asked = settings(epochs=1, eval_every=1, loss={"kd": 1.0, "variants_ce": 1.0})
    run_distill(asked, [(dataset, 1.0)], str(tmp_path), on_event=lambda kind, **f: said.append(f.get("message", "")))
    assert any("loss.variants_ce does nothing: no image" in line for line in said)
    assert any("eval_every does nothing without --test-data" in line for line in said)
    with pytest.raises(UsageError, match=r"nothing to learn from: loss.variants_ce does nothing: .*; set loss.kd"):
        run_distill(settings(loss={"kd": 0.0, "variants_ce": 1.0}), [(dataset, 1.0)], str(tmp_path / "out"))


def test_weights_spoilt_by_the_last_step_are_noticed(dataset, tmp_path, monkeypatch):
    original = student.Student.learn

    def learn(self, x, batch, targets, step, total):
        original(self, x, batch, targets, step, total)
        if self.name == "resnet8" and step == total - 1:
            with torch.no_grad():
                self.net.linear.weight[0, 0] = float("inf")

    monkeypatch.setattr(student.Student, "learn", learn)
    results = run_distill(settings(**TWO), [(dataset, 1.0)], str(tmp_path))
    assert results.parked == {"resnet8": "weights are not finite at the end of epoch 3"}


def test_runs_write_to_any_storage(dataset):
    out = Storage("memory://distill-run")
    run_distill(settings(epochs=1), [(dataset, 1.0)], out)
    assert out.exists("digits-cnn-small/model.safetensors")


def test_steps_end_a_training_within_an_epoch(dataset, tmp_path):
    """48 images in batches of 8: 6 steps an epoch; the rate decays over the 8 that are asked for."""
    chosen = settings(steps=8, batch_size=8, val_fraction=0.0)
    result = run_distill(chosen, [(dataset, 1.0)], str(tmp_path / "out"))
    lines = (tmp_path / "out" / next(iter(result.students)) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 8]
    assert json.loads(lines[-1])["lr"] < json.loads(lines[0])["lr"]
