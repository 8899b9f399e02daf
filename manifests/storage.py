"""The one seam to files: a dataset or run folder, local or behind any fsspec URL (``s3://``, ``gs://``, ``memory://``).

Every command reads and writes its folder through :class:`Storage`, so atomic writes, create-if-absent, retries and
one-line errors are decided here once.
"""

import errno
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast

from manifests.backends import RemoteBackend
from manifests.errors import DataError, FactoryError, StalledError, StoreError, UsageError, check_utf8, one_line
from manifests.local import LocalBackend

T = TypeVar("T")
P = ParamSpec("P")

RETRY_DELAYS = (0.2, 1.0, 4.0)
"""Seconds before the second, third and fourth attempt; object-store clients also retry by themselves."""

STREAM_BUFFER = 4 << 20
MAX_RECORD = 64 << 20
"""Bytes of a file that is read whole, unless its reader says more: of a plan of 100,000 class names, say."""
MAX_LINE = 1 << 20
_NUMBERED = re.compile(r"([0-9]{6,8})\.json", re.ASCII)
_TOGETHER = 256
_LOCAL_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT}
LASTING: tuple[type[Exception], ...] = (PermissionError, FileExistsError, ValueError, TypeError, ImportError)
LASTING += (NotImplementedError, AttributeError, MemoryError)


def check_name(name: str) -> str:
    """``name`` if it stays inside its folder; names in manifests and done records are somebody else's input."""
    parts = name.split("/")
    if not name or "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"unsafe file name {name!r}: expected a relative path inside the dataset folder")
    return name


def check_url(text: str) -> str:
    """``text`` if it can be a folder or file. Raises UsageError where it is empty, a scheme alone (``s3://``) or not
    UTF-8."""
    scheme, separator, path = text.rpartition("://")
    if not path.strip() or (separator and not path.strip("/ ") and scheme != "file"):
        raise UsageError(f"{text!r} names no file or folder: give a path or a URL")
    if "\0" in text:
        raise UsageError(f"{text!r}: a name without NUL characters")
    return check_utf8(text)


@dataclass
class Patience:
    """How long a store may give no answer: after ``warn_seconds`` ``on_wait`` gets a line that says what is waited for,
    after ``stall_seconds`` the wait ends in :class:`StalledError`."""

    stall_seconds: float = 60.0
    on_wait: Callable[[str], object] | None = None
    warn_seconds: float = 10.0


PATIENCE = Patience()
"""Of every command; the command line sets it."""
SLOWEST = 256 << 10
"""Bytes a second that an upload may be as slow as: how far it got cannot be seen."""
DOWN_SECONDS = 5.0
"""How long a store that gave no answer is waited for again."""


