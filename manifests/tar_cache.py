"""Whole tars of remote datasets in a local folder: bounded, shared by every process of a machine, safe to kill.

FOLDER/SHA256.tar    complete, and checked against the sha256 that its manifest records; modified when last used
FOLDER/SHA256.part   being fetched by whoever holds its lock; where nobody does, left by a killed process
FOLDER/jobs/ID       tars that a process reads, which holds its lock: they stay while it lives
FOLDER/lock          held while room is made

A tar is named by its content, so datasets share what they have in common and an old version is never mistaken for a
new one. The cache is a convenience: whatever goes wrong with it (a full disk, say), images are read from the store, and
each is compared with its own checksum wherever it comes from.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from manifests.dataset import TarInfo
from manifests.errors import DataError, FactoryError, StalledError, StoreError, UsageError, one_line
from manifests.fetch import fetch, parts
from manifests.shard import fault
from manifests.storage import Patience, Storage

_FILE = re.compile(r"([0-9a-f]{64})\.(tar|part)", re.ASCII)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_POLL = 0.2
"""Seconds between two looks at what another process does."""
_LOOK = 2.0
"""Seconds that a reader waits to learn which tars are there; the folder may be on a busy disk."""


class TarCache:
    """Reads of tars that are there, and a thread that fetches those that are not; no method but :meth:`wait` waits for
    the store. ``on_note`` gets lines for people, from that thread too.

    Least recently used tars make room for new ones, but none that a living process reads: two jobs that need more than
    ``limit`` bytes together each keep what they have, and read the rest from the store.
    """

    def __init__(
        self,
        folder: str,
        limit: float,
        patience: Patience | None = None,
        on_note: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.limit, self.patience, self._on_note = limit, patience or Patience(), on_note
        self._files = Storage(folder)
        if not self._files.is_local:
            raise UsageError(f"cache_dir {folder}: expected a folder of this machine")
        self.folder = self._files.url
        try:
            os.makedirs(self._path("jobs"), exist_ok=True)
            os.close(os.open(self._path("lock"), _FLAGS, 0o666))
        except OSError as error:
            raise UsageError(f"cache_dir {self.folder}: cannot be used: {one_line(error)}") from None
        self._here: set[str] = set()
        self._wanted: dict[str, tuple[Storage, TarInfo]] = {}
        self._job: tuple[str, int] | None = None
        self._thread: threading.Thread | None = None
        self._stop, self._looked = threading.Event(), threading.Event()
        self._stalled: StalledError | None = None
        self._altered: set[str] = set()
        self._said: set[str] = set()

    def __contains__(self, tar: TarInfo) -> bool:
        return tar.sha256 in self._here

    def read(self, tar: TarInfo, offset: int, size: int) -> bytes | None:
        """A range of a tar, None where it is not there."""
        if tar.sha256 in self._here:
            try:
                return self._files.read_range(_tar(tar.sha256), offset, size)
            except FactoryError:  # removed by hand, or cut short
                self._here.discard(tar.sha256)
        return None

    def drop(self, tar: TarInfo) -> None:
        """Remove a tar that does not hold what it should."""
        if tar.sha256 in self._here:
            self._here.discard(tar.sha256)
            self._note(f"{self._path(_tar(tar.sha256))}: damaged since it was fetched: removed, read from the store")
            with suppress(FactoryError):
                self._files.delete(_tar(tar.sha256))

    def want(self, tars: Iterable[tuple[Storage, TarInfo]]) -> None:
        """Begin to fetch those that are missing, in this order, and keep those that are there."""
        if self._thread and self._thread.is_alive():
            return
        self._wanted = {tar.sha256: (storage, tar) for storage, tar in tars}
        self._looked.clear()
        self._thread = threading.Thread(target=self._work, name="tar-cache", daemon=True)
        self._thread.start()
        self._looked.wait(_LOOK)

    def wait(self, tars: Iterable[TarInfo]) -> None:
        """Until these tars are there or will not be fetched. Raises StalledError where the store ended that."""
        for tar in tars:
            while tar.sha256 not in self._here and self._thread and self._thread.is_alive():
                time.sleep(0.01)
            if tar.sha256 not in self._here and self._stalled:
                raise self._stalled

    def close(self) -> None:
        """Stop fetching, and let others remove what this process has read."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=5)
        if self._job:
            with suppress(OSError, FactoryError), self._locked():
                self._touch()
                os.unlink(self._job[0])
            os.close(self._job[1])
            self._job = None

    def _work(self) -> None:
        try:
            with self._locked():
                self._pin()
                sizes = {name: size for name, size, _ in self._listed()}
                self._here = {sha for sha, (_, tar) in self._wanted.items() if sizes.get(_tar(sha)) == tar.bytes}
                self._touch()
            self._looked.set()
            self._fetch([item for sha, item in self._wanted.items() if sha not in self._here])
        except _Full:
            self._note(
                f"cache_dir {self.folder}: {len(self._here)} of {len(self._wanted)} tars fit cache_gb "
                f"{self.limit / 1e9:g} beside what other jobs use; the rest is read from the store"
            )
        except (OSError, FactoryError) as error:
            self._give_up(error)
        finally:
            self._looked.set()

    def _fetch(self, left: Sequence[tuple[Storage, TarInfo]]) -> None:
        while left:
            busy = []  # other processes are fetching these
            for storage, tar in left:
                if self._stop.is_set():
                    return
                if tar.sha256 in self._altered:
                    continue
                try:
                    if not self._fetched(storage, tar):
                        busy.append((storage, tar))
                except DataError as error:
                    self._altered.add(tar.sha256)
                    self._note(f"{error}; not kept in cache_dir")
            if len(busy) == len(left):
                self._stop.wait(_POLL)
            left = busy

    def _note(self, line: str) -> None:
        if line not in self._said:  # every epoch would repeat it
            self._said.add(line)
            self._on_note(line)

    def _give_up(self, error: Exception) -> None:
        if self._stop.is_set():
            return
        self._stalled = error if isinstance(error, StalledError) else None
        why = str(error) if isinstance(error, FactoryError) else one_line(error)
        self._note(f"cache_dir {self.folder}: {why}: no more tars are kept, the rest is read from the store")

    def _fetched(self, storage: Storage, tar: TarInfo) -> bool:
        """Whether ``tar`` is there now; False where another process is fetching it."""
        path = self._path(f"{tar.sha256}.part")
        handle = os.open(path, _FLAGS, 0o666)
        try:
            if not _lock(handle) or not _is_at(handle, path):
                return False
            try:
                if self._files.size(_tar(tar.sha256)) != tar.bytes:
                    with self._locked():
                        self._make_room(tar)
                        _allocate(handle, tar.bytes)
                    self._fill(handle, storage, tar)
                    if self._stop.is_set():
                        return False
                    os.replace(path, self._path(_tar(tar.sha256)))
                self._here.add(tar.sha256)
                return True
            finally:
                if _is_at(handle, path):
                    os.unlink(path)
        finally:
            os.close(handle)

    def _fill(self, handle: int, storage: Storage, tar: TarInfo) -> None:
        wanted = parts(tar.name, tar.bytes)
        for number, data in fetch(storage, wanted, self.patience):
            if self._stop.is_set():
                return
            if isinstance(data, DataError):
                raise data
            _write(handle, data, wanted[number].offset)
            fault("fetching", tar.shard)
        digest, at = hashlib.sha256(), 0
        while block := os.pread(handle, 1 << 20, at):
            digest.update(block)
            at += len(block)
        if digest.hexdigest() != tar.sha256:
            raise DataError(
                f"{storage.path(tar.name)}: altered: its sha256 is not the recorded one (shard {tar.shard})"
            )

    def _make_room(self, tar: TarInfo) -> None:
        """Remove leftovers and the least recently used tars until ``tar`` fits. Raises _Full. The caller has locked."""
        used, old = 0, []
        kept = self._pinned()
        for name, size, modified in self._listed():
            if name == f"{tar.sha256}.part":
                continue
            if name.endswith(".part") and self._abandoned(name):
                continue
            used += size
            if name.endswith(".tar") and name.removesuffix(".tar") not in kept:
                old.append((modified, name, size))
        for _, name, size in sorted(old):
            if used + tar.bytes <= self.limit:
                break
            self._files.delete(name)
            used -= size
        if used + tar.bytes > self.limit:
            raise _Full

    def _abandoned(self, name: str) -> bool:
        """Whether a part had no writer, and is removed."""
        try:
            handle = os.open(self._path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            if not _lock(handle):
                return False
            if _is_at(handle, self._path(name)):
                os.unlink(self._path(name))
            return True
        finally:
            os.close(handle)

    def _pin(self) -> None:
        """Say, for as long as this process lives, which tars it reads. The caller has locked."""
        if self._job is None:
            path = self._path(f"jobs/{uuid.uuid4().hex}")
            self._job = (path, os.open(path, _FLAGS | os.O_EXCL, 0o666))
            fcntl.flock(self._job[1], fcntl.LOCK_EX)
        os.ftruncate(self._job[1], 0)
        os.pwrite(self._job[1], "\n".join(self._wanted).encode(), 0)

    def _pinned(self) -> set[str]:
        """The tars that living processes read; what dead ones left is removed. The caller has locked."""
        found: set[str] = set()
        for name in self._files.list("jobs"):
            path = self._path(name)
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if (self._job is None or path != self._job[0]) and _lock(handle):
                    os.unlink(path)
                else:
                    found |= {*os.pread(handle, os.fstat(handle).st_size, 0).decode("ascii", "replace").split()}
            finally:
                os.close(handle)
        return found

    def _listed(self) -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last use) of every tar and part."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield entry.name, found.st_size, found.st_mtime

    def _touch(self) -> None:
        for sha in self._here:
            with suppress(FileNotFoundError):
                os.utime(self._path(_tar(sha)), follow_symlinks=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._path("lock"), _FLAGS, 0o666)
        try:
            while not _lock(handle):
                if self._stop.wait(_POLL):
                    raise StoreError("another process holds the lock")
            yield
        finally:
            os.close(handle)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)


class _Full(Exception):
    """What is in use leaves no room."""


def _tar(sha256: str) -> str:
    return f"{sha256}.tar"


def _lock(handle: int) -> bool:
    """Whether this process holds the lock of an open file now; the lock goes with the process, however it ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: str) -> bool:
    """Whether ``path`` still names the open file: it may have been renamed or removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _allocate(handle: int, size: int) -> None:
    """A file of ``size`` bytes, for which a full disk is noticed now."""
    os.ftruncate(handle, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
                raise


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
