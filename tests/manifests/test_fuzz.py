"""Mutated files through every reader: one clear line or a correct answer, never a traceback, a hang or a crash."""

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.mutations import mutated
from manifests.errors import FactoryError
from manifests.integrity import verify
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import DoneRecord, done_records
from manifests.storage import Storage
from manifests.tars import walk
from tests.manifests.samples import INFO, make_dataset


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_dataset(tmp_path_factory.mktemp("fuzz"), shards=2, rows=3)


@contextmanager
def one_line_at_most() -> Iterator[None]:
    """Passes, or fails with an error made for users."""
    reason = ""
    with suppress(FactoryError):
        try:
            yield
        except FactoryError as error:
            reason = str(error)
            raise
    assert "\n" not in reason


def use(storage: Storage) -> None:
    """Everything that a command does with a dataset."""
    manifest = Manifest.open(storage.url, skip_bad=True)
    selection = manifest.where("label >= 0 and class_name != 'x'", include_rejected=True)
    for index, image in selection.scan(on_bad=lambda *_: None):
        assert image
        assert selection.row(index)["size"] == len(image)
    selection.column("prompt")
    selection.column("logits")


@pytest.mark.parametrize("seed", range(12))
def test_mutated_manifests(victim: Storage, seed: int) -> None:
    rng = random.Random(seed)
    original = victim.read("m.parquet")
    try:
        for _ in range(12):
            victim.write("m.parquet", mutated(original, rng))
            with one_line_at_most():
                use(victim)
    finally:
        victim.write("m.parquet", original)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_shards(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    storage = make_dataset(tmp_path, shards=2, rows=3)
    record = done_records(storage)[1]
    for name in (record.tar, record.table, "done/000001.json"):
        original = storage.read(name)
        for _ in range(4):
            storage.write(name, mutated(original, rng))
            if storage.read(name) == original:
                continue
            with one_line_at_most():
                found = verify(storage.url)
                assert found or name.startswith("done/")
                merge(storage, INFO)
                use(storage)
        storage.write(name, original)
        merge(storage, INFO)
        assert verify(storage.url) == []


@pytest.mark.parametrize("seed", range(10))
def test_mutated_bytes_alone(victim: Storage, seed: int) -> None:
    rng = random.Random(seed)
    record = done_records(victim)[0]
    tar = victim.read(record.tar)
    for _ in range(30):
        with one_line_at_most():
            for sample in walk(io.BytesIO(mutated(tar, rng))):
                assert "/" not in sample.key
        with one_line_at_most():
            DoneRecord.from_json(mutated(record.to_json(), rng), "x.json")
