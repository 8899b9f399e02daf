"""One trial of ``benchmarks/kill_matrix.py``: start a run, kill it, run it again, compare what it left behind.

Runs are forked from this process; the workers of several are found below the process of the Ray cluster.
"""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

FORK = multiprocessing.get_context("fork")
SHARDS = 6
WORK = {
    "noise": ["--method", "noise", "--set", "groups_per_shard=2", "--set", "group_size=48"],
    "prior": [
        *("--set", "prior.steps=4", "--set", "groups_per_shard=2", "--set", "group_size=4", "--set", "lca.every=2"),
        *("--set", "guidance.decoder=full"),
    ],
    "distill": ["--set", "checkpoint_seconds=0.05", "--set", "batch_size=16", "--set", "epochs=3"],
}
LOGS = ("events.jsonl", "lease/", "results.json", "README.md", "metrics.jsonl", "checkpoint.pt", "report.html")
"""What tells a run's history or times: it differs where these do."""
WHOM = {"worker": "a worker", "driver": "the driver", "all": "every process"}


@dataclass(frozen=True)
class Trial:
    """``kind``: of :data:`WORK`; ``target``: of :data:`WHOM`; ``moment``: a step of the commit, or random."""

    kind: str
    workers: int
    target: str
    moment: str


@dataclass
class Result:
    """What a trial left behind. Lists are empty and ``lost`` and ``doubled`` zero where the promise holds."""

    trial: Trial
    done_before: int = 0  # shards, when it was killed
    made: int = 0
    lost: int = 0
    doubled: int = 0
    altered: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    failed: str = ""

    @property
    def broken(self) -> bool:
        return bool(self.lost or self.doubled or self.altered or self.stray or self.failed)


class Run:
    """The ``factory`` command in a forked process that leads a process group of its own."""

    def __init__(self, arguments: list[str], log: Path, fault: str = "") -> None:
        self.log = log
        self.process = FORK.Process(target=_factory, args=(arguments, log, fault))
        self.process.start()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def end(self, seconds: float = 300) -> None:
        """Wait until it exits with 0. Raises RuntimeError with what it said."""
        self.process.join(seconds)
        if self.code != 0:
            kill(self.process)
            raise RuntimeError(f"exit code {self.code}: {self.log.read_text()[-2000:]}")


def _factory(arguments: list[str], log: Path, fault: str) -> None:
    os.setsid()
    os.environ["FACTORY_FAULT"] = fault
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["factory", *arguments]
    from pipeline.cli import script

    script()


