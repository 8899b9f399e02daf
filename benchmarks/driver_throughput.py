"""How fast the driver hands out and commits shards, and what a large plan costs in memory: no model, no GPU.

    python benchmarks/driver_throughput.py [--shards 2000] [--plan 100000] [--workers 1 2] [--out FOLDER] [--json FILE]

Two kinds of work. ``noise``: every shard is written, checked and committed by ``--method noise`` (8 small images).
``idle``: a worker that returns at once, so that only the driver's own work is left; it runs ``--plan`` shards.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # actors import this file

from manifests.storage import Storage  # noqa: E402
from pipeline.events import EventLog  # noqa: E402
from pipeline.executors.driver import execute  # noqa: E402
from pipeline.executors.pool import WorkerSpec  # noqa: E402
from pipeline.executors.settings import ExecutorSettings  # noqa: E402
from pipeline.lease import Lease  # noqa: E402

NOISE = {"method": "noise", "groups_per_shard": 1, "group_size": 8}


class Idle:
    """A worker without work."""

    def run(self, shard: int, on_progress: Any = None) -> dict[str, Any]:
        return {"shard": shard, "rows": 0, "kept": 0, "bytes": 0, "seconds": 0.0}


def build_idle() -> Idle:
    return Idle()


class TimedLog(EventLog):
    """Notes when the first shard was handed out and the last one answered."""

    first = last = 0.0

    def write(self, kind: str, **fields: Any) -> None:
        super().write(kind, **fields)
        self.last = time.perf_counter()
        self.first = self.first or self.last


class PeakMemory:
    """Largest resident memory of this process and of it with all its children, in MB, sampled five times a second."""

    def __enter__(self) -> "PeakMemory":
        self.driver = self.tree = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.2):
            own = me.memory_info().rss / 1e6
            below = 0.0
            for child in me.children(recursive=True):
                try:
                    below += child.memory_info().rss / 1e6
                except psutil.NoSuchProcess:
                    continue
            self.driver, self.tree = max(self.driver, own), max(self.tree, own + below)


def measure(kind: str, shards: int, workers: int, folder: Path) -> dict[str, Any]:
    """One run in a new folder. ``seconds`` runs from the first shard handed out to the last one answered."""
    storage = Storage(folder / f"{kind}-{workers}")
    spec = WorkerSpec("benchmarks.driver_throughput:build_idle")
    if kind == "noise":
        kwargs = {"settings": NOISE, "storage": storage.url, "fingerprint": "0" * 64}
        spec = WorkerSpec("stages.synth.noise:NoiseWorker", kwargs)
    begun = time.perf_counter()
    events = TimedLog(storage)
    with PeakMemory() as memory, events, Lease(storage) as lease:
        outcome = execute(spec, range(shards), ExecutorSettings(workers=workers), events, storage, lease=lease)
    if len(outcome.done) != shards:
        raise SystemExit(f"{kind}, {workers} workers: {len(outcome.done)} of {shards} shards done")
    seconds = events.last - events.first
    return {
        "work": kind,
        "workers": workers,
        "shards": shards,
        "seconds": round(seconds, 2),
        "startup_seconds": round(events.first - begun, 2),
        "shards_per_minute": round(shards / seconds * 60),
        "driver_mb": round(memory.driver),
        "tree_mb": round(memory.tree),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2000, help="noise shards per row")
    parser.add_argument("--plan", type=int, default=100_000, help="idle shards per row")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="a folder on the disk to measure; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    asked = parser.parse_args()
    rows = []
    columns = ("work", "workers", "shards", "seconds", "startup_seconds", "shards_per_minute", "driver_mb", "tree_mb")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        for kind, shards in (("noise", asked.shards), ("idle", asked.plan)):
            for workers in asked.workers:
                rows.append(measure(kind, shards, workers, Path(folder)))
                print("| " + " | ".join(str(rows[-1][column]) for column in columns) + " |", flush=True)
    result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "rows": rows}
    print(json.dumps(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
