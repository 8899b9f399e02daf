"""Any fsspec file system as :mod:`manifests.storage` uses it; the local one is :mod:`manifests.local`.

Both take paths as ``full`` returns them and raise what their store raises (``OSError`` and friends); translation into
one-line errors and retries belong to :class:`manifests.storage.Storage`. ``create`` returns False where a file exists.
"""

import asyncio
import os
import shutil
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn

_CONNECTIONS = 64
"""To S3 at most, unless fsspec is configured otherwise; its client's default of 10 makes requests queue."""
_THREADS = 16


class RemoteBackend:
    """Any fsspec URL. Object stores publish a finished upload at once, so no renaming is needed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs: Any = None
        self._pid = 0
        self._scratch: tuple[int, Path] | None = None
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.root: str = fsspec.core.url_to_fs(url, use_listings_cache=False)[1].rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None, "_scratch": None, "_pool": None}

    @property
    def fs(self) -> Any:
        """The file system of this process: asynchronous ones must not be carried over a fork."""
        if self._fs is None or self._pid != os.getpid():
            options: dict[str, Any] = {"use_listings_cache": False}
            if self.url.startswith(("s3://", "s3a://")):
                configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
                options["config_kwargs"] = {"max_pool_connections": _CONNECTIONS, **configured}
            self._fs, self._pid = fsspec.core.url_to_fs(self.url, **options)[0], os.getpid()
        return self._fs

    def full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def size(self, path: str) -> int | None:
        try:
            info = self.fs.info(path, refresh=True) if "s3" in self.fs.protocol else self.fs.info(path)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def missing_bucket(self) -> str:
        """The bucket, where this is an object store and has none of this name; "" otherwise."""
        if not isinstance(self.fs, fsspec.asyn.AsyncFileSystem) or self.url.startswith("http"):
            return ""
        bucket = self.root.split("/", 1)[0]
        try:
            self.fs.ls(bucket, refresh=True)
        except FileNotFoundError:
            return bucket
        except Exception:  # not allowed to look: then it is not known
            return ""
        return ""

    def read(self, path: str, most: int | None = None) -> bytes:
        if most is not None and (self.size(path) or 0) > most:
            return self.read_range(path, 0, most + 1)
        return bytes(self.fs.cat_file(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return bytes(self.fs.cat_file(path, start=offset, end=offset + size)) if size else b""

    def start_range(self, path: str, offset: int, size: int) -> "Future[bytes]":
        """Begin to read a range; many may be under way. Cancelled, an asynchronous one ends at once."""
        if isinstance(self.fs, fsspec.asyn.AsyncFileSystem) and self.fs.async_impl:
            return asyncio.run_coroutine_threadsafe(self._fetch(path, offset, size), self.fs.loop)
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch"))
        return self._pool[1].submit(self.read_range, path, offset, size)

    async def _fetch(self, path: str, offset: int, size: int) -> bytes:
        return bytes(await self.fs._cat_file(path, start=offset, end=offset + size)) if size else b""

    def read_many(self, paths: list[str]) -> list[bytes]:
        found = self.fs.cat(paths, on_error="raise") if paths else {}
        return [bytes(found[path]) for path in paths]

    def write(self, path: str, data: bytes, beside: bool = False) -> None:
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

    def put_file(self, path: str, local: Path) -> None:
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

    def folder(self, path: str) -> str:
        return f"{self.url}/{path}"

    def temporary(self) -> tuple[dict[str, int], list[str]]:
        return {}, []  # unfinished uploads are invisible

    def drop(self, path: str) -> None:
        raise AssertionError(f"a store lists no temporary file, so {path} cannot be one")

    def scratch(self) -> Path:
        if self._scratch is None or self._scratch[0] != os.getpid():
            self._scratch = (os.getpid(), Path(tempfile.mkdtemp(prefix="factory-")))
            weakref.finalize(self, _remove, *self._scratch)
        return self._scratch[1]


def _remove(pid: int, folder: Path) -> None:
    """Only the process that made a temporary folder removes it: a forked child inherits the finalizer."""
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
