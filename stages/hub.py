"""Model folders, local or of the Hugging Face hub: what is read of one, and that it lies in it. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from manifests.errors import DataError, first_line


class NotFetched(DataError):
    """A repository that is not in the hub's cache and cannot be downloaded now."""


def snapshot(name: str, what: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The local folder of ``name``: a folder, or a hub id (``org/name``), of whose files those that ``choose`` returns
    are downloaded. What the cache holds is taken where the hub does not respond. ``what`` names it in errors.

    Raises:
        NotFetched: a hub id that neither the cache nor the hub gives.
        DataError: no folder, and no hub id.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(f"{what} {name}: no such folder (expected a folder, or org/name on the hub)")
    try:
        return _download(name, choose)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise NotFetched(
            f"{what} {name}: neither a local folder nor a hub id that can be fetched ({reason})"
        ) from error


def _download(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        files = [file.rfilename for file in model_info(name).siblings or ()]
    except Exception as error:  # no such repository, no access, or any error of the HTTP library that the hub uses
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            raise OSError(str(error) or type(error).__name__) from error
    return Path(snapshot_download(name, allow_patterns=choose(files)))


def inside(folder: Path, name: str) -> Path:
    """The path of ``name`` in a model folder. Links may end in the same folder, or, of a snapshot in the hub's cache,
    which consists of links, in the same repository. Raises DataError where one leads elsewhere."""
    home = Path(os.path.realpath(folder))
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            home = snapshots.parent
            break
    if not Path(os.path.realpath(folder / name)).is_relative_to(home):
        raise DataError(f"{folder / name} is a link out of its folder: copy what it names there (cp -L)")
    return folder / name
