"""How fast stage 2 reads, beside plain ``webdataset`` on the very same shards.

    python benchmarks/reading.py [--images 16384] [--rounds 3] [--out FOLDER] [--json FILE]

Every row ends in uint8 or float batches of 256 images of 32×32 in one process. ``webdataset``: shuffled shards and
sample buffer, decode, batch; with and without the same augmentation per sample (crop of a padded image, flip).
``cached``: what ``factory run distill`` does from the second epoch on: global shuffle, crop and flip, floats in
[−1, 1]. ``streamed``: the same where images do not fit the memory budget. Images a second of CPU time (of all threads)
and of wall time, median over rounds.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("WDS_SECURE", "1")

import webdataset

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import ShardWriter, done_records
from manifests.storage import Storage
from stages.distill.batches import Batches, Pixels
from stages.distill.rows import EpochOrder, select_rows
from stages.settings import DistillSettings

SIDE, BATCH, SHARDS, PAD = 32, 256, 4, 4
CPU = torch.device("cpu")


def write_images(folder: Path, count: int) -> str:
    """Smooth coloured textures, whose PNGs are about as large as those of photographs of this size."""
    storage, rng = Storage(folder), np.random.default_rng(0)
    for shard in range(SHARDS):
        with ShardWriter(storage, shard, "benchmark") as writer:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                fine = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
                noisy = np.clip(fine + rng.integers(-8, 9, fine.shape), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noisy).save(buffer, "PNG")
                row = {"label": number % 10, "class_name": str(number % 10), "method": "texture", "trajectory": number}
                writer.add(row | {"kept": True}, buffer.getvalue())
            writer.commit()
    names = tuple(map(str, range(10)))
    merge(storage, DatasetInfo("benchmark", {}, {}, {}, SIDE, names), list(done_records(storage)))
    return f"{folder}/m.parquet"


def plain_webdataset(tars: list[str], augment: bool) -> Iterator[Any]:
    """Batches as a training script would read them."""
    rng = np.random.default_rng(0)

    def view(image: np.ndarray) -> np.ndarray:
        if not augment:
            return image
        padded = np.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
        y, x = rng.integers(0, 2 * PAD + 1, 2)
        cut = padded[y : y + SIDE, x : x + SIDE]
        return cut[:, ::-1] if rng.random() < 0.5 else cut

    data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000, seed=0).decode("rgb8")
    yield from data.to_tuple("png", "json").map_tuple(view, lambda row: row["label"]).batched(BATCH)


def ours(manifest: str, memory_gb: float) -> tuple[Batches, float]:
    """Batches of stage 2 on this machine's CPU, and the seconds of CPU time that opening them took."""
    started = time.process_time()
    settings = DistillSettings.model_validate(
        {"batch_size": BATCH, "val_fraction": 0, "augment": {"crop": PAD / SIDE, "flip": True, "cutmix": 0, "mixup": 0}}
    )
    rows = select_rows([(Manifest.open(manifest), 1.0)], settings)
    order = EpochOrder(rows, np.arange(len(rows)), settings)
    batches = Batches(rows, order, Pixels(rows, memory_gb, CPU), settings, CPU)
    return batches, time.process_time() - started


def rate(batches: Iterator[Any], images: int) -> tuple[float, float]:
    """Images a second of CPU time, and of wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in batches:
        pass
    return images / (time.process_time() - cpu), images / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        manifest = write_images(folder, options.images)
        tars = sorted(map(str, folder.glob("shards/*.tar")))
        cached, opening = ours(manifest, memory_gb=4)
        streamed, _ = ours(manifest, memory_gb=0)
        readers: dict[str, Callable[[int], Iterator[Any]]] = {
            "webdataset, decoded": lambda _: plain_webdataset(tars, False),
            "webdataset, decoded and augmented": lambda _: plain_webdataset(tars, True),
            "streamed, augmented": lambda e: streamed.stream(e * streamed.steps, (e + 1) * streamed.steps),
            "cached, augmented": lambda e: cached.stream(e * cached.steps, (e + 1) * cached.steps),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for number in range(options.rounds):
            for name, read in readers.items():
                found[name].append(rate(read(number), options.images))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    base = medians["webdataset, decoded"]
    print(f"{options.images} images, {SIDE}×{SIDE}, {SHARDS} shards, batches of {BATCH}\n")
    print("| reader | images / CPU s | × webdataset | images / s | × webdataset |")
    print("|---|---|---|---|---|")
    for name, (cpu, wall) in medians.items():
        print(f"| {name} | {cpu:,.0f} | {cpu / base[0]:.1f} | {wall:,.0f} | {wall / base[1]:.1f} |")
    print(f"\nfilling the cache, once a run: {options.images / opening:,.0f} images / CPU s")
    if options.json:
        result = {name: {"per_cpu_second": cpu, "per_second": wall} for name, (cpu, wall) in medians.items()}
        options.json.write_text(json.dumps(result | {"filling": options.images / opening}, indent=1) + "\n")


if __name__ == "__main__":
    main()
