"""Coverage-guided fuzzing of the five readers that take foreign bytes, with atheris (``pip install atheris``).

    python benchmarks/coverage_fuzz.py READER [--seconds 600] [--keep 40]

READER: tar, manifest, rows, sealed (JSON with a checksum: done records, descriptions, plans, model configurations) or
settings. Each may return or raise the errors that it documents, in one line; atheris stops at anything else, at 10 s or
at 2 GB, and the input is printed. Inputs start from ``benchmarks/corpus/READER.txt`` (a line each, base64 of zlib),
into which those that reach new code are merged, the smallest first; ``tests/benchmarks/test_corpus.py`` replays them.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CORPUS = ROOT / "benchmarks" / "corpus"
MAX_SEED = 16_000


@contextlib.contextmanager
def one_line(*more: type[Exception]) -> Iterator[None]:
    """Passes, or an error made for users, or one of ``more`` that a reader documents, of one line."""
    from manifests.errors import FactoryError

    try:
        yield
    except (FactoryError, *more) as error:
        if "\n" in str(error).strip():
            raise AssertionError(f"more than a line: {error}") from error


def read_tar(data: bytes) -> None:
    from manifests.tars import TarCheck, walk

    with one_line():
        for sample in walk(io.BytesIO(data)):
            assert "/" not in sample.key
    for checked in TarCheck(io.BytesIO(data), 0):
        assert "\n" not in (checked.flaw or "")


def read_manifest(data: bytes) -> None:
    """Bytes of a Parquet file; after a zero, a description that is put into an intact one, its checksum right."""
    import pyarrow.parquet as pq

    from manifests.reader import Manifest
    from manifests.schema import write_options

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "m.parquet"
        path.write_bytes(data)
        if data[:1] == b"\0":
            metadata = {"factory.info": data[1:], "factory.info_sha256": hashlib.sha256(data[1:]).hexdigest()}
            first = next(entry for entry in corpus("manifest") if entry[:4] == b"PAR1")
            table = pq.read_table(io.BytesIO(first))
            kept = {key: value for key, value in table.schema.metadata.items() if key.decode() not in metadata}
            pq.write_table(table.replace_schema_metadata(kept | metadata), path, **write_options())
        with one_line():
            manifest = Manifest.open(folder, skip_bad=True)
            selection = manifest.where("label >= 0 and class_name != 'x'", include_rejected=True)
            for index in range(min(len(selection), 3)):
                selection.row(index)
            selection.column("prompt")


def read_rows(data: bytes) -> None:
    from manifests.schema import parse_row, row_json, to_table

    with one_line(ValueError):
        row = parse_row(data, 512, 100)
        assert parse_row(row_json(row), 512, 100) == row
        to_table([row])


def read_sealed(data: bytes) -> None:
    from manifests.checked_json import dump_checked, load_checked
    from manifests.dataset import DatasetInfo
    from manifests.shard import DoneRecord
    from pipeline.plan import Plan
    from stages.models.source import parse_config

    with one_line(ValueError):
        values = load_checked(data)
        assert load_checked(dump_checked(values)) == values
    readers: tuple[Callable[[], object], ...] = (
        lambda: DoneRecord.from_json(data, "done/000000.json"),
        lambda: DatasetInfo.from_json(data, "dataset.json"),
        lambda: Plan.from_json(data, "plan.json"),
        lambda: parse_config(data, "config.json"),
    )
    for read in readers:
        with one_line(ValueError):
            read()


def read_settings(data: bytes) -> None:
    from pipeline.recipe import resolve, to_yaml

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder, one_line():
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(data)
        to_yaml(resolve(str(path), environ={}))


READERS: dict[str, Callable[[bytes], None]] = {
    "tar": read_tar,
    "manifest": read_manifest,
    "rows": read_rows,
    "sealed": read_sealed,
    "settings": read_settings,
}


def corpus(reader: str) -> list[bytes]:
    """Its inputs, the first an intact file."""
    return [zlib.decompress(base64.b64decode(line)) for line in (CORPUS / f"{reader}.txt").read_text().split()]


def child(reader: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["manifests", "stages", "pipeline", "yaml", "tarfile"]):
        for entry in corpus(reader)[:1]:
            READERS[reader](entry)  # imports what it needs
    atheris.Setup(arguments, READERS[reader])
    atheris.Fuzz()


def fuzz(reader: str, seconds: int, keep: int) -> int:
    """Fuzz for ``seconds``, then merge what is new into the corpus. Returns the exit code of libFuzzer."""
    with tempfile.TemporaryDirectory() as scratch:
        me = Path(scratch) / "again"  # a program that libFuzzer can start for a merge
        command = shlex.join([sys.executable, str(Path(__file__).resolve()), "--child", reader])
        me.write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n')
        me.chmod(0o755)
        found, merged = Path(scratch) / "found", Path(scratch) / "merged"
        for folder in (found, merged):
            folder.mkdir()
        before = corpus(reader)
        for entry in before:
            (merged / hashlib.sha256(entry).hexdigest()).write_bytes(entry)
        limits = ["-timeout=10", "-rss_limit_mb=2048", f"-max_len={4 * MAX_SEED}", f"-artifact_prefix={scratch}/"]
        options = [f"-max_total_time={seconds}", "-print_final_stats=1", *limits]
        code = subprocess.run([me, *options, found, merged], cwd=scratch).returncode
        for bad in Path(scratch).glob("*-*"):
            print(f"{bad.name}: {base64.b64encode(bad.read_bytes()).decode()}")
        subprocess.run([me, "-merge=1", *limits, merged, found], cwd=scratch, check=True)
        new = sorted((path.read_bytes() for path in merged.iterdir()), key=len)
        new = [entry for entry in new if len(entry) <= MAX_SEED and entry not in before][: max(0, keep - len(before))]
        lines = [base64.b64encode(zlib.compress(entry, 9)).decode() for entry in (*before, *new)]
        (CORPUS / f"{reader}.txt").write_text("\n".join(lines) + "\n")
    return code


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", type=int, default=40, help="inputs of the corpus at most")
    asked = parser.parse_args()
    sys.exit(fuzz(asked.reader, asked.seconds, asked.keep))


if __name__ == "__main__":
    main()
