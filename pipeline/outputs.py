"""Where results about a dataset go by default: ``runs/RECIPE-FINGERPRINT/`` in the working directory.

Never into the dataset: it may be somebody else's, be read-only, or hold a planted run that would be resumed.
"""

import os
import re

from manifests.checked_json import load_checked
from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from manifests.storage import Storage

ROOT, STUDENTS, SHEET = "runs", "distill", "sheet.png"
RUN, RESULTS = "run.json", "results.json"
"""Of stage 2, whose own modules import torch."""
PRINT = 8
"""Characters of the fingerprint in a folder's name."""


def default_folder(manifest: Manifest, recipe: str, option: str = "--out") -> str:
    """The folder of what is made of ``manifest`` with the recipe of this name; these two alone decide it.

    Both may be somebody else's text: what could leave ``runs/`` becomes a dash. Raises UsageError, naming
    ``option``, where the folder would be inside the dataset.
    """
    name = _plain(recipe)[:60].lstrip(".-") or "unnamed"
    return outside(manifest, f"{ROOT}/{name}-{_plain(manifest.info.fingerprint[:PRINT])}", option)


def outside(manifest: Manifest, path: str, option: str) -> str:
    """``path``. Raises UsageError, naming ``option``, where it is in the folder of ``manifest``."""
    if manifest.storage.is_local:
        dataset = os.path.realpath(manifest.storage.url)
        if os.path.commonpath((dataset, os.path.realpath(path))) == dataset:
            raise UsageError(
                f"{path} would be inside the dataset {manifest.storage.url}, which is only read: "
                f"name a place with {option}, or go to another folder"
            )
    return path


def trainings(run: Storage, fingerprint: str) -> dict[str, bool]:
    """Folders of stage 2 that were trained on the dataset with this fingerprint, and whether they have finished: in the
    default place, and in ``distill`` in the dataset's own folder, where ``--out`` may have put them."""
    here = Storage(ROOT)
    suffix = f"-{_plain(fingerprint[:PRINT])}"
    names = sorted(name for name in _folders(here.url) if name.endswith(suffix))
    places = [*((here, f"{name}/{STUDENTS}") for name in names), (run, STUDENTS)]
    return {
        storage.path(name): storage.exists(f"{name}/{RESULTS}")
        for storage, name in places
        if fingerprint in _trained_on(storage, f"{name}/{RUN}")
    }


def _folders(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _trained_on(storage: Storage, name: str) -> set[str]:
    """Fingerprints of a training's datasets; none where there is no training to be read."""
    try:
        return {str(entry["fingerprint"]) for entry in load_checked(storage.read(name))["manifests"]}
    except (DataError, ValueError, TypeError, KeyError):
        return set()


def _plain(text: str) -> str:
    """``text`` as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text)
