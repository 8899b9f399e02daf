"""Mutated files through the readers and commands: no traceback, no hang, no memory blow-up, no raw output.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--json FILE]

Every case changes one file of a small dataset, run or model as ``benchmarks/mutations.py`` has it: bytes at random, or
one value of its JSON, metadata, column, tar header or state replaced by a hostile one with every checksum made right
again, or something in its place that is no file. Then a
command reads it. It may work or end in an error made for users; anything else is printed with its number, so that
``--only NUMBER`` shows its traceback. Cases run in a child process with ``--memory-gb`` more address space than it
starts with and ``--seconds`` of CPU each.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from benchmarks.mutations import (  # noqa: E402
    archive,
    labeled,
    manifest,
    odd_recipe,
    recipe,
    shard,
    some_json,
    special,
    state,
    weights,
)
from manifests.dataset import DATASET  # noqa: E402
from manifests.errors import FactoryError  # noqa: E402
from manifests.merge import merge  # noqa: E402
from manifests.reader import Manifest  # noqa: E402
from manifests.storage import Storage  # noqa: E402
from pipeline import cli  # noqa: E402
from pipeline.events import Failure, quarantine  # noqa: E402
from pipeline.executors.settings import ExecutorSettings  # noqa: E402
from pipeline.plan import (  # noqa: E402
    prepare,
    publish,
    read_plan,
)
from pipeline.recipe import resolve, to_yaml  # noqa: E402
from pipeline.synth import dataset_info, run_synth  # noqa: E402
from stages.synth.inputs import inspect_inputs  # noqa: E402

SETS = ("method=noise", "shards=2", "groups_per_shard=1", "group_size=8", "images.size=8")
STUDENT = ("--epochs", "1", "--batch-size", "4", "--set", "val_fraction=0")


class Hang(BaseException):
    """A case took more CPU time than it may."""


def distill(*more: str) -> tuple[str, ...]:
    return ("run", "distill", "-m", "RUN/m.parquet", "-o", "RUN/distill", *STUDENT, *more)


MODEL = "RUN/distill/digits-cnn-small"
LOOK = (
    ("report", "RUN", "-o", "RUN/page.html", "--test-data", "RUN/m.parquet"),
    ("verify", "RUN"),
    ("inspect", "RUN/m.parquet", "--columns", "2", "--sheet", "RUN/sheet.png"),
    ("status", "RUN"),
    ("gc", "RUN", "--dry-run"),
)
KEEP = (("rebuild", "RUN"), ("rescore", "RUN/m.parquet", "--threshold", "0.2"), ("eval", MODEL, "RUN/m.parquet"))
SYNTH = ("run", "synth", "-o", "RUN", *(text for value in SETS for text in ("--set", value)))
DRY = ("run", "synth", "-c", "RUN/resolved.yaml", "--dry-run", "-o", "RUN/new")
CASES: tuple[tuple[int, Callable[[Path, random.Random], None], tuple[tuple[str, ...], ...]], ...] = (
    (6, manifest, (*LOOK[:3], *KEEP, distill(), distill("--skip-bad"))),
    (4, shard, (*LOOK[:3], *KEEP, distill("--skip-bad", "-o", "RUN/again"), distill("-o", "RUN/again"))),
    (4, some_json, (*LOOK, *KEEP, distill(), SYNTH)),
    (4, archive, (LOOK[1], *KEEP, ("eval", MODEL, "RUN/labeled.tar"), distill("--skip-bad", "-o", "RUN/again"))),
    (3, special, (*LOOK, *KEEP, distill(), SYNTH, DRY, ("eval", MODEL, "RUN/labeled.tar"))),
    (2, odd_recipe, (DRY,)),
    (2, recipe, (DRY, (*DRY, "--method", "noise"), (*DRY, "--method", "noise"))),
    (2, labeled, (("eval", MODEL, "RUN/labeled.tar"), ("eval", MODEL, "RUN/labeled.parquet"))),
    (1, state, (distill(),)),
    (1, weights, (("eval", MODEL, "RUN/m.parquet"),)),
)


def make_victim(folder: Path) -> None:
    """A finished run of both stages, a failure record, and labeled data of others."""
    made = resolve("demo", section="synth", sets=SETS, environ={})
    run_synth(made, str(folder), ExecutorSettings(), quiet=True)
    storage, inputs = Storage(folder), inspect_inputs(made.synth)
    copy = prepare(inputs.sources["teacher"])
    publish(storage, copy)
    info = dataset_info(read_plan(storage), inputs, copy)
    storage.write(DATASET, info.to_json())
    merge(storage, info)
    storage.write("resolved.yaml", to_yaml(made))
    call([part.replace("RUN", str(folder)) for part in distill()])
    quarantine(storage, Failure(1, 3, "an error"))
    selection = Manifest.open(folder).where(include_rejected=True)
    shutil.copy(folder / Manifest.open(folder).info.tars[0].name, folder / "labeled.tar")
    images = [selection.read(index) for index in range(4)]
    pq.write_table(pa.table({"png": images, "label": np.arange(4)}), folder / "labeled.parquet")


def call(arguments: list[str]) -> tuple[str, str]:
    """``factory ARGUMENTS`` in this process: accepted or refused, and everything it printed."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["factory", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
    printed = out.getvalue() + err.getvalue()
    raw = [line for line in printed.split("\n") if not line.isprintable()]
    if raw:
        raise AssertionError(f"printed raw: {raw[0]!r}")
    if code not in (0, *(kind.exit_code for kind in (FactoryError, *FactoryError.__subclasses__()))):
        raise AssertionError(f"exit code {code}")
    return ("accepted" if code == 0 else "refused"), printed


