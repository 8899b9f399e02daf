"""What ``factory inspect`` counts, and that nothing stored can steer the terminal."""

import dataclasses
import json

import pytest

from manifests.dataset import DatasetInfo
from manifests.errors import DataError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import ShardWriter
from manifests.storage import Storage
from pipeline.inspect import ClassCount, metric_lines, metrics, quantiles, samples, summarize
from tests.distill.drawn import write_dataset
from tests.pipeline.fake_worker import image, row

INFO = DatasetInfo("f" * 64, {"name": "evil \x1b[31m"}, {}, {}, 8, ("zero\x1b]0;x\x07", *map(str, range(1, 10))))


def dataset(folder, rows):
    storage = Storage(folder)
    with ShardWriter(storage, 0, INFO.fingerprint) as writer:
        for i, changes in enumerate(rows):
            writer.add(row(0, i) | changes, image(0, i))
        writer.commit()
    merge(storage, dataclasses.replace(INFO), [0])
    return Manifest.open(folder)


def test_counts_and_quantiles_by_hand(tmp_path):
    found = summarize(dataset(tmp_path, [{"cosine": c} for c in (0.0, 0.25, 0.5, 0.75, 1.0)]))
    assert (found.rows, found.kept, found.rejected) == (5, 4, {"confidence": 1})
    assert found.classes["4"] == ClassCount(rows=1, kept=0)
    assert found.scores["cosine"] == {"0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95}
    assert found.scores["entropy"] is None
    assert found.teacher_label_agreement == 0.6  # labels 0, 1 and 3 of 0…4


def test_where_narrows(tmp_path):
    manifest = dataset(tmp_path, [{"cosine": c} for c in (0.1, 0.2, 0.3)])
    assert summarize(manifest, "cosine > 0.15").rows == 2


def test_a_manifest_without_scores_or_teacher(tmp_path):
    nothing = {"cosine": None, "confidence": None, "teacher_label": None, "class_name": None}
    found = summarize(dataset(tmp_path, [nothing] * 3))
    assert found.teacher_label_agreement is None
    assert found.scores["cosine"] is None
    assert len(list(found.lines())) == 1 + 1 + 4 + 1 + 3


def test_stored_text_is_defused(tmp_path):
    found = summarize(dataset(tmp_path, [{}, {"kept": False, "reject_reason": "\x1b[2J"}]))
    text = "".join(found.lines())
    assert text.isprintable()
    assert "zero\\x1b]0;x\\x07" in text


def test_metrics_come_from_the_carried_teacher(tmp_path):
    manifest = Manifest.open(write_dataset(tmp_path, 9))
    found = dataclasses.replace(summarize(manifest), metrics=metrics(manifest, quiet=True))
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    text = list(found.lines())
    assert "9 kept images looked at" in text[-7] and "BatchNorm gap" in text[-7]
    assert "a published weight of 1" in text[-6]
    assert "feature cosine > 0.999" in text[-5]
    assert text[-1].split()[:2] == ["top", "3"]
    assert metrics(manifest, "label == 1", quiet=True)["images"] == 3


def test_metrics_without_a_carried_teacher_or_features(tmp_path):
    with pytest.raises(DataError, match="does not carry its teacher.*factory rescore --teacher"):
        metrics(dataset(tmp_path, [{}]), quiet=True)
    facts = {"cosine": None, "vendi": None, "near_duplicates": None, "images": 1}
    blind = {"images": 1, "bn_gap": None, "teacher_accuracy": 1.0, "near_duplicates": None, "classes": {"a": facts}}
    assert [line.split(":")[0] for line in metric_lines(blind)] == ["1 kept images looked at", "no diversity"]
    lone = facts | {"vendi": 1.0, "near_duplicates": 0}
    seen = blind | {"near_duplicates": 0, "near_duplicate_cosine": 0.999, "classes": {"\x1b[2J": lone}}
    assert "".join(metric_lines(seen)).isprintable()
    assert "–" in [*metric_lines(seen)][-1]


def test_samples_are_spread_over_the_run(tmp_path):
    rows = [{"label": 0, "kept": True, "reject_reason": None}] * 9
    ((name, images),) = samples(dataset(tmp_path, rows), columns=3)
    assert name.startswith("zero")
    assert images == [image(0, 0), image(0, 4), image(0, 8)]


def test_quantiles_pass_over_what_is_missing():
    assert quantiles([None, float("nan"), 2.0]) == dict.fromkeys(("0.05", "0.25", "0.5", "0.75", "0.95"), 2.0)
    assert quantiles([None]) is None
