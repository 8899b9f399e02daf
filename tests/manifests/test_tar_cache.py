"""Whole tars in a local folder: what is read never depends on it."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from manifests.storage import Patience
from manifests.tar_cache import TarCache
from tests.manifests.flaky_proxy import FlakyProxy, every
from tests.manifests.samples import flip, make_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def requests(flaky_s3: FlakyProxy) -> list[str]:
    """Paths of the tars that were asked for, one entry a request."""
    seen: list[str] = []

    def plan(number: int, method: str, path: str) -> str:
        if method == "GET" and ".tar" in path:
            seen.append(path)
        return ""

    flaky_s3.plan = plan
    return seen


class Job:
    """A reader of the dataset at ``url`` through the cache in ``folder``."""

    def __init__(self, url: str, folder: Path, limit: float = 1e9, fill: bool = True) -> None:
        self.notes: list[str] = []
        self.manifest = Manifest.open(url).where(include_rejected=True)
        self.tars = self.manifest.info.tars
        self.cache = TarCache(str(folder), limit, Patience(5), self.notes.append)
        self.manifest.file.cache = self.cache
        if fill:
            self.fill()

    def fill(self) -> None:
        self.cache.want((self.manifest.storage, tar) for tar in self.tars)
        self.cache.wait(self.tars)
        if self.cache._thread:
            self.cache._thread.join(10)

    def images(self) -> dict[int, bytes]:
        return dict(self.manifest.scan())

    @property
    def held(self) -> list[bool]:
        return [tar in self.cache for tar in self.tars]


@pytest.fixture
def expected(tmp_path: Path) -> dict[int, bytes]:
    make_dataset(tmp_path / "local")
    return dict(Manifest.open(tmp_path / "local").where(include_rejected=True).scan())


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    made: list[Job] = []
    yield made
    for job in made:
        job.cache.close()


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.is_file() and path.name != "lock")


def test_a_second_job_reads_without_the_store(
    s3_url: str, requests: list[str], tmp_path: Path, expected: dict[int, bytes], jobs: list[Job]
) -> None:
    make_dataset(s3_url)
    first = Job(s3_url, tmp_path / "cache", fill=False)
    jobs.append(first)
    assert first.images() == expected and len(requests) == 3  # neighbors are one request
    first.fill()
    assert first.held == [True] * 3 and len(requests) == 6
    first.cache.close()
    second = Job(s3_url, tmp_path / "cache")
    jobs.append(second)
    assert second.images() == first.images() == expected
    assert len(requests) == 6 and first.notes == second.notes == [] and names(tmp_path / "cache") == [".tar"] * 3


def test_room_is_made_of_what_no_living_job_reads(s3_url: str, tmp_path: Path, jobs: list[Job]) -> None:
    make_dataset(f"{s3_url}/a", shards=2)
    make_dataset(f"{s3_url}/b", shards=3, rows=5)
    limit = 2.5 * max(tar.bytes for tar in Manifest.open(f"{s3_url}/a").info.tars)
    first = Job(f"{s3_url}/a", tmp_path, limit)
    second = Job(f"{s3_url}/b", tmp_path, limit)
    jobs += [first, second]
    assert first.held == [True, True] and not any(second.held)
    assert second.notes == [
        f"cache_dir {tmp_path}: 0 of 3 tars fit cache_gb {limit / 1e9:g} beside what other jobs use; the rest is read "
        "from the store"
    ]
    assert len(second.images()) == 15
    first.cache.close()
    for path in tmp_path.glob("*.tar"):  # long ago, the second one longer
        os.utime(path, (2, 2) if path.name.startswith(first.tars[0].sha256) else (1, 1))
    second.tars = second.tars[:1]
    second.fill()
    assert second.held == [True]
    assert {path.stem for path in tmp_path.glob("*.tar")} == {first.tars[0].sha256, second.tars[0].sha256}


def test_a_damaged_copy_is_removed_and_read_again(
    s3_url: str, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job]
) -> None:
    make_dataset(s3_url)
    Job(s3_url, tmp_path / "cache").cache.close()
    for path in (tmp_path / "cache").glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[520] ^= 1
        path.write_bytes(data)
    job = Job(s3_url, tmp_path / "cache")
    jobs.append(job)
    assert job.images() == expected
    assert len(job.notes) == 3 and all("damaged since it was fetched" in note for note in job.notes)
    assert names(tmp_path / "cache") == []
    job.fill()
    assert job.held == [True] * 3


@pytest.mark.parametrize("change", [b"", b"short"])
def test_a_copy_of_another_size_is_fetched_again(
    s3_url: str, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job], change: bytes
) -> None:
    make_dataset(s3_url)
    Job(s3_url, tmp_path / "cache").cache.close()
    for path in (tmp_path / "cache").glob("*.tar"):
        path.write_bytes(change)
    job = Job(s3_url, tmp_path / "cache")
    jobs.append(job)
    assert job.held == [True] * 3 and job.images() == expected


def test_a_tar_that_was_altered_in_the_store_is_not_kept(s3_url: str, tmp_path: Path, jobs: list[Job]) -> None:
    storage = make_dataset(s3_url)
    flip(storage, Manifest.open(s3_url).info.tars[1].name, 520)
    job = Job(s3_url, tmp_path)
    jobs.append(job)
    assert job.held == [True, False, True]
    assert len(job.notes) == 1 and "its sha256 is not the recorded one (shard 1); not kept" in job.notes[0]
    with pytest.raises(DataError, match="shard 1, sample '000001-000000' was altered"):
        job.images()
    assert names(tmp_path) == [".tar"] * 2


def test_a_full_disk_keeps_nobody_from_reading(
    s3_url: str, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3_url)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    job = Job(s3_url, tmp_path / "cache")
    jobs.append(job)
    assert job.images() == expected and names(tmp_path / "cache") == []
    assert job.notes == [
        f"cache_dir {tmp_path}/cache: No space left on device: no more tars are kept, the rest is read from the store"
    ]


CHILD = """
import sys
from tests.manifests.test_tar_cache import Job
from pathlib import Path
job = Job(sys.argv[1], Path(sys.argv[2]))
assert job.held == [True] * 3, job.held
"""


def child(url: str, folder: Path, **env: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", CHILD, url, str(folder)], cwd=ROOT, env=os.environ | env)


def test_killed_while_it_fetches(s3_url: str, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job]) -> None:
    make_dataset(s3_url)
    cache = tmp_path / "cache"
    killed = child(s3_url, cache, FACTORY_FAULT="fetching:1")
    assert killed.wait(60) == -signal.SIGKILL
    assert names(cache) == [".part", ".tar"] and len([*(cache / "jobs").iterdir()]) == 1
    job = Job(s3_url, cache)
    jobs.append(job)
    assert job.images() == expected and names(cache) == [".tar"] * 3
    other = make_dataset(f"{s3_url}/other", shards=1, rows=4)
    another = Job(other.url, cache, limit=1)  # makes room: what a killed process left is removed
    jobs.append(another)
    assert len([*(cache / "jobs").iterdir()]) == 2


def test_what_a_killed_process_left_makes_room(s3_url: str, tmp_path: Path, jobs: list[Job]) -> None:
    make_dataset(f"{s3_url}/a")
    make_dataset(f"{s3_url}/b", shards=1)
    child(f"{s3_url}/a", tmp_path, FACTORY_FAULT="fetching:0").wait(60)
    assert names(tmp_path) == [".part"]
    job = Job(f"{s3_url}/b", tmp_path, limit=Manifest.open(f"{s3_url}/b").info.tars[0].bytes)
    jobs.append(job)
    assert job.held == [True] and names(tmp_path) == [".tar"]


def test_processes_fetch_each_tar_once(s3_url: str, requests: list[str], tmp_path: Path) -> None:
    make_dataset(s3_url)
    both = [child(s3_url, tmp_path), child(s3_url, tmp_path)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(requests) == len({*requests}) == 3
    assert names(tmp_path) == [".tar"] * 3 and not [*(tmp_path / "jobs").iterdir()][2:]


def test_bad_connections_fill_the_cache_all_the_same(
    s3_url: str, flaky_s3: FlakyProxy, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job]
) -> None:
    make_dataset(s3_url)
    flaky_s3.plan = every(3, "busy", "drop", "short", "lost")
    job = Job(s3_url, tmp_path / "cache")
    jobs.append(job)
    assert job.held == [True] * 3 and job.images() == expected


def test_links_in_the_cache_are_not_followed(
    s3_url: str, tmp_path: Path, expected: dict[int, bytes], jobs: list[Job]
) -> None:
    make_dataset(s3_url)
    tars, cache = Manifest.open(s3_url).info.tars, tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "mine").write_bytes(b"precious")
    (cache / f"{tars[0].sha256}.tar").symlink_to(tmp_path / "mine")
    (cache / f"{tars[1].sha256}.part").symlink_to(tmp_path / "mine")
    job = Job(s3_url, cache)
    jobs.append(job)
    assert job.images() == expected
    assert (tmp_path / "mine").read_bytes() == b"precious"


@pytest.mark.parametrize("folder", ["s3://bucket/cache", "FILE"])
def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "FILE").write_text("")
    with pytest.raises(UsageError, match="cache_dir"):
        TarCache(folder if "://" in folder else str(tmp_path / folder), 1e9)
