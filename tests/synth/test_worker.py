"""The worker on a tiny prior: rows agree with the pixels, equal plans give equal bytes."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image

import stages.progress
from manifests.errors import DataError, UsageError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import done_records
from manifests.storage import Storage
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher, save_model
from stages.models.source import resolve
from stages.settings import SynthSettings
from stages.synth.inputs import inspect_inputs, pinned_models, semantics
from stages.synth.scores import rescored, teacher_columns
from stages.synth.worker import ShardWorker, load_models
from tests.manifests.samples import INFO
from tests.synth.tiny import save_ddpm


def settings(prior_folder, **kw):
    given = {
        "prior": {"path": str(prior_folder), "steps": 5, "cfg_scale": 1.0},
        "guidance": {"decoder": "full"} | kw.pop("guidance", {}),
        "lca": {"every": 2, "interval": [0, 1]},
        "images": {"intermediates": 1},
        "groups_per_shard": 2,
        "group_size": 20,
        "device": "cpu",
        "store_logits": True,
        "min_confidence": 0.1,
    }
    return SynthSettings.model_validate(given | kw).model_dump(mode="json")


@pytest.fixture(scope="module")
def made(prior_folder, tmp_path_factory):
    """One shard of diffdfkd: (storage, report, rows)."""
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    seen, patch = [], pytest.MonkeyPatch()
    patch.setattr(stages.progress, "REPORT_SECONDS", 0.0)
    report = ShardWorker(settings(prior_folder), storage.url, "f" * 64).run(3, seen.append)
    patch.undo()
    steps = [step / 12 for step in range(1, 6)]  # five of the first of two groups, and one for its images
    assert [at.share for at in seen] == pytest.approx([*steps, 0.5, *(0.5 + share for share in steps), 1.0])
    assert [(at.step, at.rows) for at in seen[:7]] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (5, 40), (1, 40)]
    assert all(0 < at.guided < 1 for at in seen if at.step not in (0, 5) and at.rows == 0)
    rows = pq.read_table(storage.path(done_records(storage)[3].table)).to_pylist()
    return storage, report, rows


def stored_images(storage, shard):
    tar = storage.path(done_records(storage)[shard].tar)
    samples = webdataset.WebDataset(tar, shardshuffle=False)
    return {s["__key__"]: np.asarray(Image.open(io.BytesIO(s["png"])).convert("RGB")) for s in samples}


def test_report_counts_what_was_done(made):
    _, report, rows = made
    assert report["rows"] == len(rows) == 2 * 20 * 2
    assert report["kept"] == sum(row["kept"] for row in rows)
    assert (report["evaluations"], report["guided_steps"]) == (2 * 5, 2 * 5)


def test_rows_tell_how_each_image_was_made(made):
    _, _, rows = made
    assert {row["group"] for row in rows} == {6, 7}
    assert sorted({row["trajectory"] for row in rows}) == list(range(120, 160))
    for row in rows:
        assert row["class_name"] and row["label"] == row["trajectory"] % 20 % 10
        assert row["timestep"] == 0 or row["step"] == 2
        group = range(row["group"] * 20, (row["group"] + 1) * 20)
        for cut in row["lca"]:
            assert cut["partner"] in group and cut["partner"] % 10 == row["trajectory"] % 10
            assert cut["lam"] == pytest.approx(1 - cut["h"] * cut["w"] / 64)
        assert (row["loss_ce"] is None) == (row["step"] == 0)


def test_teacher_columns_come_from_the_stored_pixels(made):
    storage, _, rows = made
    images, teacher = stored_images(storage, 3), load_teacher(SynthSettings().teacher, "cpu")
    pixels = torch.from_numpy(np.stack([images[row["key"]] for row in rows]))
    with torch.no_grad():
        logits, features = teacher.with_features(to_unit(pixels))
    for i, row in enumerate(rows):
        probability = logits[i].softmax(0)
        assert row["teacher_label"] == probability.argmax().item()
        assert row["confidence"] == pytest.approx(probability.max().item(), rel=1e-3)
        assert row["kept"] == (probability[row["label"]].item() >= 0.1) == (row["reject_reason"] is None)
        assert row["logits"] == pytest.approx(logits[i].tolist(), rel=2e-3, abs=2e-3)
    final = {row["trajectory"]: i for i, row in enumerate(rows) if row["timestep"] == 0}
    for i, row in enumerate(rows):
        is_final = row["timestep"] == 0
        other = teacher.class_weights[row["label"]] if is_final else features[final[row["trajectory"]]]
        assert row["cosine"] == pytest.approx(F.cosine_similarity(features[i], other, dim=0).item(), abs=1e-3)
        assert row["cosine_space"] == "teacher"


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_teacher_columns_are_of_what_a_lossy_file_holds(prior_folder, tmp_path, kind):
    storage, teacher = Storage(tmp_path), load_teacher(SynthSettings().teacher)
    given = settings(prior_folder, images={"format": kind, "intermediates": 1}, groups_per_shard=1)
    ShardWorker(given, storage.url, INFO.fingerprint).run(0)
    merge(storage, replace(INFO, image_size=16, class_names=teacher.class_names))
    manifest = Manifest.open(storage.url)
    rows, again = (table.to_pylist() for table in (manifest.file.group(0), next(rescored(manifest, teacher, 0.1))))
    for row, other in zip(rows, again, strict=True):
        assert (row["teacher_label"], row["kept"]) == (other["teacher_label"], other["kept"])
        for name in ("confidence", "entropy", "margin", "cosine", "logits"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), name


def test_equal_plans_give_equal_bytes_and_commits_are_kept(made, prior_folder, tmp_path):
    storage, _, _ = made
    other = Storage(str(tmp_path))
    worker = ShardWorker(settings(prior_folder, shards=64), other.url, "f" * 64)
    worker.run(0)
    worker.run(3)
    assert done_records(other)[3] == done_records(storage)[3]
    before = Storage(other.url).read(done_records(other)[3].tar)
    assert worker.run(3)["evaluations"] == 0  # already committed: nothing is made again
    assert other.read(done_records(other)[3].tar) == before


def test_statistics_of_earlier_groups_stay_within_their_shard(prior_folder, tmp_path, caplog):
    """Any order of shards gives the same bytes, so workers and interruptions do not matter; the first group of a shard
    is what it is without a population."""
    prior = {"path": str(prior_folder), "steps": 3, "cfg_scale": 1.0}
    given = {"prior": prior, "lca": {}, "groups_per_shard": 2, "group_size": 4, "shards": 2, "images": {}}

    def shards(name, *order, **guidance):
        storage = Storage(str(tmp_path / name))
        worker = ShardWorker(settings(prior_folder, guidance={"bn": 10.0} | guidance, **given), storage.url, "f" * 64)
        for shard in order:
            worker.run(shard)
        return {shard: stored_images(storage, shard) for shard in order}, done_records(storage)

    joint, records = shards("joint", 0, 1, bn_population=0.9)
    assert shards("backwards", 1, 0, bn_population=0.9)[1] == records
    plain, _ = shards("plain", 0, 1)
    assert "which is one: set groups_per_shard" not in caplog.text
    load_models(
        SynthSettings.model_validate(settings(prior_folder, guidance={"bn_population": 0.9}, groups_per_shard=1))
    )
    assert "which is one: set groups_per_shard" in caplog.text
    for shard in (0, 1):
        same = [np.array_equal(joint[shard][key], plain[shard][key]) for key in plain[shard]]
        assert all(same[:4]) and not any(same[4:])


def test_a_group_made_again_for_lack_of_memory_joins_the_population_once(prior_folder, tmp_path, monkeypatch):
    given = settings(
        prior_folder, guidance={"bn_population": 0.5}, lca={}, groups_per_shard=3, group_size=2, images={}, shards=1
    )
    whole, broken = (Storage(str(tmp_path / name)) for name in ("whole", "broken"))
    ShardWorker(given, whole.url, "f" * 64).run(0)
    worker, calls = ShardWorker(given, broken.url, "f" * 64), []
    samples = worker.samples

    def fails_once(group, *more):
        calls.append(group.index)
        found = samples(group, *more)
        if len(calls) == 2:
            raise MemoryError
        return found

    monkeypatch.setattr(worker, "samples", fails_once)
    monkeypatch.setattr(worker.models.__class__, "limit_batches", lambda self, limit: None)
    worker.run(0)
    assert calls == [0, 1, 1, 2] and done_records(broken) == done_records(whole)


def test_unguided_rows_have_no_losses(prior_folder, tmp_path):
    storage = Storage(str(tmp_path))
    ShardWorker(settings(prior_folder, method="dmkd", lca={}, groups_per_shard=1), storage.url, "f" * 64).run(0)
    rows = pq.read_table(storage.path(done_records(storage)[0].table)).to_pylist()
    assert all(row["loss_ce"] is None and row["lca"] == [] and row["method"] == "dmkd" for row in rows)


def test_teacher_columns_hand_computed():
    logits = torch.tensor([[np.log(3.0), 0.0], [0.0, np.log(3.0)]])
    first, second = teacher_columns(logits, [0, 0], 0.5)
    assert first["confidence"] == pytest.approx(0.75) and first["margin"] == pytest.approx(0.5)
    assert first["entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert first["kept"] and not second["kept"] and second["reject_reason"] == "teacher gives its class 0.250 < 0.5"


def test_a_device_that_cannot_compute_is_refused(prior_folder, tmp_path):
    with pytest.raises(UsageError, match="device 'foo' cannot be used"):
        ShardWorker(settings(prior_folder, device="foo"), str(tmp_path), "f" * 64)


def test_no_intermediate_may_have_the_timestep_of_final_images(prior_folder, tmp_path):
    gray = save_ddpm(tmp_path / "ddpm")  # its schedule ends at timestep 0, Stable Diffusion's at 1
    for folder, count in ((gray, 2), (prior_folder, 4)):
        ShardWorker(settings(folder, images={"intermediates": count}), str(tmp_path), "f" * 64)
    for count in (3, 4):
        with pytest.raises(UsageError, match=f"intermediates {count}: .* at timestep 0 .*; set at most 2"):
            ShardWorker(settings(gray, images={"intermediates": count}), str(tmp_path), "f" * 64)


def test_an_adversary_needs_a_weight_and_a_weight_an_adversary(prior_folder):
    with pytest.raises(ValueError, match="needs an adversary"):
        settings(prior_folder, guidance={"adversarial": 1.0})
    with pytest.raises(ValueError, match="without weight"):
        settings(prior_folder, adversary={"name": "embedded:digits"})


def test_an_adversary_steers_and_is_part_of_the_plan(prior_folder, tmp_path):
    """A student that names the same classes less surely: KL(T‖S) > 0 everywhere, so the term steers and is recorded."""
    student = tmp_path / "student"
    net = load_teacher(SynthSettings().teacher, "cpu").net
    net.classifier.weight.data *= 0.3
    net.classifier.bias.data *= 0.3  # the same class everywhere
    save_model(student, net, resolve(SynthSettings().teacher).config)
    tars, prints = [], []
    for weight, adversary in ((0.0, None), (1.0, {"name": str(student)})):
        given = settings(
            prior_folder, guidance={"adversarial": weight, "step_size": 0.5}, adversary=adversary, groups_per_shard=1
        )
        parsed = SynthSettings.model_validate(given)
        prints.append(semantics(parsed, inspect_inputs(parsed)))
        storage = Storage(str(tmp_path / str(weight)))
        ShardWorker(given, storage.url, "f" * 64).run(0)
        record = done_records(storage)[0]
        rows = pq.read_table(storage.path(record.table)).to_pylist()
        tars.append(record.tar_sha256)
    assert tars[0] != tars[1] and prints[0] != prints[1]
    assert all(row["loss_adv"] < 0 for row in rows)


def test_models_are_compared_with_the_plan(prior_folder, tmp_path):
    folder, teacher = shutil.copytree(prior_folder, tmp_path / "prior"), load_teacher(SynthSettings().teacher)
    given = settings(folder, guidance={"adversarial": 1.0}, adversary={"name": str(tmp_path / "student")})
    save_model(tmp_path / "student", teacher.net, resolve(SynthSettings().teacher).config)
    parsed = SynthSettings.model_validate(given)
    planned = pinned_models(semantics(parsed, inspect_inputs(parsed)))
    assert planned.keys() == {"prior", "teacher", "adversary"}
    ShardWorker(given, str(tmp_path), "f" * 64, planned)
    other = planned["teacher"] | {"input": None}
    for name, changed, line in (
        ("teacher", other, "its input is"),
        ("adversary", other, "its input is"),
        ("prior", "f" * 64, "its sha256 is"),
    ):
        with pytest.raises(DataError, match=f"^{name} .* on .* is not the one that the run was planned with: {line}"):
            ShardWorker(given, str(tmp_path), "f" * 64, planned | {name: changed})


def test_an_adversary_needs_gradients_and_the_classes_of_the_teacher_in_their_order(prior_folder, tmp_path):
    names = load_teacher(SynthSettings().teacher, "cpu").class_names
    code = {"num_classes": 5, "input": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}}
    for adversary, error, line in (
        ({"name": "tests.models.nets:scores"} | code, UsageError, "gives no gradient and cannot be an adversary"),
        ({"name": "tests.models.nets:tiny"} | code, DataError, "the adversary has 5 classes, the teacher 10"),
        ({"name": "embedded:digits", "class_names": names[::-1]}, DataError, "the same classes in another order"),
    ):
        given = settings(prior_folder, guidance={"adversarial": 1.0}, adversary=adversary)
        with pytest.raises(error, match=line):
            ShardWorker(given, str(tmp_path), "f" * 64)


def test_the_plan_knows_models_by_content_and_leaves_defaults_out(prior_folder, tmp_path):
    def covered(**kw):
        parsed = SynthSettings.model_validate({"prior": {"path": str(prior_folder)}} | kw)
        return semantics(parsed, inspect_inputs(parsed))

    copy = shutil.copytree(prior_folder, tmp_path / "copy")
    assert covered() == covered(prior={"path": str(copy)}) == covered(shards=9, device="cuda")
    assert covered(guidance={"step_size": 0.2})["settings"]["guidance"] == {"step_size": 0.2}
    other_input = {"size": 8, "channels": 1, "mean": [0.0], "std": [1.0]}
    assert covered(teacher={"input": other_input}) != covered()
