"""Mutated files through the readers and commands: no traceback, no hang, no memory blow-up, no raw output.

    python benchmarks/fuzz.py [--cases 5000] [--seed 0] [--json FILE]

Every case changes one file of a small dataset, run or model: bytes at random, or one value of its JSON, metadata,
column or state replaced by a hostile one with every checksum made right again. Then a command reads it. It may work or
end in an error made for users; anything else is printed with its number, so that ``--only NUMBER`` shows its traceback.
Cases run in a child process with ``--memory-gb`` more address space than it starts with and ``--seconds`` of CPU each.
"""

import argparse
import contextlib
import faulthandler
import hashlib
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
import yaml  # noqa: E402

from manifests.errors import FactoryError  # noqa: E402
from manifests.info import DATASET  # noqa: E402
from manifests.merge import merge  # noqa: E402
from manifests.reader import Manifest  # noqa: E402
from manifests.sealed import SEAL, seal  # noqa: E402
from manifests.storage import Storage  # noqa: E402
from manifests.tables import write_options  # noqa: E402
from pipeline import cli  # noqa: E402
from pipeline.executors.settings import ExecutorSettings  # noqa: E402
from pipeline.failures import Failure, quarantine  # noqa: E402
from pipeline.plan import read_plan  # noqa: E402
from pipeline.recipe import resolve, to_yaml  # noqa: E402
from pipeline.synth import dataset_info, run_synth  # noqa: E402
from pipeline.teacher_copy import prepare, publish  # noqa: E402
from stages.distill import checkpoint  # noqa: E402
from stages.models.identity import WEIGHTS_SHA256  # noqa: E402
from stages.synth.plan_inputs import inspect_inputs  # noqa: E402

SETS = ("method=noise", "shards=2", "groups_per_shard=1", "group_size=8", "images.size=8")
STUDENT = ("--epochs", "1", "--batch-size", "4", "--set", "held_out=0")
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 63, 1 << 200, 10**18, -0.5, 1e-320, 1e308, float("inf"), float("nan"),
    "", "x", "../../etc/passwd", "/etc/passwd", "\x1b[31m\n<b>\u202e", "\ud800", "a" * 100_000, "os:getcwd", "hf:a/b",
    "\0", "9" * 5000, [], {}, [[]], [None], {"": None}, ["x"] * 1000, {"x": {"x": {"x": []}}}, [1e308] * 3,
)  # fmt: skip


class Hang(BaseException):
    """A case took more CPU time than it may."""


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite something."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(changed) or 1), rng.choice((1, 4, 64, 512))
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at : at + length] = rng.randbytes(length)
            case 5:
                changed[at : at + length] = bytes([rng.choice((0, 255))]) * length
    return bytes(changed)


def poisoned(values: Any, rng: random.Random) -> Any:
    """``values`` with one entry, at any depth, replaced by something hostile, removed, renamed or nested deeply."""
    if isinstance(values, dict | list) and values and rng.random() < 0.85:
        copy: Any = values.copy()
        key = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
        if isinstance(copy, dict) and rng.random() < 0.08:
            copy[rng.choice(("", "x", "\x1b[2J"))] = copy.pop(key)
        elif rng.random() < 0.05:
            del copy[key]
        else:
            copy[key] = poisoned(copy[key], rng)
        return copy
    if rng.random() < 0.03:
        for _ in range(rng.choice((20, 200, 900))):
            values = [values]
        return values
    return rng.choice(HOSTILE)


# --- what is changed -------------------------------------------------------------------------------------------------


