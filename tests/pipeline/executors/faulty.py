"""Workers that misbehave on demand: the noise worker, which on chosen shards raises, hangs, stops or dies first."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from manifests.errors import DataError, NumericsError, StoreError
from pipeline.executors.pool import Worker
from stages.progress import OnProgress, ShardProgress
from stages.synth.noise import NoiseWorker

SETTINGS: dict[str, Any] = {"method": "noise", "groups_per_shard": 2, "group_size": 3}
FINGERPRINT = "f" * 64


class Faulty:
    """``faults`` maps a shard (as text) to what happens there; those that end in ``-once`` leave ``marks``. No shard
    goes on before ``meet`` workers have one."""

    def __init__(self, inner: Worker, faults: dict[str, str], marks: Path, pause: float, meet: int) -> None:
        self.inner, self.faults, self.marks, self.pause, self.meet = inner, faults, marks, pause, meet

    def run(self, shard: int, on_progress: OnProgress | None = None) -> dict[str, Any]:
        time.sleep(self.pause)
        if self.meet:
            (self.marks / f"worker-{os.getpid()}").touch()
        while len(list(self.marks.glob("worker-*"))) < self.meet:
            time.sleep(0.02)
        fault, _, once = self.faults.get(str(shard), "").partition("-")
        mark = self.marks / str(shard)
        if fault and not (once and mark.exists()):
            mark.touch()
            self.misbehave(fault, shard, on_progress)
        seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        warned = {"warnings": ["1 of 10 guided updates was left out"]} if fault == "warn" else {}
        return (
            self.inner.run(shard, on_progress)
            | seen
            | warned
            | {"pid": os.getpid(), "nice": os.nice(0), "torch": "torch" in sys.modules}
            | ({"splits": {2 * shard: 2}} if fault == "split" else {})
        )

    def misbehave(self, fault: str, shard: int, on_progress: OnProgress | None) -> None:
        match fault:
            case "raise":
                raise ValueError(f"shard {shard} is\npoison")
            case "slow":
                assert on_progress is not None
                on_progress(ShardProgress(shard, 0.5, step=10, steps=20))
                time.sleep(3)
            case "hang":
                time.sleep(60)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)  # not even its C++ threads answer
                time.sleep(60)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":  # dies between its commit and its answer
                self.inner.run(shard, on_progress)
                os.kill(os.getpid(), signal.SIGKILL)
            case "store":
                raise StoreError("s3://far/away: cannot write: connection reset by peer")
            case "full":
                raise OSError(28, "No space left on device")
            case "overflow":
                raise NumericsError("9 of 10 guided updates were left out")
            case "cuda":
                raise RuntimeError("CUDA error: device-side assert triggered")


def build_faulty(
    storage: str,
    marks: str,
    faults: dict[str, str],
    pause: float = 0.0,
    meet: int = 0,
    environment: dict[str, str] | None = None,
) -> Worker:
    """A :class:`Faulty` worker; the fault ``build`` breaks the factory itself."""
    os.environ.update(environment or {})
    broken = faults.get("build")
    if broken == "data":
        raise DataError("teacher.safetensors: no such file")
    if broken == "bug":
        raise RuntimeError("cannot even start")
    return Faulty(NoiseWorker(SETTINGS, storage, FINGERPRINT), faults, Path(marks), pause, meet)
