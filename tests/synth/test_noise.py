"""The load test's worker: complete rows, images that depend on seed and group alone."""

import io

import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifests.shard import done_records
from manifests.storage import Storage
from manifests.tars import walk
from stages.synth.noise import NoiseWorker


def make(folder, shards, **settings):
    small = {"method": "noise", "groups_per_shard": 2, "group_size": 3, **settings}
    worker = NoiseWorker(small, str(folder), "f" * 64)
    return Storage(folder), [worker.run(shard) for shard in shards]


def samples(storage, shard):
    record = done_records(storage)[shard]
    with storage.open(record.tar) as file:
        return [sample.image for sample in walk(file)]


def test_report_and_images(tmp_path):
    storage, [report, again] = make(tmp_path, [4, 4])
    assert (report["shard"], report["rows"], report["kept"]) == (4, 6, 6)
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    images = samples(storage, 4)
    assert len(set(images)) == 6
    assert Image.open(io.BytesIO(images[0])).size == (32, 32)


def test_shards_differ_by_number_and_seed_only(tmp_path):
    first, _ = make(tmp_path / "a", [0, 1])
    same, _ = make(tmp_path / "b", [1])
    other, _ = make(tmp_path / "c", [1], seed=1)
    assert samples(first, 1) == samples(same, 1)
    assert not set(samples(first, 0)) & set(samples(first, 1))
    assert not set(samples(other, 1)) & set(samples(first, 1))


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_formats_and_size(tmp_path, kind, magic):
    storage, _ = make(tmp_path, [0], images={"format": kind, "size": 8})
    image = samples(storage, 0)[0]
    assert image.startswith(magic)
    assert Image.open(io.BytesIO(image)).size == (8, 8)


def test_labels_are_classes_of_the_teacher(tmp_path):
    seen = {"size": 8, "channels": 1, "mean": [0], "std": [1]}
    three = {"name": "digits-cnn-small", "weights": "w.safetensors", "num_classes": 3, "input": seen}
    storage, _ = make(tmp_path, [0], teacher=three, group_size=4)
    rows = pq.read_table(storage.path(done_records(storage)[0].table)).to_pylist()
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 0, 1]