def json_file(path: Path, rng: random.Random) -> None:
    """A JSON file: its bytes, or one value under a new seal."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(mutated(data, rng))
        return
    lines = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else [json.loads(data)]
    number = rng.randrange(len(lines))
    sealed = isinstance(lines[number], dict) and lines[number].pop(SEAL, None) is not None
    values = poisoned(lines[number], rng)
    try:
        text = seal(values) if sealed and isinstance(values, dict) else json.dumps(values).encode()
    except ValueError:  # what our own writer cannot write
        text = json.dumps(values).encode()
    if path.suffix == ".jsonl":
        texts = data.splitlines()
        texts[number] = text
        text = b"\n".join(texts) + b"\n"
    path.write_bytes(text)


def some_json(folder: Path, rng: random.Random) -> None:
    names = ["plan.json", DATASET, "events.jsonl", "done/000000.json", "lease/*.json", "failed/000001.json"]
    names += ["distill/run.json", "distill/*/config.json", "distill/*/config.json"]
    json_file(rng.choice(sorted(folder.glob(rng.choice(names)))), rng)


def manifest(folder: Path, rng: random.Random) -> None:
    """m.parquet: its bytes, its description, or the values of a column."""
    path = folder / "m.parquet"
    if rng.random() < 0.3:
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    if rng.random() < 0.6:
        text = json.dumps(poisoned(json.loads(metadata[b"factory.info"]), rng)).encode()
        metadata |= {b"factory.info": text, b"factory.info_sha256": hashlib.sha256(text).hexdigest().encode()}
    else:
        index = rng.randrange(table.num_columns)
        field, values = table.schema.field(index), table.column(index).to_pylist()
        for row in rng.sample(range(len(values)), rng.choice((1, len(values)))):
            values[row] = rng.choice(HOSTILE)
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            table = table.set_column(index, field, pa.array(values, field.type))
        if rng.random() < 0.1:
            table = pa.concat_tables([table] * rng.choice((2, 500)))
    with contextlib.suppress(pa.ArrowException):
        pq.write_table(table.replace_schema_metadata(metadata), path, **write_options())


def shard(folder: Path, rng: random.Random) -> None:
    """A tar or table; a tar sometimes under the name of its new content, with the manifest following."""
    path = rng.choice(sorted((folder / "shards").iterdir()))
    data = mutated(path.read_bytes(), rng)
    path.write_bytes(data)
    if path.suffix == ".tar" and rng.random() < 0.3:
        path.rename(path.with_name(f"{path.name[:6]}-{hashlib.sha256(data).hexdigest()[:12]}.tar"))


def state(folder: Path, rng: random.Random) -> None:
    """The checkpoint of stage 2: its bytes, or an entry of the run or of its student, under a checksum that fits."""
    path = folder / "distill" / checkpoint.STATE
    if rng.random() < 0.5:
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    values = torch.load(io.BytesIO(checkpoint.without_digest(path.read_bytes())), weights_only=True)
    owner = rng.choice((values, values["students"], *values["students"].values()))
    owner[rng.choice([*owner])] = rng.choice(HOSTILE)
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(checkpoint.with_digest(buffer.getvalue()))


def weights(folder: Path, rng: random.Random) -> None:
    """A model's weights, whose sha256 its config then records."""
    home = next(path.parent for path in folder.glob("distill/*/config.json"))
    data = mutated((home / "model.safetensors").read_bytes(), rng)
    config = json.loads((home / "config.json").read_bytes())
    del config[SEAL]
    (home / "model.safetensors").write_bytes(data)
    (home / "config.json").write_bytes(seal(config | {WEIGHTS_SHA256: hashlib.sha256(data).hexdigest()}))


def recipe(folder: Path, rng: random.Random) -> None:
    path = folder / "resolved.yaml"
    text = path.read_bytes()
    if rng.random() < 0.4:
        path.write_bytes(mutated(text, rng))
    else:
        values = poisoned(yaml.safe_load(text), rng)
        try:
            path.write_text(yaml.safe_dump(values), errors="replace")
        except RecursionError:  # deeper than YAML's writer goes; its reader takes JSON too
            path.write_text(json.dumps(values))


