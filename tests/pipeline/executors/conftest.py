"""Runs of the noise worker for the executor tests, and one Ray cluster for all of them (starting one takes seconds)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.storage import Storage
from pipeline.events import EventLog, read_events
from pipeline.executors.driver import Outcome, execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.settings import ExecutorSettings
from tests.manifests.conftest import flaky_s3, s3_endpoint, s3_url  # noqa: F401

ROOT = Path(__file__).parents[3]
FACTORY = "tests.pipeline.executors.faulty:build_faulty"


class Run:
    """A run folder and what tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marks = folder / "out", folder / "marks"
        self.folder.mkdir(parents=True)
        self.marks.mkdir()
        self.storage = Storage(self.folder)

    def spec(self, faults: dict[str, str] | None = None, pause: float = 0.0) -> dict[str, Any]:
        return {"marks": str(self.marks), "faults": faults or {}, "pause": pause}

    def execute(self, shards: int, faults: dict[str, str] | None = None, meet: int = 0, **settings: Any) -> Outcome:
        spec = WorkerSpec(FACTORY, self.spec(faults) | {"storage": self.storage.url, "meet": meet})
        place = ExecutorSettings(**{"retry_delay": 0, **settings})
        return execute(spec, range(shards), place, EventLog(self.storage), self.storage)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.storage) if event["kind"] == kind]

    def files(self) -> dict[str, bytes]:
        """Everything that belongs to the dataset."""
        names = [path for folder in ("shards", "done") for path in (self.folder / folder).glob("*")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in names}

    def spawn(
        self,
        shards: int,
        faults: dict[str, str] | None = None,
        pause: float = 0.0,
        meet: int = 0,
        ray: Any = None,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> "Driver":
        spec = self.spec(faults, pause) | {"meet": meet, "environment": environment}
        job = {"storage": self.storage.url, "shards": shards, "spec": spec, "settings": settings}
        return Driver(self, job | ({"ray": ray} if ray else {}))


class Driver:
    """A driver in a process (and process group) of its own."""

    def __init__(self, run: Run, job: dict[str, Any]) -> None:
        self.run = run
        command = [sys.executable, "-m", "tests.pipeline.executors.drive", json.dumps(job)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(self, kind: str, count: int = 1, seconds: float = 120) -> None:
        """Until the run has had ``count`` events of ``kind``."""
        until = time.monotonic() + seconds
        while len(self.run.events(kind)) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, f"no {count} × {kind} within {seconds} s"
            time.sleep(0.02)

    def read_until(self, text: str) -> None:
        """Until stderr has a line with ``text``; what was read is no part of :meth:`end`'s."""
        assert self.process.stderr is not None
        assert any(text in line for line in self.process.stderr), f"it ended without saying {text!r}"

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[], Run]:
    runs: list[Run] = []

    def make() -> Run:
        runs.append(Run(tmp_path / str(len(runs))))
        return runs[-1]

    return make


@pytest.fixture
def run(make_run: Callable[[], Run]) -> Run:
    return make_run()


@pytest.fixture
def spawned() -> Iterator[Callable[[Driver], Driver]]:
    """Registers drivers whose processes must not outlive the test."""
    drivers: list[Driver] = []

    def register(driver: Driver) -> Driver:
        drivers.append(driver)
        return driver

    yield register
    for driver in drivers:
        if driver.process.poll() is None:
            driver.send(signal.SIGKILL, group=True)
            driver.process.communicate()


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster on this machine with four CPUs' worth of room."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # actors import the test workers
    ray = pytest.importorskip("ray")
    from pipeline.executors.ray import connect, disconnect

    assert connect(ExecutorSettings(workers=4))
    yield ray.get_runtime_context().gcs_address
    disconnect()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
