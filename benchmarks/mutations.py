"""What ``benchmarks/fuzz.py`` changes: bytes at random, or one value of JSON, metadata, a column or a state.

``mutated`` and ``poisoned`` make the change; each other function applies it to one kind of file below a folder, with
every checksum made right again where the change is to be met behind it.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from manifests.checked_json import SEAL, dump_checked
from manifests.dataset import DATASET
from manifests.schema import write_options
from stages.distill import checkpoint
from stages.models.source import WEIGHTS_SHA256

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 63, 1 << 200, 10**18, -0.5, 1e-320, 1e308, float("inf"), float("nan"),
    "", "x", "../../etc/passwd", "/etc/passwd", "\x1b[31m\n<b>\u202e", "\ud800", "a" * 100_000, "os:getcwd", "hf:a/b",
    "\0", "9" * 5000, [], {}, [[]], [None], {"": None}, ["x"] * 1000, {"x": {"x": {"x": []}}}, [1e308] * 3,
)  # fmt: skip


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


def json_file(path: Path, rng: random.Random) -> None:
    """A JSON file: its bytes, or one value under a new dump_checked."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(mutated(data, rng))
        return
    lines = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else [json.loads(data)]
    number = rng.randrange(len(lines))
    sealed = isinstance(lines[number], dict) and lines[number].pop(SEAL, None) is not None
    values = poisoned(lines[number], rng)
    try:
        text = dump_checked(values) if sealed and isinstance(values, dict) else json.dumps(values).encode()
    except (ValueError, RecursionError):  # what our own writer cannot write
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
    (home / "config.json").write_bytes(dump_checked(config | {WEIGHTS_SHA256: hashlib.sha256(data).hexdigest()}))


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


ODD_YAML = (
    "!!timestamp x", "!!bool x", "!!set {a}", "!!python/name:os.system", "&a [*a]", "{<<: {a: 1}}", "0x_", "2020-13-45",
    "!!float x", "!!binary x", '"\\ud83d"', "? [a]", "[" * 3000, "{a: " * 3000, "1:60:60:60.5", "- " * 500, "\0",
)  # fmt: skip


def odd_recipe(folder: Path, rng: random.Random) -> None:
    """One value of the settings, spelled as YAML has it and JSON does not."""
    path = folder / "resolved.yaml"
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].partition(":")[0]
    lines[at] = f"{key}: {rng.choice(ODD_YAML)}"
    path.write_text("\n".join(lines))


def special(folder: Path, rng: random.Random) -> None:
    """Something in a file's place that is none, or one of terabytes without content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".html")
    path = rng.choice(files)
    path.unlink()
    match rng.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.symlink_to(rng.choice([other for other in files if other != path]))
        case 3:
            path.mkdir()
        case 4:
            with path.open("wb") as file:
                file.truncate(1 << 40)


def archive(folder: Path, rng: random.Random) -> None:
    """One member of a tar: its name, type, claimed size, headers, or a value of its JSON."""
    path = rng.choice([folder / "labeled.tar", *sorted((folder / "shards").glob("*.tar"))])
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
    number = rng.randrange(len(members))
    changed, data = members[number]
    choice = rng.randrange(6)
    if choice == 0:
        changed.name = rng.choice(
            ("../x.png", "/etc/x.png", "", "x" * 300, "a\x1b[31m.png", "\udcff.png", "a.cls", "a.json")
        )
    elif choice == 1:
        changed.type = rng.choice((b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"\xff"))
        changed.linkname = rng.choice(("", "/etc/passwd", changed.name))
    elif choice == 2:
        changed.pax_headers = {
            rng.choice(("size", "path", "GNU.sparse.map", "mtime")): rng.choice(("9" * 30, "-1", "x", "\0"))
        }
    elif choice == 3 and changed.name.endswith(".json"):
        data = json.dumps(poisoned(json.loads(data), rng)).encode()
    elif choice == 4:
        members.insert(rng.randrange(len(members)), members[number])
    buffer = io.BytesIO()
    with contextlib.suppress(ValueError, OverflowError), tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, content in members:
            content = data if member is changed else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    made = bytearray(buffer.getvalue())
    if choice == 5:
        at = rng.randrange(max(len(made) // 512, 1)) * 512 + 124  # where a header has its size
        made[at : at + 12] = rng.choice(
            (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"x" * 12)
        )
    path.write_bytes(made)


def labeled(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(("labeled.tar", "labeled.parquet"))
    path.write_bytes(mutated(path.read_bytes(), rng))