class Matrix:
    """Folders of unbroken runs, and trials against them. ``address``: of the Ray cluster of process ``cluster``."""

    def __init__(self, folder: Path, seed: int, faults: Path, cluster: int, address: str) -> None:
        self.folder, self.rng, self.faults, self.cluster = folder, random.Random(seed), faults, cluster
        self.address = address
        self.unbroken: dict[tuple[str, int], tuple[dict[str, str], float]] = {}  # checksums, seconds

    def command(self, kind: str, workers: int, out: Path) -> list[str]:
        if kind == "distill":
            manifest = self.folder / "unbroken-noise-1/m.parquet"
            return ["run", kind, "-m", str(manifest), "--teacher", "embedded:digits", *WORK[kind], "--out", str(out)]
        pool = ["--workers", str(workers), "--address", self.address] if workers > 1 else []
        return ["run", "synth", "--device", "cpu", "--shards", str(SHARDS), *WORK[kind], *pool, "--out", str(out)]

    def reference(self, kind: str, workers: int) -> tuple[dict[str, str], float]:
        """Checksums of an unbroken run, and the seconds that it takes."""
        if kind == "distill":
            self.reference("noise", 1)
        if (kind, workers) not in self.unbroken:
            out, started = self.folder / f"unbroken-{kind}-{workers}", time.monotonic()
            Run(self.command(kind, workers, out), self.folder / "log").end()
            self.unbroken[kind, workers] = checksums(out), time.monotonic() - started
        return self.unbroken[kind, workers]

    def run(self, trial: Trial) -> Result:
        expected, _ = self.reference(trial.kind, 1)
        _, seconds = self.reference(trial.kind, trial.workers)
        out, result = self.folder / "trial", Result(trial)
        shutil.rmtree(out, ignore_errors=True)
        try:
            while not self.killed(trial, out, seconds):  # it was over before: again, killed earlier
                shutil.rmtree(out, ignore_errors=True)
                seconds *= 0.8
            result.done_before = len([*(out / "done").glob("*")])
            # what several workers began goes on with one or several: the bytes must be the same
            Run(self.command(trial.kind, self.rng.choice([1, trial.workers]), out), self.folder / "log").end()
            Run(["gc", str(out)], self.folder / "log").end()
        except (RuntimeError, TimeoutError) as error:
            result.failed = str(error)
            return result
        found = checksums(out)
        result.altered = sorted(name for name in expected if found.get(name) != expected[name])
        result.stray = sorted(found.keys() - expected.keys())
        if trial.kind != "distill":
            made, wanted = (keys(folder) for folder in (out, self.folder / f"unbroken-{trial.kind}-1"))
            result.made, result.lost = made.total(), (wanted - made).total()
            result.doubled = (made - wanted).total()
        return result

    def killed(self, trial: Trial, out: Path, seconds: float) -> bool:
        """Start a run and kill ``trial.target``; False where the run was over before."""
        mark, fault = self.folder / "mark", ""
        mark.unlink(missing_ok=True)
        if trial.moment != "random":
            frozen = ":stop" if trial.workers > 1 and trial.target != "worker" else ""
            fault = f"{trial.moment}:{self.rng.randrange(SHARDS)}:{mark}{frozen}"
        self.faults.write_text(fault)
        before = {*actors(self.cluster)}
        run = Run(self.command(trial.kind, trial.workers, out), self.folder / "log", fault)
        if trial.moment != "random":
            wait_for(lambda: mark.exists() or run.code is not None)
        else:
            if trial.workers > 1:
                wait_for(lambda: {*actors(self.cluster)} - before or run.code is not None)
            run.process.join(self.rng.uniform(0, 0.8 if trial.workers == 1 else 0.4) * seconds)
        victims = [*({*actors(self.cluster)} - before)]
        over = run.code == 0
        if trial.target == "worker":
            if trial.moment == "random" and victims:
                kill(self.rng.choice(victims))
            run.end()  # a run survives its worker
            return bool(victims) or mark.exists()
        kill(run.process)
        if trial.target == "all":
            for process in victims:
                kill(process)
        elif mark.exists():  # the frozen worker wakes up without a driver
            with suppress(ProcessLookupError):
                os.kill(int(mark.read_text()), signal.SIGCONT)
        run.process.join()
        if run.code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"exit code {run.code} before it was killed: {run.log.read_text()[-2000:]}")
        psutil.wait_procs(victims, timeout=60)
        return not over


def actors(cluster: int) -> Iterator[psutil.Process]:
    """Processes that hold one of our workers: below process ``cluster``, since other runs may be on this machine."""
    for process in psutil.Process(cluster).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_Actor" in " ".join(process.cmdline()):
                yield process


def kill(process: Any) -> None:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        process.kill()


def wait_for(seen: Callable[[], Any], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not seen():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened for {seconds:g} s")
        time.sleep(0.01)


def checksums(out: Path) -> dict[str, str]:
    """sha256 of every file but those that tell times."""
    files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in files.items() if not name.startswith(LOGS) and path.name not in LOGS}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def keys(out: Path) -> Counter[str]:
    """Keys of the manifest, counted. In a process of its own: a fork must not inherit Arrow's threads."""
    with FORK.Pool(1) as pool:
        return Counter(pool.apply(_keys, (str(out / "m.parquet"),)))


def _keys(path: str) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["key"])["key"].to_pylist())
