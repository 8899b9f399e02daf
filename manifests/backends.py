"""Where bytes live: a local folder, or any fsspec file system. Only :mod:`manifests.storage` uses this module.

Both backends raise what their store raises (``OSError`` and friends); translation into one-line errors and retries
belong to :class:`manifests.storage.Storage`.
"""

import errno
import os
import shutil
import tempfile
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
import fsspec.asyn


class Backend(Protocol):
    """Full paths in, bytes out. ``create`` returns False where the file exists."""

    def full(self, name: str) -> str: ...
    def size(self, path: str) -> int | None: ...
    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, offset: int, size: int) -> bytes: ...
    def read_many(self, paths: list[str]) -> list[bytes]: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def put_file(self, local: Path, path: str) -> None: ...
    def sizes(self, path: str) -> dict[str, int]: ...
    def delete(self, path: str) -> None: ...
    def scratch(self) -> Path: ...


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder; the file itself is synced
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


class LocalBackend:
    """A folder on a local or mounted file system. Temporary files live in its ``tmp/``, so a rename publishes them."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def full(self, name: str) -> str:
        return str(self.root / name) if name else str(self.root)

    def size(self, path: str) -> int | None:
        return os.path.getsize(path) if os.path.isfile(path) else None

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def read_many(self, paths: list[str]) -> list[bytes]:
        return [self.read(path) for path in paths]

    def _staged(self, data: bytes) -> Path:
        staged = self.scratch() / f"write-{uuid.uuid4().hex}"
        try:
            with open(staged, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return staged

    def write(self, path: str, data: bytes) -> None:
        self._publish(self._staged(data), Path(path))

    def create(self, path: str, data: bytes) -> bool:
        target = Path(path)
        if target.exists():
            return False
        staged = self._staged(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(staged, target)  # unlike a rename, a link refuses to replace: the first writer wins
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            if target.exists():
                return False
            os.replace(staged, target)  # no hard links here: atomic still, but the last of two racing writers wins
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(target.parent)
        return True

    def put_file(self, local: Path, path: str) -> None:
        with open(local, "rb") as file:
            os.fsync(file.fileno())
        try:
            self._publish(local, Path(path))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._publish_copy(local, Path(path))
            local.unlink()

    def _publish_copy(self, local: Path, target: Path) -> None:
        """For a target on another file system than ``local``; a killed attempt leaves a hidden file beside it."""
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(local, staged)
            with open(staged, "rb") as file:
                os.fsync(file.fileno())
            self._publish(staged, target)
        finally:
            staged.unlink(missing_ok=True)

    def _publish(self, staged: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, target)
        sync_folder(target.parent)

    def sizes(self, path: str) -> dict[str, int]:
        try:
            entries = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        with entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted since the listing began
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def delete(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def scratch(self) -> Path:
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class RemoteBackend:
    """Any fsspec URL. Object stores publish a finished upload at once, so no renaming is needed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs: Any = None
        self._pid = 0
        self._scratch: tuple[int, Path] | None = None
        self.root: str = fsspec.core.url_to_fs(url, use_listings_cache=False)[1].rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None, "_scratch": None}

    @property
    def fs(self) -> Any:
        """The file system of this process: asynchronous ones must not be carried over a fork."""
        if self._fs is None or self._pid != os.getpid():
            self._fs, self._pid = fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0], os.getpid()
        return self._fs

    def full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def size(self, path: str) -> int | None:
        try:
            info = self.fs.info(path, refresh=True) if "s3" in self.fs.protocol else self.fs.info(path)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return bytes(self.fs.cat_file(path, start=offset, end=offset + size)) if size else b""

    def read_many(self, paths: list[str]) -> list[bytes]:
        found = self.fs.cat(paths, on_error="raise") if paths else {}
        return [bytes(found[path]) for path in paths]

    def write(self, path: str, data: bytes) -> None:
        self._make_parent(path)
        self.fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        if self.size(path) is not None:
            return False
        self._make_parent(path)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" not in str(error) and "ConditionalRequestConflict" not in str(error):
                raise
            return False
        return True

    def put_file(self, local: Path, path: str) -> None:
        self._make_parent(path)
        self.fs.put_file(str(local), path)
        local.unlink()

    def _make_parent(self, path: str) -> None:
        if not isinstance(self.fs, fsspec.asyn.AsyncFileSystem):  # object stores have no folders to make
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

    def sizes(self, path: str) -> dict[str, int]:
        try:
            entries = self.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = ((entry["name"].rstrip("/").rsplit("/", 1)[-1], entry) for entry in entries)
        return {name: int(entry["size"]) for name, entry in names if entry["type"] == "file" and entry["name"] != path}

    def delete(self, path: str) -> None:
        if self.size(path) is not None:
            self.fs.rm_file(path)

    def scratch(self) -> Path:
        if self._scratch is None or self._scratch[0] != os.getpid():
            self._scratch = (os.getpid(), Path(tempfile.mkdtemp(prefix="factory-")))
            weakref.finalize(self, _remove, *self._scratch)
        return self._scratch[1]


def _remove(pid: int, folder: Path) -> None:
    """Only the process that made a temporary folder removes it: a forked child inherits the finaliser."""
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
