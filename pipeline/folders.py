"""Folders that ``--out`` may name."""

import os

from manifests.errors import UsageError
from manifests.storage import Storage


def refuse_file(storage: Storage) -> None:
    """Raises UsageError where ``storage`` is a file, or lies below one."""
    path = storage.url
    while storage.is_local and not os.path.exists(path):
        path = os.path.dirname(path)
    if storage.is_local and not os.path.isdir(path):
        raise UsageError(f"{path} is a file; --out names a folder")


def local_folder(out: str, why: str) -> Storage:
    """``out`` as a folder of this machine, there already or not.

    Raises UsageError for a URL, saying ``why``, and for a file.
    """
    storage = Storage(out)
    if not storage.is_local:
        raise UsageError(f"--out {out}: {why}")
    refuse_file(storage)
    return storage
