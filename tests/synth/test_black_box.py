"""A teacher that only answers: it scores what the prior made, shows no features, and cannot guide."""

import pyarrow.parquet as pq
import pytest

from manifests.errors import UsageError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.settings import SynthSettings
from stages.synth.worker import ShardWorker

TEACHER = {
    "name": "tests.models.nets:scores",
    "num_classes": 5,
    "input": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
}


def settings(prior_folder, method):
    given = {
        "prior": {"path": str(prior_folder), "steps": 2, "cfg_scale": 1.0},
        "groups_per_shard": 1,
        "group_size": 10,
    }
    more = {"teacher": TEACHER, "method": method, "device": "cpu"}
    return SynthSettings.model_validate(given | more).model_dump(mode="json")


def test_a_black_box_scores_without_cosines(prior_folder, tmp_path):
    ShardWorker(settings(prior_folder, "dmkd"), str(tmp_path), "f" * 64).run(0)
    rows = pq.read_table(tmp_path / done_records(Storage(str(tmp_path)))[0].table).to_pylist()
    assert len(rows) == 10
    for row in rows:
        assert (row["cosine"], row["cosine_ref"], row["cosine_space"]) == (None, None, None)
        assert 0 < row["confidence"] <= 1 and row["teacher_label"] in range(5)


def test_a_black_box_does_not_guide(prior_folder, tmp_path):
    with pytest.raises(UsageError, match="cannot guide: use --method dmkd"):
        ShardWorker(settings(prior_folder, "diffdfkd"), str(tmp_path), "f" * 64)