def labelled(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(("labelled.tar", "labelled.parquet"))
    path.write_bytes(mutated(path.read_bytes(), rng))


# --- what reads it ---------------------------------------------------------------------------------------------------


def distill(*more: str) -> tuple[str, ...]:
    return ("run", "distill", "-m", "RUN/m.parquet", "-o", "RUN/distill", *STUDENT, *more)


MODEL = "RUN/distill/digits-cnn-small"
LOOK = (
    ("verify", "RUN"),
    ("inspect", "RUN/m.parquet", "--columns", "2"),
    ("status", "RUN"),
    ("gc", "RUN", "--dry-run"),
)
KEEP = (("rebuild", "RUN"), ("rescore", "RUN/m.parquet", "--threshold", "0.2"), ("eval", MODEL, "RUN/m.parquet"))
SYNTH = ("run", "synth", "-o", "RUN", *(text for value in SETS for text in ("--set", value)))
DRY = ("run", "synth", "-c", "RUN/resolved.yaml", "--dry-run", "-o", "RUN/new")
CASES: tuple[tuple[int, Callable[[Path, random.Random], None], tuple[tuple[str, ...], ...]], ...] = (
    (6, manifest, (*LOOK[:2], *KEEP, distill(), distill("--skip-bad"))),
    (4, shard, (*LOOK[:2], *KEEP, distill("--skip-bad", "-o", "RUN/again"), distill("-o", "RUN/again"))),
    (4, some_json, (*LOOK, *KEEP, distill(), SYNTH)),
    (2, recipe, (DRY, (*DRY, "--method", "noise"), (*DRY, "--method", "noise"))),
    (2, labelled, (("eval", MODEL, "RUN/labelled.tar"), ("eval", MODEL, "RUN/labelled.parquet"))),
    (1, state, (distill(),)),
    (1, weights, (("eval", MODEL, "RUN/m.parquet"),)),
)


def make_victim(folder: Path) -> None:
    """A finished run of both stages, a failure record, and labelled data of others."""
    made = resolve("demo", section="synth", sets=SETS, environ={})
    run_synth(made, str(folder), ExecutorSettings(), quiet=True)
    storage, inputs = Storage(folder), inspect_inputs(made.synth)
    copy = prepare(made.synth.teacher, inputs.teacher)
    publish(storage, copy)
    info = dataset_info(read_plan(storage), inputs, copy)
    storage.write(DATASET, info.to_json())
    merge(storage, info)
    storage.write("resolved.yaml", to_yaml(made))
    call([part.replace("RUN", str(folder)) for part in distill()])
    quarantine(storage, Failure(1, 3, "an error"))
    selection = Manifest.open(folder).select(kept=False)
    shutil.copy(folder / Manifest.open(folder).info.tars[0].name, folder / "labelled.tar")
    images = [selection.read(index) for index in range(4)]
    pq.write_table(pa.table({"png": images, "label": np.arange(4)}), folder / "labelled.parquet")


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
            print(json.dumps(result | {"cpu": time.process_time() - before}), flush=True)
    faulthandler.cancel_dump_traceback_later()


def results(victim: Path, seed: int, cases: int, seconds: int, memory_gb: float) -> Iterator[dict[str, Any]]:
    """The outcome of every case; a child that dies is a failed case, and another one goes on after it."""
    done = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
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
    found, kinds, failures, slowest, cpu = Counter[str](), Counter[str](), [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        make_victim(Path(folder) / "victim")
        for result in results(Path(folder) / "victim", seed, cases, seconds, memory_gb):
            found[result["outcome"]] += 1
            slowest, cpu = max(slowest, result.get("cpu", 0.0)), cpu + result.get("cpu", 0.0)
            kinds[f"{result['what'].split(':')[0]}, {result['outcome']}"] += 1
            if found.total() % 100 == 0:
                print(f"{found.total()} cases: {dict(found)}, {cpu:.0f} s of CPU", flush=True)
            if result["outcome"] == "failed":
                failures.append(result)
                print(f"case {result['case']} failed, {result['what']}: {result['error'][:200]}", flush=True)
    times = {"cpu_seconds": round(cpu), "slowest_cpu_seconds": round(slowest, 2)}
    return {"cases": cases, "seed": seed, **found, **times, "kinds": dict(sorted(kinds.items())), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
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
