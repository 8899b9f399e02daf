"""Stage 2 in front of an object store 30 ms away, beside plain ``webdataset`` (and peers) on the same images.

    python benchmarks/streaming.py [--images 1200] [--tars 24] [--step-rate 150] [--peers FOLDER] [--json FILE]

Every row is a pass over images of 256×256 px (PNG) in batches of 64, decoded, in a process of its own; ``local`` is
``factory run distill``'s reader on local tars, ``ranges`` on the store without a cache (``one request at a time``: as
any reader with random access does by default), ``cold`` with an empty one and ``warm`` with a full one, all in a global
shuffle and with crop and flip. ``webdataset`` reads the tars one after
another, shuffled by a buffer of 1,000 images, or by one of all images, in one process or with a loader process for each
core. ``wait`` is the share of the time for which a step finds no batch, where a step takes as long as an accelerator
that trains ``--step-rate`` images a second (it sleeps: the cores are free for decoding). ``--peers`` is a folder into
which pip installed ``litdata``; without it that is left out.
"""

import argparse
import importlib
import importlib.util
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WDS_SECURE", "1")
SIDE, BATCH, DISTINCT = 256, 64, 64
STORE = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
ROWS = {
    "ours, local": ("ours", "local", "none"),
    "ours, one request at a time": ("serial", "s3", "none"),
    "ours, ranges": ("ours", "s3", "none"),
    "ours, cold": ("ours", "s3", "empty"),
    "ours, warm": ("ours", "s3", "full"),
    "webdataset, buffer of 1,000": ("webdataset", "s3", "1000"),
    "webdataset, buffer of all": ("webdataset", "s3", "all"),
    "webdataset, loaders, buffer of all": ("loaders", "s3", "all"),
}
PEERS = {
    "litdata, cold": ("litdata", "s3", "empty"),
    "litdata, warm": ("litdata", "s3", "full"),
}


def pictures() -> list[bytes]:
    """Smooth textures with noise, whose PNGs are about as large as those of photographs."""
    import numpy as np
    from PIL import Image

    rng, made = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        buffer = io.BytesIO()
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, "PNG", compress_level=3)
        made.append(buffer.getvalue())
    return made


