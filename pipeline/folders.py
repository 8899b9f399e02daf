"""Folders that ``--out`` may name."""

from manifests.errors import UsageError
from manifests.storage import Storage


def local_folder(out: str, why: str) -> Storage:
    """``out`` as a folder of this machine, there already or not. Raises UsageError for a URL, saying ``why``."""
    storage = Storage(out)
    if not storage.is_local:
        raise UsageError(f"--out {out}: {why}")
    return storage
