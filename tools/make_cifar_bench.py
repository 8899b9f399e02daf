"""The data of ``benchmarks/cifar10.py`` from CIFAR-10 as the hub has it: training rows, and half of the test images.

    hf download uoft-cs/cifar10 --repo-type dataset --include '*.parquet' --local-dir cifar10
    python tools/make_cifar_bench.py --train cifar10/plain_text/train-00000-of-00001.parquet \
        --test cifar10/plain_text/test-00000-of-00001.parquet --out bench
    FACTORY_BENCH_DIR=bench python benchmarks/cifar10.py …

Images become JPEGs of quality 75, as those behind benchmarks/RESULTS.md are. The test half is the file's first 5,000;
theirs is another random half, so numbers differ a little by that alone.
"""

import argparse
import io
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HALF = 5_000


def jpeg(encoded: bytes) -> bytes:
    """An image file's bytes as a JPEG of Pillow's default quality, 75."""
    with io.BytesIO() as out:
        Image.open(io.BytesIO(encoded)).convert("RGB").save(out, "JPEG", quality=75)
        return out.getvalue()


def read(source: Path, rows: int | None = None) -> tuple[list[bytes], list[int]]:
    """JPEGs and labels of (the first ``rows`` of) a Parquet file with the columns ``img``, a struct with ``bytes``, and
    ``label``. Ends the script where ``source`` is another file."""
    try:
        table = pq.read_table(source).slice(0, rows)
    except (pa.ArrowInvalid, OSError) as error:
        sys.exit(f"{source} is no Parquet file that can be read: {error}")
    if missing := {"img", "label"} - set(table.column_names):
        sys.exit(f"{source} has no column {' or '.join(sorted(missing))}: expected the hub's uoft-cs/cifar10")
    return [jpeg(img["bytes"]) for img in table["img"].to_pylist()], table["label"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if absent := [str(file) for file in (args.train, args.test) if not file.is_file()]:
        parser.error(f"{' and '.join(absent)}: no such file; see --help for where it comes from")
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = read(args.train)
    keys = [f"train-{i:05d}" for i in range(len(images))]
    table = pa.table({"key": keys, "jpg": images, "label": pa.array(labels, pa.int16())})
    test = list(zip(*read(args.test, HALF), strict=True))
    made = args.out / "unfinished"  # a killed call leaves nothing that the benchmark would read
    pq.write_table(table, made)
    made.replace(args.out / "cifar10-train.parquet")
    with tarfile.open(made, "w") as tar:
        for i, (image, label) in enumerate(test):
            for suffix, content in (("jpg", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"test-{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    made.replace(args.out / "cifar10-test-a.tar")
    print(f"{len(images)} training rows and {len(test)} test images in {args.out}")


if __name__ == "__main__":
    main()
