"""What workers add and what the engine costs: the demo recipe with 1 and 2 workers, and the share that is not sampling.

    python benchmarks/scaling.py [--shards 8] [--workers 1 2] [--rounds 3]

Images a second count from the first latent to the last committed shard (start-up of Ray and loading of models apart).
Overhead: one worker in this process, timed inside: sampling and scoring against writing, checking and committing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # actors import the packages too

from manifests.shard import done_records  # noqa: E402
from manifests.storage import Storage  # noqa: E402
from pipeline.recipe import Recipe, resolve  # noqa: E402
from pipeline.synth import run_synth  # noqa: E402


def timed_run(recipe: Recipe, workers: int) -> dict[str, float]:
    """One run: shards' own seconds, and the wall time from the first shard handed out to the last one committed."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        result = run_synth(recipe, folder, workers=workers, quiet=True)
        total = time.monotonic() - started
        events = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]
        assert len(done_records(Storage(folder))) == recipe.synth.shards
    moments = {
        kind: [event["time"] for event in events if event["kind"] == kind] for kind in ("shard_started", "shard_done")
    }
    busy = max(moments["shard_done"]) - min(moments["shard_started"])
    return {"images_per_s": result.rows / busy, "busy_s": busy, "start_and_merge_s": total - busy}


def overhead(recipe: Recipe) -> dict[str, float]:
    """Share of a shard's time outside sampling, teacher scores and image encoding."""
    from stages.synth.worker import ShardWorker

    sampling = 0.0
    original = ShardWorker.make_group_samples

    def clocked(*args):  # type: ignore[no-untyped-def]
        nonlocal sampling
        started = time.monotonic()
        made = original(*args)
        sampling += time.monotonic() - started
        return made

    ShardWorker.make_group_samples = clocked  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            worker = ShardWorker(recipe.synth, folder, "0" * 64)
            worker.run(10_000)  # warm-up
            sampling, started = 0.0, time.monotonic()
            for shard in range(recipe.synth.shards):
                worker.run(shard)
            total = time.monotonic() - started
    finally:
        ShardWorker.make_group_samples = original  # type: ignore[method-assign]
    return {"sampling_s": sampling, "tar_parquet_commit_s": total - sampling, "share": (total - sampling) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    recipe = resolve("demo", sets=[f"synth.shards={args.shards}", "synth.groups_per_shard=1"])
    runs = {n: [] for n in args.workers}
    for _ in range(args.rounds):  # in turn, so that a slow minute hits every row
        for workers in args.workers:
            runs[workers].append(timed_run(recipe, workers))
    print("| workers | images / s | × one | start-up and merge s |\n|---|---|---|---|")
    base = median(r["images_per_s"] for r in runs[args.workers[0]])
    for workers, made in runs.items():
        rate = median(r["images_per_s"] for r in made)
        print(f"| {workers} | {rate:.1f} | {rate / base:.2f} | {median(r['start_and_merge_s'] for r in made):.1f} |")
    cost = overhead(recipe)
    print(
        f"\nsampling {cost['sampling_s']:.2f} s, tar + Parquet + commit {cost['tar_parquet_commit_s']:.2f} s: "
        f"{cost['share']:.2%} of a worker's time"
    )
    print(json.dumps({"runs": runs, "overhead": cost}))


if __name__ == "__main__":
    main()
