"""The dataset carries its built-in teacher, so that a manifest alone is enough to distil from.

Used by ``factory run synth`` when a plan starts, and by ``factory rescore`` for another teacher. Loading the weights
once here also finds a damaged file before anything is written.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from manifests.storage import Storage
from stages.models.identity import CONFIG, WEIGHTS, config_json, resolve
from stages.models.settings import ModelSettings

FOLDER = "teacher"


@dataclass(frozen=True)
class TeacherCopy:
    """The files to publish below ``folder``, and the identity that the manifest's metadata stores."""

    files: dict[str, bytes]
    identity: dict[str, Any]
    folder: str = FOLDER

    def apart(self) -> "TeacherCopy":
        """The same in a folder named after its content, so that it never replaces another teacher's."""
        if not self.files:
            return self
        digest = hashlib.sha256(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()
        folder = f"{FOLDER}-{digest[:12]}"
        return replace(self, identity=self.identity | {"path": f"{folder}/{WEIGHTS}"}, folder=folder)


def prepare(settings: ModelSettings, identity: dict[str, Any]) -> TeacherCopy:
    """Read, check and, where it is no safetensors file, convert the teacher that ``identity`` describes.

    The stored identity names the copy (``path``, ``sha256``); where converting changed the bytes, ``source_sha256`` is
    the user's file. An external teacher is not copied: nothing is ever loaded from metadata for it.

    Raises DataError where the weights are damaged or do not fit.
    """
    if identity["kind"] != "builtin":
        return TeacherCopy({}, identity)
    from stages.models.loading import build_from, model_files

    source = resolve(settings)
    weights = source.read()
    net = build_from(source.config, weights, str(source.weights))
    files = model_files(net, source.config)
    if source.weights.suffix == ".safetensors":
        files = {WEIGHTS: weights, CONFIG: config_json(source.config, weights)}
    stored = identity | {"path": f"{FOLDER}/{WEIGHTS}", "sha256": hashlib.sha256(files[WEIGHTS]).hexdigest()}
    if stored["sha256"] != identity["sha256"]:
        stored["source_sha256"] = identity["sha256"]
    return TeacherCopy(files, stored)


def publish(storage: Storage, copy: TeacherCopy) -> None:
    """Write the files that are not there with the same content (a plan that was never started may be replaced)."""
    for name, data in copy.files.items():
        target = f"{copy.folder}/{name}"
        if storage.size(target) != len(data) or storage.read(target) != data:
            storage.write(target, data)
