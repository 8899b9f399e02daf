"""Does a change keep every byte? Checksums of what the program makes, of one checkout, to be compared with another's.

    python benchmarks/golden.py parent.json --root PARENT --frozen DIR
    python benchmarks/golden.py child.json --root CHILD --frozen DIR
    python benchmarks/golden.py --compare parent.json child.json

Run both on the same machine, in the same Python environment. ``--root`` (default: the checkout of this file) comes
first on the path. Where settings or commands were renamed in between, run each checkout with its own copy of this file,
since the cases call them by their names. ``--compare`` prints what differs and exits 1 if anything does. Two runs of
one checkout must not differ. The numbers depend on the machine and on libraries, so none is checked in.

Where names of settings changed, plans and descriptions differ everywhere. ``--compare A B --leaf 'tar › images' --leaf
tensors --leaf '› columns'`` then compares the images, the students' weights and the manifests' columns alone (any part
of a path in the records, or a pattern of ``fnmatch``). ``--shown 0`` names the cases only.

``--only PATTERN`` runs the cases whose name matches (``fnmatch``, or part of a name); ``--list`` prints the names;
``--slow`` adds the cases that start Ray; ``--keep DIR`` leaves their folders there.

The program is driven through the ``factory`` command (in this process, each case in a fork of it), YAML and files, so
that modules may move. All names of settings that the cases use stand in one table, ``benchmarks/golden_cases.py``.

``--frozen DIR`` (default: ``golden-frozen`` beside OUT.json) holds what both runs must share: tiny random models,
datasets and a student. It is built by the first run and only read from then on; its digest is recorded as well. Stage 2
needs it because a student depends on more of a dataset than its rows: the order of an epoch follows from a digest of
the manifest, augmentation from the fingerprint. From datasets that the checkouts made themselves, students differ once
a setting or a key of the description is renamed. The frozen manifests hold no recipe, so renamed settings do not
matter to them. Where the format of files changes (``FORMAT_VERSION``, a column, a key of ``config.json``), the child
cannot read the parent's DIR: give it another one; the cases of stage 2 cannot be compared then (the differences
name ``frozen``). Cases run in ``DIR.work``, since some files hold absolute paths: two runs that are compared need
the same DIR for that, too.
"""

