"""A folder on a local or mounted file system, in which no link is followed; :mod:`manifests.storage` is the way in.

The root is the user's to name and may be a link. What lies below it may come from somebody else, so it is opened one
component at a time, each relative to the descriptor of the folder before it and with ``O_NOFOLLOW``: what was checked
is what is used. A symbolic link, FIFO, socket or device in the way is a :class:`LinkError` that names it.
"""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from posixpath import join, split
from typing import BinaryIO

from manifests.errors import GoneError, LinkError

TMP = "tmp"
_TEMPORARY = re.compile(r"(write|merge|[0-9]{6,8})-[0-9a-f]{32}(\.(tar|parquet))?|rebuild-[0-9a-z_]{8}", re.ASCII)
_FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not be waited for before it can be recognized
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def temporary_name(stem: str, suffix: str = "") -> str:
    """A new name in ``tmp/`` that ``factory gc`` recognizes; ``stem``: write, merge or a shard's six digits."""
    return f"{stem}-{uuid.uuid4().hex}{suffix}"


class LocalBackend:
    """Temporary files live in ``tmp/`` of the folder, so a rename publishes them. Paths are relative to ``root``."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._held: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}  # another machine numbers its disks by itself

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def hold(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(self.root)
            self._held = found.st_dev, found.st_ino

    def full(self, name: str) -> str:
        return name

    def size(self, path: str) -> int | None:
        found = self._look_up(path)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def read(self, path: str, most: int | None = None) -> bytes:
        with self.open(path) as file:
            return file.read() if most is None else file.read(most + 1)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with self.open(path) as file:
            return os.pread(file.fileno(), size, offset)

    def open(self, path: str) -> BinaryIO:
        return open(path, "rb", opener=lambda *_: self._file(path, os.O_RDONLY))

    def write(self, path: str, data: bytes, beside: bool = False) -> None:
        folder, name = split(path)
        with self._staged(data, folder if beside else TMP, f".{name}" if beside else "write") as (source, staged):
            self._publish(staged, source, path)

    def append(self, path: str, data: bytes) -> bool:
        if not os.path.isdir(self.root):
            return False
        with open(path, "ab", opener=lambda *_: self._file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)) as file:
            if os.fstat(file.fileno()).st_nlink == 1:
                file.write(data)
                return True
        self.write(path, self.read(path) + data)  # its other names, a backup's perhaps, keep what they had
        return True

    def create(self, path: str, data: bytes) -> bool:
        if self._look_up(path) is not None:
            return False
        with self._staged(data, TMP, "write") as (source, staged), self._parent(path, make=True) as (folder, name):
            try:  # unlike a rename, a link refuses to replace: the first writer wins
                os.link(staged, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                if self._look_up(path) is not None:
                    return False
                # no hard links here: atomic still, but the last of two racing writers wins
                os.replace(staged, name, src_dir_fd=source, dst_dir_fd=folder)
            _sync(folder)
        return True

    def put_file(self, path: str, local: Path) -> None:
        with open(local, "rb") as file:
            os.fsync(file.fileno())
            try:
                self._publish(str(local), None, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                folder, name = split(path)  # on another file system: a killed attempt leaves a hidden file beside it
                with self._staged(file, folder, f".{name}") as (source, staged):
                    self._publish(staged, source, path)
                local.unlink()

    def sizes(self, path: str) -> dict[str, int]:
        found = {}
        try:
            with self._listed(path) as (_, entries):
                for entry in entries:
                    with suppress(FileNotFoundError):  # deleted since the listing began
                        if entry.is_file(follow_symlinks=False):
                            found[entry.name] = entry.stat(follow_symlinks=False).st_size
                        elif not entry.is_dir(follow_symlinks=False):
                            self._refuse(entry.stat(follow_symlinks=False).st_mode, join(path, entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError), self._parent(path) as (folder, name):
            self._stat(folder, name, path)
            os.unlink(name, dir_fd=folder)

    def folder(self, path: str, make: bool = False) -> str:
        with suppress(FileNotFoundError):
            os.close(self._folder(path, make))
        return join(self.root, path)

    def scratch(self) -> Path:
        return Path(self.folder(TMP, make=True))

    def temporary(self) -> tuple[dict[str, int], list[str]]:
        own, foreign = {}, []
        with suppress(FileNotFoundError), self._listed(TMP) as (handle, entries):
            for entry in entries:
                with suppress(FileNotFoundError):
                    is_file, is_dir = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
                    if not _TEMPORARY.fullmatch(entry.name) or not (is_file or is_dir):
                        foreign.append(entry.name)
                    elif is_file:
                        own[entry.name] = entry.stat(follow_symlinks=False).st_size
                    else:
                        own[entry.name] = _tree_size(entry.name, handle)
        return dict(sorted(own.items())), sorted(foreign)

    def drop(self, path: str) -> None:
        with suppress(FileNotFoundError), self._parent(path) as (folder, name):
            if stat.S_ISDIR(self._stat(folder, name, path).st_mode):
                shutil.rmtree(name, dir_fd=folder)  # follows no link either
            else:
                os.unlink(name, dir_fd=folder)

    def _folder(self, path: str, make: bool = False) -> int:
        """A descriptor of a folder below the root, "" for the root itself. The caller closes it."""
        handle = self._root(make)
        walked = ""
        for part in path.split("/") if path else ():
            walked = join(walked, part)
            try:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=handle)
                try:
                    below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
                except OSError:
                    self._stat(handle, part, walked)
                    raise
            finally:
                os.close(handle)
            handle = below
        return handle

    def _root(self, make: bool) -> int:
        """A descriptor of the root. Raises GoneError where it is no longer the folder that is held."""
        if self._held is None:
            if make:
                os.makedirs(self.root, exist_ok=True)
            return os.open(self.root, _FOLDER)
        with suppress(FileNotFoundError, NotADirectoryError):
            handle = os.open(self.root, _FOLDER)
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino) == self._held:
                return handle
            os.close(handle)
        raise GoneError(f"{self.root} was moved, deleted or replaced while this command worked in it")

    @contextmanager
    def _parent(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder that holds ``path``, as a descriptor, and the last component."""
        folder, name = split(path)
        handle = self._folder(folder, make)
        try:
            yield handle, name
        finally:
            os.close(handle)

    @contextmanager
    def _listed(self, path: str) -> Iterator[tuple[int, Iterator[os.DirEntry[str]]]]:
        with self._parent(join(path, ".")) as (folder, here):
            handle = os.open(here, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        try:
            with os.scandir(handle) as entries:
                yield handle, entries
        finally:
            os.close(handle)

    def _file(self, path: str, flags: int) -> int:
        """A descriptor of a regular file."""
        above, name = split(path)
        folder = self._folder(above)
        try:
            handle = os.open(name, flags | _FILE, 0o666, dir_fd=folder)
        except OSError:
            self._stat(folder, name, path)
            raise
        finally:
            os.close(folder)
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            os.close(handle)
            self._refuse(mode, path)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return handle

    @contextmanager
    def _staged(self, data: bytes | BinaryIO, path: str, stem: str) -> Iterator[tuple[int, str]]:
        """A new file with ``data`` on disk in folder ``path``; removed at the end where it was not renamed."""
        with self._parent(f"{path}/{temporary_name(stem)}".lstrip("/"), make=True) as (folder, name):
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o666, dir_fd=folder)
            try:
                with open(handle, "wb") as file:
                    if isinstance(data, bytes):
                        file.write(data)
                    else:
                        shutil.copyfileobj(data, file, 1 << 20)
                    file.flush()
                    os.fsync(handle)
                yield folder, name
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)

    def _publish(self, staged: str, source: int | None, path: str) -> None:
        """Rename ``staged`` of folder ``source`` to ``path``."""
        with self._parent(path, make=True) as (folder, name):
            with suppress(FileNotFoundError):
                self._stat(folder, name, path)
            os.replace(staged, name, src_dir_fd=source, dst_dir_fd=folder)
            _sync(folder)

    def _look_up(self, path: str) -> os.stat_result | None:
        try:
            with self._parent(path) as (folder, name):
                return self._stat(folder, name, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return None

    def _stat(self, folder: int, name: str, path: str) -> os.stat_result:
        """What ``name`` in ``folder`` is: a file or a folder, else LinkError."""
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        self._refuse(found.st_mode, path)
        return found

    def _refuse(self, mode: int, path: str) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode))
        if kind is None:
            return
        instead = (
            "put the file or folder itself there (a folder of another disk can be mounted there)"
            if stat.S_ISLNK(mode)
            else "remove it"
        )
        raise LinkError(f"{self.root}/{path}: is {kind}, which is not used inside a dataset or run folder: {instead}")


def _sync(folder: int) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder; the file itself is synced
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _tree_size(name: str, folder: int) -> int:
    total = 0
    for _, _, files, handle in os.fwalk(name, dir_fd=folder):
        for file in files:
            with suppress(FileNotFoundError):
                total += os.stat(file, dir_fd=handle, follow_symlinks=False).st_size
    return total
