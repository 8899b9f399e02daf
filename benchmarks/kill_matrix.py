"""SIGKILL of a worker, the driver or every process of a run, at each step of the commit and at random times.

    python benchmarks/kill_matrix.py [--only noise|prior|distill] [--seed 0] [--json FILE]

Every trial (``benchmarks/kill_trial.py``) runs the ``factory`` command in a process (and process group) of its own,
kills, gives the same command again, then ``factory gc``, and compares the folder with that of an unbroken run: every
file of the dataset by checksum, every key by count. Runs are forked from a process that has imported everything, which
saves each of them seconds of imports; several workers are Ray actors on one cluster that outlives the runs. Exits with
1 where anything was lost, doubled, altered or left lying about.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # actors import the package
os.environ["RAY_AUTH_MODE"] = "token"  # what a cluster starts with, and who joins it by its address has to ask for

from benchmarks.kill_trial import FORK, WHOM, WORK, Matrix, Result, Trial  # noqa: E402
from manifests.shard import STEPS  # noqa: E402


def trials() -> list[Trial]:
    """The matrix, shuffled, so that any part of it looks at all of it."""
    matrix = [Trial("noise", 1, "all", step) for step in STEPS] + [Trial("noise", 1, "all", "random")] * 17
    matrix += [Trial("noise", 2, target, step) for target in ("worker", "driver") for step in STEPS]
    matrix += [Trial("noise", 2, "all", step) for step in ("checked", "tar", "table")]
    matrix += [Trial("noise", 2, target, "random") for target in WHOM] * 2
    matrix += [Trial("prior", 1, "all", moment) for moment in ("tar", "table", "random")]
    matrix += [Trial("prior", 2, *cell) for cell in (("worker", "table"), ("driver", "random"), ("all", "checked"))]
    matrix += [Trial("distill", 1, "all", "random")] * 9
    random.Random(0).shuffle(matrix)
    return matrix


def table(results: list[Result]) -> Iterator[str]:
    """One line for each kind, pool and target."""
    yield "| work | workers | killed | at a step | at random | resumed | lost | doubled | altered | stray |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for kind, workers, target in dict.fromkeys((r.trial.kind, r.trial.workers, r.trial.target) for r in results):
        some = [r for r in results if (r.trial.kind, r.trial.workers, r.trial.target) == (kind, workers, target)]
        at_random = sum(r.trial.moment == "random" for r in some)
        whom = "the process" if workers == 1 else WHOM[target]
        cells = [kind, workers, whom, len(some) - at_random, at_random, sum(not r.failed for r in some)]
        cells += [sum(r.lost for r in some), sum(r.doubled for r in some)]
        cells += [sum(len(r.altered) for r in some), sum(len(r.stray) for r in some)]
        yield f"| {' | '.join(map(str, cells))} |"


def serve_cluster(faults: Path, found: Any) -> None:
    """Start a Ray cluster whose actors read ``faults``, send its address, stay."""
    os.environ["FACTORY_FAULT"] = f"@{faults}"
    import ray

    from manifests.errors import FactoryError
    from pipeline.executors.ray import connect
    from pipeline.executors.settings import ExecutorSettings

    while True:
        try:
            connect(ExecutorSettings(workers=2))
            break
        except FactoryError as error:  # Ray gives up after 30 seconds, which a busy machine may need
            print(error, file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # instead of Ray's own, which prints a stack
    found.send(ray.get_runtime_context().gcs_address)
    signal.pause()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*WORK], help="one kind of work")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", type=Path, help="file for every trial's result")
    asked = parser.parse_args()
    folder, started, results = Path(tempfile.mkdtemp(prefix="kill-matrix-")), time.monotonic(), list[Result]()
    faults = folder / "fault"
    faults.touch()
    chosen = [trial for trial in trials() if asked.only in (None, trial.kind)]
    address, there = FORK.Pipe()
    cluster = multiprocessing.get_context("spawn").Process(target=serve_cluster, args=(faults, there))
    cluster.start()
    there.close()  # so that a cluster that dies ends the wait for its address
    try:
        matrix = Matrix(folder, asked.seed, faults, cluster.pid or 0, address.recv())
        for module in (
            "pipeline.commands.run",
            "pipeline.executors.ray",
            "stages.distill.run",
            "stages.synth.worker",
        ):
            importlib.import_module(module)  # what a run imports anyway

        for trial in chosen:
            results.append(matrix.run(trial))
            state = f"BROKEN {json.dumps(asdict(results[-1]))}" if results[-1].broken else "ok"
            print(
                f"{len(results):3} {time.monotonic() - started:5.0f} s  {trial}: {state}", file=sys.stderr, flush=True
            )
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} of {len(chosen)} trials", file=sys.stderr)
    finally:
        cluster.terminate()
        cluster.join()
        shutil.rmtree(folder, ignore_errors=True)
    broken = sum(result.broken for result in results)
    print(*table(results), f"\n{len(results)} trials, {broken} broken, {time.monotonic() - started:.0f} s", sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
