"""How long a merge of ten million manifest rows takes, what memory it needs, and how fast selections on them are.

    python benchmarks/big_manifest.py [--rows 10000000] [--shards 1000] [--out FOLDER] [--json FILE]

Tables, done records and (empty, sparse) tars of a run are made up first, about 1.5 GB on disk; then ``merge`` and each
selection run in a process of their own, whose CPU time and largest resident memory are reported.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from manifests.dataset import MIN_SAMPLE, DatasetInfo  # noqa: E402
from manifests.merge import merge  # noqa: E402
from manifests.reader import Manifest  # noqa: E402
from manifests.schema import SCHEMA  # noqa: E402
from manifests.shard import declare_done, make_record, publish, write_shard_table  # noqa: E402
from manifests.storage import Storage  # noqa: E402

CLASSES = tuple(f"class {number}" for number in range(100))
INFO = DatasetInfo("0" * 64, {"name": "big"}, {}, {}, 32, CLASSES)
SELECTIONS = (
    None,
    "label == 3",
    "confidence >= 0.9 and teacher_label == label",
    "class_name == 'class 7' and prompt != 'x' and margin / 2 > 0.1",
)


def first_table(rows: int) -> pa.Table:
    """Rows as stage 1 writes them, with random scores and checksums."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, len(CLASSES), rows).astype(np.int32)
    kept = rng.random(rows) < 0.9
    names, prompts = pa.array(CLASSES), pa.array([f"a realistic photo of {name}, natural light" for name in CLASSES])
    index = pa.array(label)
    columns: dict[str, Any] = {
        "offset": np.arange(rows, dtype=np.int64) * MIN_SAMPLE + 512,
        "size": rng.integers(400, 512, rows).astype(np.int32),
        "xxh3": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))]),
        "label": label,
        "class_name": names.take(index),
        "prompt": prompts.take(index),
        "method": ["diffdfkd"] * rows,
        "seed": np.zeros(rows, np.int64),
        "trajectory": np.arange(rows, dtype=np.int32),
        "step": np.full(rows, 49, np.int16),
        "timestep": np.zeros(rows, np.int32),
        "lca": pa.array([[]] * rows, SCHEMA.field("lca").type),
        "teacher_label": np.where(rng.random(rows) < 0.8, label, 0).astype(np.int32),
        "kept": kept,
        "reject_reason": pa.array(np.where(kept, None, "confidence").tolist(), pa.string()),
    }
    for name in ("cosine", "confidence", "entropy", "margin", "loss_ce", "loss_bn"):
        columns[name] = rng.random(rows, dtype=np.float32)
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=pa.schema([field.with_nullable(True) for field in SCHEMA]))


def shard_table(first: pa.Table, shard: int) -> pa.Table:
    """The same rows, kept once more in another shard."""
    rows = first.num_rows
    own = {
        "key": pa.array([f"{shard:06d}-{number:06d}" for number in range(rows)]),
        "shard": pa.array(np.full(rows, shard, np.int32)),
        "group": pa.array(np.arange(rows, dtype=np.int32) // 50 + shard * (rows // 50)),
    }
    for name, values in own.items():
        first = first.set_column(SCHEMA.get_field_index(name), name, values)
    return first.cast(SCHEMA)


def make_run(storage: Storage, shards: int, rows: int) -> None:
    """A folder as stage 1 leaves it, but that its tars hold nothing."""
    first = first_table(rows)
    kept = [{"kept": value} for value in first["kept"].to_pylist()]
    for shard in range(shards):
        table, path = shard_table(first, shard), storage.scratch() / f"{shard}.parquet"
        write_shard_table(table, path, shard, INFO.fingerprint)
        digest = hashlib.sha256(str(shard).encode()).hexdigest()
        record = make_record(shard, digest, rows * MIN_SAMPLE + 10240, path, kept, INFO.fingerprint)
        publish(storage, path, record.table)
        with open(storage.path(record.tar), "wb") as file:
            file.truncate(record.tar_bytes)
        declare_done(storage, record)


def step(folder: str, number: int) -> dict[str, Any]:
    """Merge (−1) or one selection, in this process."""
    before, started = time.process_time(), time.perf_counter()
    found = merge(Storage(folder), INFO).rows if number < 0 else len(Manifest.open(folder).where(SELECTIONS[number]))
    return {
        "rows": found,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - before, 2),
        "rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a folder on the disk to measure; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--step", nargs=2, metavar=("FOLDER", "NUMBER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(step(asked.step[0], int(asked.step[1]))))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        make_run(Storage(folder), asked.shards, asked.rows // asked.shards)
        print("| work | rows | seconds | CPU s | RSS GB |\n|---|---|---|---|---|")
        for number in range(-1, len(SELECTIONS)):
            command = [sys.executable, __file__, "--step", folder, str(number)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            work = "merge" if number < 0 else f"select {SELECTIONS[number] or 'kept'}"
            results.append({"work": work, **json.loads(done.stdout)})
            values = (f"{results[-1][name]:,}" for name in ("rows", "seconds", "cpu_seconds", "rss_gb"))
            print(f"| {work} | {' | '.join(values)} |", flush=True)
        size = os.path.getsize(Path(folder) / "m.parquet")
        print(f"m.parquet: {size / 1e6:,.0f} MB")
    result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "manifest_bytes": size, "steps": results}
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
