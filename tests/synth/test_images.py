"""Writing beside the sampling: same bytes as writing in turn, errors that surface, nothing half-done that stays."""

import threading

import pytest
import torch

from manifests.shard import ShardWriter, done_records
from manifests.storage import Storage
from stages.settings import SynthSettings
from stages.synth import images as image_writer
from stages.synth.images import ImageWriter, encode_image
from stages.synth.worker import ShardWorker
from tests.manifests.samples import make_row


def groups(count=3, size=4):
    rng = torch.Generator().manual_seed(0)
    return [
        [(make_row(0, 0), torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=rng)) for _ in range(size)]
        for _ in range(count)
    ]


def test_the_bytes_are_those_of_writing_in_turn(tmp_path, monkeypatch):
    threads, encode = set(), encode_image
    note = lambda *args: threads.add(threading.get_ident()) or encode(*args)  # noqa: E731
    monkeypatch.setattr(image_writer, "encode_image", note)
    with ShardWriter(Storage(tmp_path / "beside"), 0, "f" * 64) as shard, ImageWriter(shard, "png") as images:
        for group in groups():
            images.write(group)
        images.flush()
        beside = shard.commit()
    with ShardWriter(Storage(tmp_path / "in turn"), 0, "f" * 64) as shard:
        for row, pixels in (sample for group in groups() for sample in group):
            shard.add(row, encode(pixels, "png"), "png")
        assert shard.commit() == beside
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_an_error_of_the_thread_is_raised_and_nothing_is_committed(prior_folder, tmp_path, monkeypatch):
    """The disk fills up in the second group: the worker must not go on, let alone declare the shard done."""
    encoded, encode = [], encode_image

    def full(pixels, kind):
        if len(encoded) == 6:
            raise OSError(28, "No space left on device")
        encoded.append(pixels)
        return encode(pixels, kind)

    monkeypatch.setattr(image_writer, "encode_image", full)
    prior = {"path": str(prior_folder), "steps": 2, "cfg_scale": 1.0}
    settings = SynthSettings.model_validate({"prior": prior, "method": "dmkd", "group_size": 4, "device": "cpu"})
    storage = Storage(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        ShardWorker(settings.model_dump(mode="json"), storage.url, "f" * 64).run(0)
    assert done_records(storage) == {} and not list((tmp_path / "tmp").glob("*"))


def test_leaving_waits_for_the_thread(tmp_path, monkeypatch):
    """A shard that is given up must not be written to once its files are closed."""
    started, go_on, done = threading.Event(), threading.Event(), []

    def slow(pixels, kind):
        started.set()
        go_on.wait(10)
        done.append(1)
        return b"image"

    monkeypatch.setattr(image_writer, "encode_image", slow)
    (group,) = groups(count=1, size=1)

    def interrupted():
        with ShardWriter(Storage(tmp_path), 0, "f" * 64) as shard, ImageWriter(shard, "png") as images:
            images.write(group)
            started.wait(10)
            threading.Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1] and done_records(Storage(tmp_path)) == {}
