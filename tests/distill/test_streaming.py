"""Images from an object store: the student's bytes never depend on how they arrive."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.reader import Manifest
from manifests.storage import Storage
from stages.distill import streaming
from stages.distill.batches import Batches, batch_bounds, localize
from stages.distill.rows import EpochOrder, select_rows
from stages.distill.run import run_distill
from stages.distill.runtime import Ranks
from stages.distill.streaming import Pixels, Stream, decode_threads
from tests.distill.drawn import write_dataset
from tests.distill.pair import Pair, distill
from tests.distill.short import settings, weights
from tests.manifests.conftest import flaky_s3, s3_endpoint, s3_url  # noqa: F401
from tests.manifests.flaky_proxy import every

STREAMED = {"memory_gb": 0, "checkpoint_seconds": 0, "stall_seconds": 20}
COUNT, SHARDS = 48, 6
CPU = torch.device("cpu")


@pytest.fixture
def remote(s3_url):  # noqa: F811
    return write_dataset(s3_url, COUNT, SHARDS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    """The weights from the same images in a local folder."""
    folder = tmp_path_factory.mktemp("local")
    run_distill(settings(**STREAMED), [(write_dataset(folder / "d", COUNT, SHARDS), 1.0)], str(folder / "out"))
    return weights(folder / "out")


def trained(manifest, out, **changes) -> tuple[bytes, list[str]]:
    """Weights, and the lines that were said."""
    lines: list[str] = []

    def on_event(kind, **fields):
        lines.extend([fields["message"]] if kind == "warning" else [])

    run_distill(settings(**STREAMED | changes), [(manifest, 1.0)], str(out), on_event=on_event)
    return weights(out), [line for line in lines if "cache_dir" in line or "waiting" in line]


def test_the_same_student_with_and_without_a_cache_cold_and_warm(remote, expected, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    size = Manifest.open(remote).info.tars[0].bytes
    assert trained(remote, tmp_path / "none") == (expected, [])
    assert trained(remote, tmp_path / "cold", **cache) == (expected, [])
    assert len([*(tmp_path / "cache").glob("*.tar")]) == SHARDS
    assert trained(remote, tmp_path / "warm", **cache) == (expected, [])
    assert trained(remote, tmp_path / "memory", **cache, memory_gb=1) == (expected, [])
    small = {"cache_dir": str(tmp_path / "small"), "cache_gb": 2.5 * size / 1e9}
    students, lines = trained(remote, tmp_path / "part", **small)
    assert students == expected and len([*(tmp_path / "small").glob("*.tar")]) == 2
    assert lines and all("2 of 6 tars fit cache_gb" in line for line in lines)


def test_a_store_that_fails_now_and_then(remote, flaky_s3, expected, tmp_path):  # noqa: F811
    flaky_s3.plan = every(3, "busy", "drop", "short", "slow", "lost")
    assert trained(remote, tmp_path / "out", cache_dir=str(tmp_path / "cache"))[0] == expected


def factory(*arguments, **env):
    command = [sys.executable, "-m", "pipeline.cli", "run", "distill", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    return run.returncode, run.stderr.strip().splitlines()


def test_killed_while_a_tar_is_fetched_it_resumes_to_the_same_weights(remote, expected, tmp_path):
    sets = {"epochs": 3, "batch_size": 8, "val_fraction": 0.2, "optimizer.lr": 0.05, **STREAMED}
    sets["cache_dir"] = tmp_path / "cache"
    arguments = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    command = ("--manifest", remote, "--out", tmp_path / "out", *arguments)
    assert factory(*command, FACTORY_FAULT="fetching:0")[0] == -signal.SIGKILL
    assert len([*(tmp_path / "cache").glob("*.part")]) == 1
    assert factory(*command) == (0, ANY)
    assert weights(tmp_path / "out") == expected
    assert {path.suffix for path in (tmp_path / "cache").iterdir() if path.is_file()} == {"", ".tar"}


def test_a_store_that_falls_silent_ends_the_command_in_one_line(remote, flaky_s3, tmp_path):  # noqa: F811
    flaky_s3.plan = lambda number, method, path: "drop" if ".tar" in path else ""
    sets = [part for each in ("memory_gb=0", "stall_seconds=3") for part in ("--set", each)]
    code, lines = factory("--manifest", remote, "--out", tmp_path / "out", *sets)
    assert code == 3
    assert "nothing has arrived for 3 s" in lines[-1] and ".tar" in lines[-1] and "Traceback" not in "".join(lines)


def test_processes_share_a_cache_and_agree(remote, tmp_path):
    asked = settings(**STREAMED, cache_dir=str(tmp_path / "cache"))
    pair = Pair(tmp_path)
    try:
        together = pair(distill, asked, remote, str(tmp_path / "cold"))
        again = pair(distill, asked, remote, str(tmp_path / "warm"))
    finally:
        pair.close()
    assert len({*(each["weights"]["digits-cnn-small"] for each in [*together, *again])}) == 1
    assert len([*(tmp_path / "cache").glob("*.tar")]) == SHARDS


def test_each_process_begins_at_its_own_tars(remote, tmp_path):
    rows = select_rows([(Manifest.open(remote), 1.0)], settings(val_fraction=0))
    wanted = []
    for rank in range(3):
        asked = settings(cache_dir=str(tmp_path / "cache"))
        with Stream(rows, asked, print, Ranks(rank, 3)) as stream:
            stream.cache.want = lambda tars: wanted.append([tar.shard for _, tar in tars])
            stream.begin(np.arange(COUNT)[::-1])
    assert wanted == [[5, 4, 3, 2, 1, 0], [3, 2, 1, 0, 5, 4], [1, 0, 5, 4, 3, 2]]


def test_each_process_reads_the_tars_of_its_partitions_alone(remote, tmp_path):
    asked = settings(**STREAMED, val_fraction=0, batch_size=12, partitions=6, cache_dir=str(tmp_path / "cache"))
    rows = select_rows([(Manifest.open(remote), 1.0)], asked)
    order = EpochOrder(rows, np.arange(COUNT), asked)
    wanted, whole = {}, None
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            ranks = Ranks(rank, size)
            with Stream(rows, asked, print, ranks) as stream:
                key = rank, size
                stream.cache.want = lambda tars, key=key: wanted.setdefault(key, {tar.shard for _, tar in tars})
                batches = Batches(rows, order, Pixels(rows, 0, torch.device("cpu"), stream), asked, CPU, ranks)
                seen.append([batches.make(step) for step in range(2 * batches.steps)])
        parts = [torch.cat([batch.x for batch in parts]) for parts in zip(*seen, strict=True)]
        assert whole is None or all(map(torch.equal, parts, whole))  # the same batches, whoever reads them
        whole = whole or parts
    assert wanted == {
        (0, 1): {*range(6)},
        (0, 2): {0, 1, 2},
        (1, 2): {3, 4, 5},
        (0, 3): {0, 1},
        (1, 3): {2, 3},
        (2, 3): {4, 5},
    }


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
def test_a_partition_of_the_dataset_feeds_one_part_of_every_batch(length, batch_size, partitions, seed):
    rng = np.random.default_rng(seed)
    order, home = rng.integers(0, length, length), rng.permutation(length)  # some rows twice, as weights ask for
    bounds = batch_bounds(length, batch_size)
    placed = localize(order, home, bounds, partitions)
    assert sorted(placed) == sorted(order)
    parts: list[list[int]] = [[] for _ in range(partitions)]
    for batch in np.split(placed, bounds[1:-1]):
        for rank, part in enumerate(parts):
            part.extend(home[batch[Ranks(rank, partitions).part(len(batch))]])
    full = [part for part in parts if part]
    assert all(max(one) <= min(other) for one, other in pairwise(full))  # ranges of the storage
    assert localize(order, home, bounds, 1).tolist() == order.tolist()


def test_announced_batches_are_fetched_once_and_ahead(dataset, monkeypatch):
    rows = select_rows([(Manifest.open(dataset), 1.0)], settings(val_fraction=0))
    read, seen = type(rows).read, []
    monkeypatch.setattr(type(rows), "read", lambda self, each: (seen.append(each.tolist()), read(self, each))[1])
    pixels = Pixels(rows, 0, torch.device("cpu"))
    batches = [np.arange(start, start + 4) for start in range(0, 24, 4)]
    for batch in batches[: streaming.FETCHED_AHEAD]:
        pixels.expect(batch)
    taken = [pixels.take(batch) for batch in batches]
    assert sorted(seen) == [batch.tolist() for batch in batches]
    assert torch.equal(torch.cat(taken), pixels.take(np.arange(24)))
    seen.clear()
    monkeypatch.setattr(streaming, "BYTES_AHEAD", 4 * 4 * 50)  # images are larger
    pixels.expect(batches[0])
    assert not seen and torch.equal(pixels.take(batches[0]), taken[0])


def test_decoding_follows_the_cores_that_a_process_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(12)}, raising=False)
    assert decode_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decode_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert decode_threads() == 1


def test_a_stored_recipe_names_no_cache(tmp_path):
    from pipeline.distill import resolve_distill

    manifest = Manifest.open(write_dataset(tmp_path / "d"))
    manifest.info.recipe["distill"] = {"cache_dir": "/etc", "cache_gb": 1, "epochs": 3}
    settings = resolve_distill(manifest, None, (), {}).distill
    assert settings.cache_dir is None and settings.cache_gb == 50 and settings.epochs == 3


def test_a_local_dataset_needs_no_cache(dataset, tmp_path):
    trained(dataset, tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    assert not Storage(tmp_path).list("cache")