def run_case(victim: Path, folder: Path, seed: int, number: int) -> tuple[str, str, str]:
    """(outcome, what was changed, command). Deterministic in ``seed`` and ``number``."""
    rng = random.Random(f"{seed}/{number}")
    _, change, commands = rng.choices(CASES, [weight for weight, _, _ in CASES])[0]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(victim, folder)
    change(folder, rng)
    arguments = [part.replace("RUN", str(folder)) for part in rng.choice(commands)]
    what = f"{change.__name__}: {' '.join(arguments[:2])}"
    try:
        return call(arguments)[0], what, ""
    except (Exception, Hang) as error:
        return "failed", what, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def worker(victim: Path, seed: int, numbers: range, seconds: int, memory_gb: float) -> None:
    """Run cases and print a JSON line for each; the parent watches."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s of CPU")

    signal.signal(signal.SIGPROF, too_long)
    torch.set_num_threads(1)
    call(["run", "synth", "--dry-run"])  # libraries are loaded before their memory counts
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            faulthandler.dump_traceback_later(20 * seconds, exit=True)
            before = time.process_time()
            outcome, what, error = run_case(victim, Path(scratch) / "run", seed, number)
            signal.setitimer(signal.ITIMER_PROF, 0)
            result = {"case": number, "outcome": outcome, "what": what, "error": error}
            result["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(json.dumps(result | {"cpu": time.process_time() - before}), flush=True)
    faulthandler.cancel_dump_traceback_later()


def results(victim: Path, seed: int, cases: int, seconds: int, memory_gb: float) -> Iterator[dict[str, Any]]:
    """The outcome of every case; a child that dies is a failed case, and another one goes on after it."""
    done = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["MALLOC_ARENA_MAX"] = "2"  # each takes address space
    while done < cases:
        limits = [str(value) for value in (victim, seed, done, cases, seconds, memory_gb)]
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *limits]
        with tempfile.TemporaryFile() as errors:  # a pipe that nobody empties would hold the child up
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith('{"case"'):
                    yield json.loads(line)
                    done += 1
            died = child.wait()
            errors.seek(0)
            tail = errors.read()[-2000:].decode(errors="replace")
        if died and done < cases:
            yield {
                "case": done,
                "outcome": "failed",
                "what": "the process died",
                "error": f"{child.returncode}: {tail}",
            }
            done += 1


def fuzz(cases: int, seed: int, seconds: int = 10, memory_gb: float = 2.0) -> dict[str, Any]:
    """Run everything; counts by outcome and by file, and the failures."""
    found, kinds, failures, slowest, cpu, rss = Counter[str](), Counter[str](), [], 0.0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        make_victim(Path(folder) / "victim")
        for result in results(Path(folder) / "victim", seed, cases, seconds, memory_gb):
            found[result["outcome"]] += 1
            slowest, cpu = max(slowest, result.get("cpu", 0.0)), cpu + result.get("cpu", 0.0)
            rss = max(rss, result.get("rss_mb", 0))
            kinds[f"{result['what'].split(':')[0]}, {result['outcome']}"] += 1
            if found.total() % 100 == 0:
                print(f"{found.total()} cases: {dict(found)}, {cpu:.0f} s of CPU", flush=True)
            if result["outcome"] == "failed":
                failures.append(result)
                print(f"case {result['case']} failed, {result['what']}: {result['error'][:200]}", flush=True)
    times = {"cpu_seconds": round(cpu), "slowest_cpu_seconds": round(slowest, 2), "rss_mb": rss}
    return {"cases": cases, "seed": seed, **found, **times, "kinds": dict(sorted(kinds.items())), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=10, help="CPU seconds a case may take")
    parser.add_argument("--memory-gb", type=float, default=2.0)
    parser.add_argument("--only", type=int, help="run one case and show its traceback")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        victim, seed, first, stop, seconds, memory = asked.worker
        worker(Path(victim), int(seed), range(int(first), int(stop)), int(seconds), float(memory))
        return
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            make_victim(Path(folder) / "victim")
            print(*run_case(Path(folder) / "victim", Path(folder) / "run", asked.seed, asked.only), sep="\n")
        return
    result = fuzz(asked.cases, asked.seed, asked.seconds, asked.memory_gb)
    print(json.dumps({key: value for key, value in result.items() if key != "failures"}))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