import argparse
import contextlib
import difflib
import fcntl
import fnmatch
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("pipeline", "stages", "manifests")
ENTRY = ("pipeline.cli", "main")  # the command in this process: reads sys.argv, ends in SystemExit
APP = ("pipeline.cli", "app")  # the typer application, for the list of commands
ENVIRONMENT = {
    "COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1", "TZ": "UTC", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
SECONDS = 300
"""After which a case is killed."""

TIMED = frozenset(
    {
        "time",
        "seconds",
        "data_wait",
        "versions",
        "images_per_second",
        "shards_per_hour",
        "seconds_left",
        "since",
        "latency_ms",
        "trace",
    }
    | {"started", "images_per_s", "waited", "pid", "host", "machine", "token", "worker", "driver"}
)
"""Keys of JSON whose values differ from run to run."""
UNSTABLE = (
    "plan.json", "run.json", "results.json", "events.jsonl", "metrics.jsonl", "checkpoint.pt", "README.md",
    "report.html",
)  # fmt: skip
"""Files with versions, times or tracebacks inside: compared by their normalized content, not by their sha256."""
SKIPPED = ("lease", "tmp")
"""Folders of which only the presence of files is left out altogether."""
SUBSTITUTES = (
    (r"\b\d+ h \d\d min\b|\b\d+ min \d\d s\b|\b\d+(\.\d+)? s\b", "<duration>"),
    (r"[\d.e+-]+( images)?/s\b", r"<rate>\1/s"),
    (r"data wait \d+%", "data wait <share>"),
    (r"[\d.]+ ms per image", "<rate> ms per image"),
    (r"\bpid \d+", "pid <pid>"),
    (r"0x[0-9a-f]{6,}", "<address>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d", "<when>"),
)
PROGRESS = re.compile(r"^([\w ]+): [\d.e+]+/[\d.e+]+(, .*)?$")  # how many are printed depends on the machine's speed


class Run:
    """A case under way: ``factory`` calls, and what is recorded of them and of the files they leave."""

    def __init__(self, root: Path, frozen: Path, folder: Path) -> None:
        self.root, self.frozen, self.folder = root, frozen, folder
        self.record: dict[str, Any] = {}
        self.surprises: list[str] = []

    def factory(self, *arguments: object, label: str | None = "call", expect: int | None = 0) -> dict[str, Any]:
        """``factory ARGUMENTS``: exit code, stdout, stderr, normalized, recorded as ``label`` (None: not at all).

        An exit code that is not ``expect`` (None: any) is printed, since the case then hardly tests what it is for.
        """
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["factory", *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = 0
            try:
                getattr(importlib.import_module(ENTRY[0]), ENTRY[1])()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:  # a traceback for the user
                code = self.text(f"{type(error).__name__}: {error}")
        found = {"code": code, "out": self.text(out.getvalue()), "err": self.text(err.getvalue())}
        if "--json" in arguments:
            with contextlib.suppress(ValueError):
                found["out"] = self.values(json.loads(out.getvalue()))
        if label:
            self.keep(label, found)
        if expect is not None and code != expect:
            self.surprises.append(f"{' '.join(sys.argv)[:150]}: exit {code}: {str(found['err'])[-300:]}")
        return found

    def keep(self, label: str, value: Any) -> None:
        """Record ``value``; a label that is taken gets a number."""
        name, number = label, 1
        while name in self.record:
            number += 1
            name = f"{label} {number}"
        self.record[name] = value

    def files(self, folder: str | Path, label: str | None = None) -> None:
        """Record every file below ``folder``."""
        root = self.folder / folder
        found: dict[str, Any] = {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not path.is_symlink() and not set(Path(name).parts[:-1]) & {*SKIPPED}:
                known = re.sub(r"-[0-9a-f]{12}\.", ".", name)  # shard files are named by their content
                found[name if known in found else known] = self.file(path)
        self.keep(label or f"files {folder}", found)

    def file(self, path: Path) -> dict[str, Any]:
        """What is compared of one file."""
        data = path.read_bytes()
        found: dict[str, Any] = (
            {} if path.name in UNSTABLE or path.parent.name == "failed" else {"sha256": sha256(data)}
        )
        with contextlib.suppress(ValueError):
            if path.suffix == ".json":
                found["json"] = self.values(json.loads(data))
            elif path.name == "events.jsonl":
                found["events"] = [event_shape(json.loads(line)) for line in data.splitlines()]
            elif path.suffix == ".jsonl":
                found["lines"] = [self.values(json.loads(line)) for line in data.splitlines()]
            elif path.suffix in (".yaml", ".md"):
                found["text"] = self.text(data.decode())
        if path.suffix == ".tar":
            found |= tar_parts(path)
        elif path.suffix == ".parquet":
            found |= self.table(path)
        elif path.suffix == ".safetensors":
            found |= tensors(path)
        return found

    def table(self, path: Path) -> dict[str, Any]:
        """Columns by their content, and the metadata."""
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except Exception as error:  # a damaged one
            return {"unreadable": type(error).__name__}
        columns = {
            name: f"{table.schema.field(name).type} {sha256(repr(table[name].to_pylist()).encode())[:16]}"
            for name in table.column_names
        }
        metadata: dict[str, Any] = {}
        for key, value in (table.schema.metadata or {}).items():
            try:
                metadata[key.decode()] = self.values(json.loads(value))
            except ValueError:
                metadata[key.decode()] = self.text(value.decode("utf-8", "replace"))
        return {"rows": table.num_rows, "columns": columns, "metadata": metadata}

    def values(self, value: Any) -> Any:
        """JSON without what differs from run to run."""
        if isinstance(value, dict):
            found = {key: f"<{key}>" if key in TIMED else self.values(each) for key, each in value.items()}
            if TIMED & value.keys() and "checksum" in found:
                found["checksum"] = "<checksum>"
            return found
        if isinstance(value, list):
            return [self.values(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        """Text without paths, durations and intermediate lines of progress."""
        places = {self.folder: "<case>", self.frozen: "<frozen>", self.root: "<root>", HERE.parent: "<root>"}
        places |= {Path.home(): "<home>", Path(sys.prefix): "<prefix>", Path(sys.base_prefix): "<prefix>"}
        for path, name in places.items():
            for spelled in {str(path), str(path.resolve())}:
                text = text.replace(spelled, name)
        for pattern, substitute in SUBSTITUTES:
            text = re.sub(pattern, substitute, text)
        return "".join(last_progress(text.splitlines(keepends=True)))


def last_progress(lines: list[str]) -> Iterator[str]:
    """``lines`` with only the last line of progress under each title, and no bars of libraries."""
    last = {match[1]: number for number, line in enumerate(lines) if (match := PROGRESS.match(line.rstrip("\n")))}
    for number, line in enumerate(lines):
        match = PROGRESS.match(line.rstrip("\n"))
        if "it/s]" in line or "s/it]" in line or "?it" in line or (match and last[match[1]] != number):
            continue
        yield line


def event_shape(event: dict[str, Any]) -> str:
    """An event's kind and the names of its fields."""
    return f"{event.get('kind')}: {' '.join(sorted(event.keys() - {'kind', 'time'}))}"


def tar_parts(path: Path) -> dict[str, Any]:
    """Names, images and rows of a tar, apart."""
    names, parts = [], {"images": hashlib.sha256(), "rows": hashlib.sha256()}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                content = tar.extractfile(member)
                kind = "rows" if member.name.endswith((".json", ".cls")) else "images"
                parts[kind].update(content.read() if content else b"")
    except tarfile.TarError as error:
        return {"unreadable": str(error)}
    digests = {name: digest.hexdigest() for name, digest in parts.items()}
    return {"members": len(names), "names": sha256("\n".join(names).encode()), **digests}


def tensors(path: Path) -> dict[str, Any]:
    """Every tensor's content, whatever the file's metadata say."""
    from safetensors import SafetensorError, deserialize

    try:
        found = sorted(deserialize(path.read_bytes()))
    except SafetensorError as error:
        return {"unreadable": str(error)}
    return {"tensors": {n: f"{t['dtype']} {t['shape']} {sha256(bytes(t['data']))[:16]}" for n, t in found}}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_sha256(folder: Path) -> str:
    """Of names and contents of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256("".join(f"{path.relative_to(folder)} {sha256(path.read_bytes())}\n" for path in files).encode())


def preload(root: Path) -> None:
    """Import libraries and the checkout's modules once, before the forks. Ray stays out: it does not like forks."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        if not Path(str(package.__file__)).resolve().is_relative_to(root):
            sys.exit(f"golden: {name} comes from {package.__file__}, not from {root}")
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if "ray" not in module.name:
                with contextlib.suppress(Exception):
                    importlib.import_module(module.name)
    import torch

    torch.set_num_threads(1)


def forked(work: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What ``work()`` returns, called in a fork of this process; a text where that dies or hangs."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            there.send(work())
            code = 0
        except BaseException:
            there.send({"harness": traceback.format_exc()})
        finally:
            there.close()
            os._exit(code)
    there.close()
    try:
        found = here.recv() if here.poll(seconds) else {"harness": f"killed after {seconds:g} s"}
    except EOFError:
        found = {"harness": "died without a word"}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found


def run_case(case: Callable[[Run], None], root: Path, frozen: Path, folder: Path) -> dict[str, Any]:
    """One case in a folder of its own, the frozen models and data linked into it; what it recorded."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    (folder / "frozen").symlink_to(frozen)
    for code in frozen.glob("*.py"):  # a user's own modules are found in the current folder
        (folder / code.name).symlink_to(code)
    os.environ["FACTORY_CACHE"] = str(folder / "cache")
    os.environ["HOME"] = os.environ["HF_HOME"] = str(folder / "home")
    run = Run(root, frozen, folder)
    try:
        case(run)
    except Exception:
        run.record["harness"] = run.text(traceback.format_exc())
        run.surprises.append(str(run.record["harness"]))
    return {"record": run.record, "surprises": run.surprises}


@contextlib.contextmanager
def work_folder(frozen: Path) -> Iterator[Path]:
    """``DIR.work`` beside the frozen folder, empty, for one run at a time."""
    work = frozen.with_name(f"{frozen.name}.work")
    with frozen.with_name(f"{frozen.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"golden: another run works in {work}: wait, or give another --frozen")
        shutil.rmtree(work, ignore_errors=True)
        yield work
        shutil.rmtree(work, ignore_errors=True)


def collect(names: Iterable[str], cases: dict[str, Callable[[Run], None]], args: argparse.Namespace) -> dict[str, Any]:
    """The records of the cases ``names``."""
    frozen, root, found = args.frozen.resolve(), args.root.resolve(), {}
    with work_folder(frozen) as work:
        for name in names:
            begun = time.monotonic()
            folder = work / "case"
            result = forked(lambda name=name, folder=folder: run_case(cases[name], root, frozen, folder))
            found[name] = result.get("record", result)
            print(f"{time.monotonic() - begun:6.1f} s  {name}", file=sys.stderr, flush=True)
            for line in result.get("surprises", [str(result)] if "record" not in result else []):
                print(f"          {line}", file=sys.stderr, flush=True)
            if args.keep:
                shutil.copytree(folder, args.keep / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    return found


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of JSON by their path."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from flat(each, f"{prefix} › {key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from flat(each, f"{prefix} › {number}")
    else:
        yield prefix, value


def matches(text: str, patterns: Sequence[str]) -> bool:
    """Whether ``text`` is or contains one of ``patterns``."""
    return any(fnmatch.fnmatch(text, pattern) or pattern in text for pattern in patterns)


def differences(a: dict[str, Any], b: dict[str, Any], leaves: Sequence[str] = ()) -> Iterator[str]:
    """A line for each leaf that differs (of those whose path matches ``leaves``, if any); of texts their diff."""
    left, right = dict(flat(a)), dict(flat(b))
    for path in [*left, *(path for path in right if path not in left)]:
        if leaves and not matches(path, leaves):
            continue
        if path not in right or path not in left:
            yield f"{path}: only in {'the first' if path in left else 'the second'}"
        elif left[path] != right[path]:
            one, two = left[path], right[path]
            if isinstance(one, str) and isinstance(two, str) and "\n" in one + two:
                lines = list(difflib.unified_diff(one.splitlines(), two.splitlines(), lineterm="", n=0))[2:]
                yield "\n".join([f"{path}:", *(f"    {line}" for line in lines[:20])])
            else:
                yield f"{path}: {one!r} | {two!r}"


def derived(line: str) -> bool:
    """Whether a difference is but the checksum of something that is compared as well."""
    return any(word in line.partition(": ")[0] for word in ("sha256", "checksum", "digest", "done/", "› size", "tars"))


def compare(first: Path, second: Path, shown: int = 40, leaves: Sequence[str] = ()) -> int:
    """Print what differs between two files of records, causes before checksums; 1 where anything does."""
    one, two = (json.loads(path.read_text()) for path in (first, second))
    for path, here, there in ((first, one, two), (second, two, one)):
        if alone := [name for name in here if name not in there]:
            print(f"{len(alone)} cases only in {path}: {', '.join(alone[:5])}{' …' if len(alone) > 5 else ''}")
    differing = 0
    for name in [name for name in one if name in two and one[name] != two[name]]:
        lines = list(differences(one[name], two[name], leaves))
        if not lines:
            continue
        differing += 1
        print(f"{name}: {len(lines)} differences")
        for line in sorted(lines, key=derived)[:shown]:
            print("\n".join(f"  {part}" for part in line.splitlines()))
        if shown and len(lines) > shown:
            print(f"  … {len(lines) - shown} more (--shown)")
    both = len(one.keys() & two.keys())
    print(f"{differing} of {both} cases differ" if differing else f"{both} cases, no difference")
    return int(bool(differing or one.keys() ^ two.keys()))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="checkout that is run (default: this one)")
    parser.add_argument("--frozen", type=Path, help="models and data that both runs share, built if absent")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="cases whose name matches; repeatable")
    parser.add_argument("--slow", action="store_true", help="also the cases that start Ray")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the cases' folders there")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"))
    parser.add_argument("--shown", type=int, default=40, help="differences printed of each case")
    parser.add_argument("--leaf", metavar="PATTERN", action="append", help="compare only what lies at these paths")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare, args.shown, args.leaf or ())
    for name in [name for name in os.environ if name.startswith("FACTORY_")]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(args.root.resolve()))
    sys.path[:] = [str(args.root.resolve()), str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
    import golden_commands  # noqa: F401
    from golden_cases import CASES, SLOW, build_frozen

    wanted = args.only or [""]
    names = [name for name in CASES if matches(name, wanted) and (args.slow or args.only or name not in SLOW)]
    if args.list:
        print("\n".join(names))
        return 0
    if args.out is None or not names:
        parser.error("give OUT.json, --compare A B or --list" if names else f"no case matches {wanted}")
    out = args.out.resolve()
    args.frozen = (args.frozen or out.parent / "golden-frozen").resolve()
    args.keep = args.keep and args.keep.resolve()
    begun = time.monotonic()
    preload(args.root.resolve())
    if not args.frozen.exists():
        built = args.frozen.with_name(args.frozen.name + ".building")
        shutil.rmtree(built, ignore_errors=True)
        result = forked(lambda: run_case(build_frozen, args.root.resolve(), args.frozen, built), 600)
        if result.get("surprises") or "record" not in result:
            sys.exit(f"golden: {args.frozen} could not be built: {result}")
        (built / "frozen").unlink()
        shutil.rmtree(built / "home", ignore_errors=True)
        built.rename(args.frozen)
        print(f"{time.monotonic() - begun:6.1f} s  built {args.frozen}", file=sys.stderr, flush=True)
    before = folder_sha256(args.frozen)
    found = {"frozen": {"sha256": before}} | collect(names, CASES, args)
    if folder_sha256(args.frozen) != before:
        print(f"golden: a case changed {args.frozen}: delete it before the next run", file=sys.stderr)
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    used = sum(os.times()[:4])
    print(f"{len(found)} cases in {time.monotonic() - begun:.0f} s ({used:.0f} s of CPU): {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
