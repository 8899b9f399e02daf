"""Which teacher a run learns from: the one its manifests carry, or the one that the user names. Never guessed."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from manifests.errors import DataError
from manifests.reader import Manifest
from stages.models.identity import ModelConfig
from stages.models.loading import load_teacher, teacher_from
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher

ASK = "name the teacher with --teacher"


def find_teacher(
    manifests: Sequence[Manifest], named: ModelSettings | None, other: bool, device: torch.device
) -> Teacher:
    """The frozen teacher of ``manifests``, or ``named`` after a check that it is the one the data was made for.

    A copy beside the dataset is loaded only where its kind is ``builtin`` and its sha256 is the recorded one. With
    ``other`` a named teacher may differ in weights. Raises DataError saying what was expected.
    """
    for manifest in manifests[1:]:
        if manifest.info.class_names != manifests[0].info.class_names:
            raise DataError(f"{manifest.url} has other classes than {manifests[0].url}")
    teacher = load_teacher(named, device) if named else _stored(manifests[0], device)
    for manifest in manifests:
        _check_classes(teacher, manifest)
        recorded = [manifest.info.teacher.get(key) for key in ("sha256", "source_sha256")]
        expected = {str(value) for value in recorded if value is not None}
        if not other and expected and teacher.identity["sha256"] not in expected:
            raise DataError(
                f"{manifest.url} was made for a teacher with sha256 {' or '.join(sorted(expected))}, this one has "
                f"{teacher.identity['sha256']}; {ASK}, or allow another one with other_teacher: true"
            )
    return teacher


def _stored(manifest: Manifest, device: torch.device) -> Teacher:
    identity: dict[str, Any] = manifest.info.teacher
    sha256 = identity.get("sha256")
    if identity.get("kind") != "builtin" or not isinstance(identity.get("path"), str):
        known = f"its sha256 is {sha256}" if sha256 else "its checksum is not recorded"
        raise DataError(f"{manifest.url} does not carry its teacher, {known}: {ASK}")
    where = manifest.storage.path(identity["path"])
    try:
        config = ModelConfig.model_validate(identity.get("config"))
    except ValueError:
        raise DataError(f"{manifest.url}: the teacher's config in its metadata is damaged: {ASK}") from None
    weights = manifest.storage.read(identity["path"])
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:  # before anything is built from them
        raise DataError(f"{where} was altered: sha256 {found}, expected {sha256}; restore it, or {ASK}")
    return teacher_from(config, weights, where, device)


def _check_classes(teacher: Teacher, manifest: Manifest) -> None:
    names = manifest.info.class_names
    if len(names) != teacher.num_classes:
        raise DataError(f"{manifest.url} has {len(names)} classes, the teacher {teacher.num_classes}")
    if names != teacher.class_names and set(names) == set(teacher.class_names):
        raise DataError(f"{manifest.url} and the teacher have the same classes in another order")