class Storage:
    """A folder. Names are relative to it and use ``/``. Instances can be pickled and used after a fork.

    Errors: a missing file is a :class:`DataError` naming it; a symbolic link or special file below a local root,
    whatever was to be done there, a :class:`LinkError`; a store that keeps failing is a :class:`StoreError`.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = check_url(os.fspath(url))
        local = text.removeprefix("file://")
        if local != text and not local.startswith("/"):
            raise UsageError(f"{text}: expected file:///ABSOLUTE/PATH, or the path alone")
        self._down = False
        self.is_local = "://" not in local and "::" not in local
        self._backend: LocalBackend | RemoteBackend
        if self.is_local:
            self.url = os.path.abspath(os.path.expanduser(local))
            self._backend = LocalBackend(self.url)
            return
        self.url = text.rstrip("/")
        last = text.rpartition("::")[2]  # of a chain, simplecache::s3://…
        if not last[last.find("://") + 3 if "://" in last else 0 :].strip("/"):
            raise UsageError(f"{text}: names no folder: expected, for example, s3://BUCKET/FOLDER")
        try:
            self._backend = RemoteBackend(self.url)
        except ImportError as error:
            raise UsageError(f"{self.url}: this kind of URL needs another package: {error}") from None
        except OSError as error:
            raise StoreError(f"{self.url}: cannot open: {one_line(error)}") from None
        except Exception as error:  # whatever one of fsspec's file systems does with this URL
            raise UsageError(f"{self.url}: not a folder that fsspec can open: {one_line(error)}") from None

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def path(self, name: str) -> str:
        """What a person would type to reach ``name``."""
        return f"{self.url}/{name}" if name else self.url

    def refuse_file(self) -> None:
        """Raises :class:`UsageError` where this is a local file, or lies below one."""
        path = self.url
        while self.is_local and not os.path.exists(path):
            path = os.path.dirname(path)
        if self.is_local and not os.path.isdir(path):
            raise UsageError(f"{path} is a file; --out names a folder")

    def hold(self) -> None:
        """Work in this folder from now on, if it is there: once it is moved, deleted or replaced, every access of this
        instance raises :class:`GoneError`, and nothing is made where it was."""
        if isinstance(self._backend, LocalBackend):
            self._run("open", "", self._backend.hold)

    def _wait_for(self, call: Callable[[], T], name: str, until: float) -> T:
        """``call``, in a thread that is left behind where the store gives no answer."""
        ended: Future[T] = Future()

        def run() -> None:
            try:
                ended.set_result(call())
            except BaseException as error:
                ended.set_exception(error)

        threading.Thread(target=run, daemon=True, name="store").start()
        began = time.monotonic()
        for limit in (min(began + PATIENCE.warn_seconds, until), until):
            wait([ended], max(0.0, limit - time.monotonic()))
            if ended.done():
                return ended.result()
            if limit < until and PATIENCE.on_wait:
                silent = f"no answer for {time.monotonic() - began:.0f} s"
                PATIENCE.on_wait(
                    f"waiting for {self.path(name)}: {silent}; this goes on for {until - time.monotonic():.0f} s more"
                )
        self._down = True
        raise StalledError(
            f"{self.path(name)}: no answer for {time.monotonic() - began:.0f} s; the same command resumes, and "
            "FACTORY_STALL_SECONDS says how long to wait"
        )

    def _missing(self, name: str) -> DataError:
        """The error for a file that is not there; a bucket that is not there is said as such."""
        bucket = "" if isinstance(self._backend, LocalBackend) else self._backend.missing_bucket()
        if bucket:
            return DataError(f"{self.path(name)}: there is no bucket {bucket!r}: make it, or check the name")
        return DataError(f"{self.path(name)}: no such file")

    def _run(self, action: str, name: str, call: Callable[[], T], size: int = 0) -> T:
        """``call``, which moves ``size`` bytes to a store, with retries; its last failure as one line.

        After a call that failed for good the next ones are tried once, until one succeeds: a run that ends because
        its store is down must not wait again for every note that it leaves.
        """
        delays = () if self._down else RETRY_DELAYS
        until = time.monotonic() + (DOWN_SECONDS if self._down else PATIENCE.stall_seconds) + size / SLOWEST
        for delay in (*delays, None):
            try:
                result = call() if self.is_local else self._wait_for(call, name, until)
                self._down = False
                return result
            except FactoryError:
                raise
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(name) from None
            except IsADirectoryError:
                raise DataError(f"{self.path(name)}: is a folder, expected a file") from None
            except Exception as error:
                local = self.is_local and getattr(error, "errno", None) not in _LOCAL_TRANSIENT
                lasting = local or isinstance(error, LASTING)
                if lasting or delay is None:
                    self._down = not lasting
                    raise StoreError(f"{self.path(name)}: cannot {action}: {one_line(error)}") from error
                time.sleep(delay * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _do(self, action: str, name: str, call: Callable[Concatenate[str, P], T], *args: P.args, **kw: P.kwargs) -> T:
        """:meth:`_run` a method of the backend on the file ``name``."""
        full = self._backend.full(check_name(name))
        return self._run(action, name, lambda: call(full, *args, **kw))

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        return self._do("look up", name, self._backend.size)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file directly in ``folder``, by name relative to the root; one listing, sorted by name."""
        full = self._backend.full(check_name(folder) if folder else "")
        found = self._run("list", folder, lambda: self._backend.sizes(full))
        return {f"{folder}/{name}".lstrip("/"): size for name, size in sorted(found.items())}

    def list(self, folder: str) -> list[str]:
        """Sorted names of the files directly in ``folder``, relative to the root; [] where it is absent."""
        return [*self.sizes(folder)]

    def read(self, name: str, most: int | None = MAX_RECORD) -> bytes:
        """A whole file; more than ``most`` bytes are a :class:`DataError`, before memory is taken for them."""
        data = self._do("read", name, self._backend.read, most)
        if most is not None and len(data) > most:
            raise DataError(f"{self.path(name)}: has more than {most} bytes, which no such file has")
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer are a :class:`DataError`."""
        data = self._do("read", name, self._backend.read_range, offset, size)
        if len(data) != size:
            raise DataError(f"{self.path(name)}: ends inside bytes {offset}..{offset + size}: the file is cut short")
        return data

    def start_range(self, name: str, offset: int, size: int) -> Future[bytes]:
        """Begin to read a range of a remote file: one attempt, whose result may be short and errors are the store's."""
        assert isinstance(self._backend, RemoteBackend)
        return self._backend.start_range(self._backend.full(check_name(name)), offset, size)

    def read_many(self, names: Iterable[str]) -> Iterator[bytes]:
        """Whole small files, fetched together where the store can."""
        if isinstance(self._backend, LocalBackend):
            yield from map(self.read, names)
            return
        wanted = [*names]
        for start in range(0, len(wanted), _TOGETHER):
            full = [self._backend.full(check_name(name)) for name in wanted[start : start + _TOGETHER]]
            yield from self._run("read", wanted[start], partial(self._backend.read_many, full))

    def open(self, name: str) -> BinaryIO:
        """A seekable stream for reading; remote ones fetch a few MB at a time, with retries."""
        if isinstance(self._backend, LocalBackend):
            return self._do("read", name, self._backend.open)
        size = self.size(name)
        if size is None:
            raise self._missing(name)
        return cast(BinaryIO, io.BufferedReader(_RangeStream(self, name, size), STREAM_BUFFER))

    def lines(self, name: str, start: int = 0, stop: int | None = None, most: int = MAX_LINE) -> Iterator[bytes]:
        """The lines of a file in its bytes ``start`` to ``stop``, one by one in bounded memory; those of ``most`` bytes
        or more are left out. Raises DataError for one of more than ``MAX_RECORD``, as zeros that take no disk make."""
        with self.open(name) as file:
            file.seek(start)
            left = stop - start if stop is not None else None
            part, left_out = b"", 0  # what has come of the line at hand, and bytes of it that are passed over
            while block := self._run("read", name, partial(file.read, most if left is None else min(most, left))):
                left = None if left is None else left - len(block)
                *ended, last = block.split(b"\n")
                for line in ended:
                    if not left_out and len(part) + len(line) < most:
                        yield part + line + b"\n"
                    part, left_out = b"", 0
                part += last
                if left_out or len(part) >= most:
                    part, left_out = b"", left_out + len(part)
                if left_out > MAX_RECORD:
                    raise DataError(f"{self.path(name)}: has a line of more than {MAX_RECORD} bytes, as no log has")
            if part and not left_out:
                yield part

    def write(self, name: str, data: bytes, beside: bool = False) -> None:
        """Create or replace: readers see the old file or the new one, never a part.

        ``beside``: staged next to it, so that a folder that is only read gets no ``tmp/``.
        """
        full = self._backend.full(check_name(name))
        self._run("write", name, lambda: self._backend.write(full, data, beside), len(data))

    def append(self, name: str, data: bytes) -> bool:
        """Add to the end of a file of a local root, made where it is absent. False where the root itself is absent."""
        if not isinstance(self._backend, LocalBackend):
            raise UsageError(f"{self.path(name)}: a store cannot append")
        return self._do("write", name, self._backend.append, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write unless the file exists: True if this call made it.

        Also where the reply of an attempt was lost, and a client that tries again by itself was told that the file
        exists: a remote file with exactly this ``data`` counts as made.
        """
        attempts = 0

        def attempt(full: str) -> bool:
            nonlocal attempts
            attempts += 1
            return self._backend.create(full, data)

        made = self._do("write", name, attempt)
        return made or ((attempts > 1 or not self.is_local) and self.read(name) == data)

    def put_file(self, local_path: str | Path, name: str) -> None:
        """Publish a finished local file, which is moved away; the target is replaced at once or not at all."""
        full, path = self._backend.full(check_name(name)), Path(local_path)
        size = 0 if self.is_local else path.stat().st_size
        self._run("write", name, lambda: self._backend.put_file(full, path), size)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        self._do("delete", name, self._backend.delete)

    def folder(self, name: str) -> str:
        """What to type to reach the folder ``name``, there already or not, for a root of its own or another library."""
        return self._do("open", name, self._backend.folder)

    def temporary(self) -> tuple[dict[str, int], Sequence[str]]:
        """Bytes of the files and folders in ``tmp/`` that have names of this program, and the names of all else there.

        Remote roots have none.
        """
        return self._run("list", "tmp", self._backend.temporary)

    def drop_temporary(self, name: str) -> None:
        """Remove one of :meth:`temporary`, with what is in it."""
        self._do("delete", f"tmp/{name}", self._backend.drop)

    def scratch(self) -> Path:
        """A local folder for temporary files: ``tmp/`` of a local root, else one that goes with this process."""
        return self._run("make a temporary folder", "tmp", self._backend.scratch)


class _RangeStream(io.RawIOBase):
    """A remote file as a seekable stream over :meth:`Storage.read_range`."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            buffer[:count] = self._storage.read_range(self._name, self._at, count)
            self._at += count
        return count


def numbered(storage: Storage, folder: str) -> dict[int, str]:
    """The files of ``folder`` called by a number of six or more digits (``000012.json``), by that number."""
    found = ((name, _NUMBERED.fullmatch(name.rpartition("/")[2])) for name in storage.list(folder))
    return {int(match[1]): name for name, match in found if match}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes into :meth:`Storage.scratch` by itself: a disk that refuses is one line naming the folder."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot write: {one_line(error)}") from error


def split(url: str | os.PathLike[str]) -> tuple[Storage, str]:
    """A file's URL as (its folder, its name)."""
    text = check_url(os.fspath(url))
    folder, slash, name = text.rstrip("/").rpartition("/")
    if not name or folder.endswith(":/"):
        raise UsageError(f"{text!r}: expected the path of a file")
    return Storage(folder or slash or "."), name