def write_dataset(folder: Path, count: int, tars: int, images: list[bytes]) -> None:
    from manifests.dataset import DatasetInfo
    from manifests.merge import merge
    from manifests.shard import ShardWriter, done_records
    from manifests.storage import Storage

    storage = Storage(folder)
    for shard in range(tars):
        with ShardWriter(storage, shard, "benchmark") as writer:
            for number in range(shard * count // tars, (shard + 1) * count // tars):
                row = {"label": number % 10, "class_name": str(number % 10), "method": "texture", "trajectory": number}
                writer.add(row | {"kept": True}, images[number % DISTINCT])
            writer.commit()
    names = tuple(map(str, range(10)))
    merge(storage, DatasetInfo("benchmark", {}, {}, {}, SIDE, names), list(done_records(storage)))


def write_peers(folder: Path, count: int, tars: int, images: list[bytes], peers: list[str]) -> None:
    """The same images in the formats of the peers."""
    if "litdata" in peers:
        from litdata.streaming.writer import BinaryWriter

        (folder / "lit").mkdir()
        binary = BinaryWriter(str(folder / "lit"), chunk_size=count // tars)
        for number in range(count):
            binary[number] = {"png": images[number % DISTINCT], "label": number % 10}
        binary.done()
        binary.merge()


def installed(folder: str) -> list[str]:
    """The peers that can be imported."""
    sys.path.append(folder)
    return ["litdata"] if importlib.util.find_spec("litdata") else []


def ours(url: str, cache: str | None, where: str | None = None) -> Iterator[Any]:
    import numpy as np
    import torch

    from manifests.reader import Manifest
    from stages.distill.batches import Batches
    from stages.distill.rows import EpochOrder, select_rows
    from stages.distill.streaming import Pixels, Stream
    from stages.settings import DistillSettings

    augment = {"flip": True, "cutmix": 0, "mixup": 0}
    settings = DistillSettings.model_validate(
        {"batch_size": BATCH, "val_fraction": 0, "augment": augment, "cache_dir": cache, "where": where}
    )
    rows = select_rows([(Manifest.open(url), 1.0)], settings)
    with Stream(rows, settings, lambda line: print(line, file=sys.stderr)) as stream:
        pixels = Pixels(rows, 0, torch.device("cpu"), stream)
        order = EpochOrder(rows, np.arange(len(rows)), settings)
        batches = Batches(rows, order, pixels, settings, torch.device("cpu"))
        yield from (batch.x for batch in batches.stream(0, batches.steps))


def webdataset(tars: list[str], buffer: int, loaders: int) -> Iterator[Any]:
    import webdataset as wds

    if tars[0].startswith("s3://"):
        import fsspec

        wds.gopen_schemes["s3"] = lambda url, *_, **__: fsspec.open(url, "rb").open()
    data = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(buffer, initial=buffer, seed=0).decode("rgb8")
    data = data.to_tuple("png", "json").map_tuple(_plain, lambda row: row["label"]).batched(BATCH)
    yield from (wds.WebLoader(data, batch_size=None, num_workers=loaders) if loaders else data)


def _plain(image: Any) -> Any:
    return image


def litdata(url: str, cache: str) -> Iterator[Any]:
    from litdata import StreamingDataset

    client = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    yield from _loaded(StreamingDataset(f"{url}/lit", cache_dir=cache, shuffle=True, storage_options=client))


def _loaded(data: Any) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    yield from DataLoader(data, batch_size=BATCH, num_workers=os.cpu_count() or 1, collate_fn=_decoded)


def _decoded(samples: list[dict[str, Any]]) -> Any:
    import numpy as np

    from manifests.images import decode

    return np.stack([decode(sample["png"], SIDE) for sample in samples])


def measure(kind: str, place: str, extra: str, options: argparse.Namespace) -> dict[str, float]:
    """Two passes in this process, at full speed and in steps. Of the first: images/s (of wall and CPU time), seconds to
    the first batch, requests, peak memory; of the second the share of the time without a batch."""
    if kind == "batch":
        return one_batch(f"s3://bucket/{options.out.name}/m.parquet")
    for module in ("webdataset", "stages.distill.run"):  # no part of what is timed
        importlib.import_module(module)

    root = f"s3://bucket/{options.out.name}" if place == "s3" else str(options.out)

    def batches() -> Iterator[Any]:
        cache = None if extra == "none" else str(options.cache)
        if extra == "empty":
            shutil.rmtree(options.cache, ignore_errors=True)
        if kind == "serial":
            importlib.import_module("manifests.fetch").AT_ONCE = 1  # type: ignore[attr-defined]
            for module in ("streaming", "batches"):
                importlib.import_module(f"stages.distill.{module}").FETCHED_AHEAD = 1  # type: ignore[attr-defined]
        if kind in ("ours", "serial"):
            return ours(f"{root}/m.parquet", cache, options.where)
        if kind in ("webdataset", "loaders"):
            tars = [f"{root}/shards/{path.name}" for path in sorted(options.out.glob("shards/*.tar"))]
            loaders = (os.cpu_count() or 1) if kind == "loaders" else 0
            return webdataset(tars, options.images if extra == "all" else int(extra), loaders)
        return litdata(root, str(cache))

    before = requests()
    images, seconds, cpu, first, _ = one_pass(batches(), 0.0)
    asked = requests() - before
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    wait = one_pass(batches(), BATCH / options.step_rate)[4] if options.step_rate else 0.0
    return {
        "images": images,
        "rate": images / seconds,
        "per_cpu_second": images / cpu,
        "first": first,
        "wait": wait,
        "requests": 1000 * asked / images,
        "megabytes": peak[0] / 1024,
        "child_megabytes": peak[1] / 1024,
    }


def one_batch(url: str, count: int = 256) -> dict[str, float]:
    """Seconds to fetch ``count`` images at random, each one a request: one after another, and together."""
    import numpy as np

    from manifests import fetch, reader

    reader.GAP_REMOTE = 0
    manifest = reader.Manifest.open(url)
    rows = np.random.default_rng(0).permutation(len(manifest))[:count]
    manifest.read_many(rows[:2])  # a client, its connection
    seconds = {}
    for name, at_once in (("together", fetch.AT_ONCE), ("one after another", 1)):
        fetch.AT_ONCE = at_once
        started, before = time.perf_counter(), requests()
        manifest.read_many(rows)
        seconds[name] = time.perf_counter() - started
        seconds["requests"] = requests() - before
    return seconds


def one_pass(batches: Iterator[Any], step: float) -> tuple[int, float, float, float, float]:
    """Images, seconds, CPU seconds, seconds to the first batch, and the share of the rest that was spent waiting."""
    started, cpu, images, waited, first = time.perf_counter(), time.process_time(), 0, 0.0, 0.0
    asked = started
    for batch in batches:
        now = time.perf_counter()
        first = first or now - started
        waited += now - asked if images else 0.0
        images += len(batch[0] if isinstance(batch, (list, tuple)) else batch)
        time.sleep(step)
        asked = time.perf_counter()
    seconds = time.perf_counter() - started
    return images, seconds, time.process_time() - cpu, first, waited / (seconds - first)


def child(row: tuple[str, str, str], options: argparse.Namespace, where: str = "") -> dict[str, float]:
    """:func:`measure` in a fresh process; empty where it failed."""
    command = [sys.executable, __file__, "--child", *row, "--out", str(options.out), "--cache", str(options.cache)]
    command += ["--images", str(options.images), "--where", where]
    command += ["--step-rate", "0" if where else str(options.step_rate)]
    env = os.environ | ({"PYTHONPATH": options.peers} if options.peers else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, env=env, check=False, timeout=300)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def requests() -> int:
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/requests") as answer:
        return int(json.load(answer)["requests"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--tars", type=int, default=24)
    parser.add_argument("--step-rate", type=float, default=150)
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--peers", default="")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--where", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.out, options.cache = Path(temporary) / "bucket" / "data", Path(temporary) / "cache"
        images = pictures()
        write_dataset(options.out, options.images, options.tars, images)
        peers = installed(options.peers) if options.peers else []
        write_peers(options.out, options.images, options.tars, images, peers)
        command = [sys.executable, str(ROOT / "benchmarks/slow_store.py"), temporary]
        store = subprocess.Popen([*command, "--latency", str(options.latency)], stdout=subprocess.PIPE, text=True)
        try:
            assert store.stdout
            os.environ.update(STORE | {"AWS_ENDPOINT_URL": store.stdout.readline().strip()})
            report(options, sum(map(len, images)) / DISTINCT, peers)
        finally:
            store.kill()


def report(options: argparse.Namespace, size: float, peers: list[str]) -> None:
    rows = {name: row for name, row in (ROWS | PEERS).items() if options.only in name}
    print(f"{options.images} images of {SIDE} px, {size / 1000:.0f} kB each, {options.tars} tars, batches of {BATCH}\n")
    print("| reader | images/s | images / CPU s | first batch, s | wait | requests / 1,000 images | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for name, row in rows.items():
        if name in PEERS and row[0] not in peers:
            continue
        result = child(row, options)
        if not result:
            print(f"| {name} | failed | | | | |", flush=True)
            continue
        found[name] = result
        memory = f"{result['megabytes']:,.0f}"
        if row[0] in ("loaders", "litdata"):
            memory += f" + {os.cpu_count()} × {result['child_megabytes']:,.0f}"
        print(
            f"| {name} | {result['rate']:,.0f} | {result['per_cpu_second']:,.0f} | {result['first']:.2f} | "
            f"{result['wait']:.1%} | {result['requests']:,.0f} | {memory} |",
            flush=True,
        )
    if "ours" in options.only or not options.only:
        part = child(ROWS["ours, warm"], options, f"shard < {options.tars // 2}")
        print(f"\npeak memory of the warm one with half of the images: {part.get('megabytes', 0):,.0f} MB")
    batch = child(("batch", "s3", "none"), options)
    print(
        f"\na batch of 256 images at random, {batch['requests']:.0f} requests: {batch['together']:.2f} s together, "
        f"{batch['one after another']:.2f} s one after another"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
