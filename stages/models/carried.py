"""The teacher that a dataset carries. Used by ``factory run distill``, ``rescore`` and ``inspect``."""

import hashlib
from collections import Counter
from typing import Any

import torch

from manifests.errors import DataError
from manifests.reader import Manifest
from stages.models.identity import ModelConfig, stored_config
from stages.models.loading import teacher_from
from stages.models.schemes import split_name
from stages.models.teacher import Teacher

ASK = "name the teacher with --teacher"


def carried_teacher(manifest: Manifest, device: str | torch.device = "cpu", ask: str = ASK) -> Teacher:
    """The frozen built-in teacher whose weights lie beside ``manifest``, loaded after a check of their sha256.

    Raises DataError where the manifest carries none or its files were altered; ``ask`` says what would help.
    """
    identity: dict[str, Any] = manifest.info.teacher
    sha256 = identity.get("sha256")
    if identity.get("kind") != "builtin" or not isinstance(identity.get("path"), str):
        known = f"its sha256 is {sha256}" if sha256 else "its checksum is not recorded"
        raise DataError(f"{manifest.url} does not carry its teacher, {known}: {ask}")
    where, config = manifest.storage.path(identity["path"]), carried_config(manifest, ask)
    weights = manifest.storage.read(identity["path"])
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:  # before anything is built from them
        raise DataError(f"{where} was altered: sha256 {found}, expected {sha256}; restore it, or {ask}")
    return teacher_from(config, weights, where, device)


def carried_config(manifest: Manifest, ask: str = ASK) -> ModelConfig:
    """The config of the built-in teacher of ``manifest``. Raises DataError where that is damaged or another kind."""
    try:
        config = stored_config(manifest.info.teacher.get("config"), f"{manifest.url}: its teacher's config")
    except DataError as error:
        raise DataError(f"{error}; {ask}") from None
    if split_name(config.architecture)[0] != "builtin":
        raise DataError(f"{manifest.url} calls '{config.architecture}' a built-in teacher, which it is not: {ask}")
    return config


def check_classes(teacher: Teacher, manifest: Manifest) -> None:
    """Raises DataError where ``teacher`` does not know the classes of ``manifest``, in their order."""
    check_class_names(teacher, manifest.info.class_names, manifest.url)


def check_class_names(teacher: Teacher, names: tuple[str, ...], where: str) -> None:
    """Raises DataError where ``teacher`` has another number of classes than ``names`` of ``where``, or has a class of
    them under another number. Other names are no contradiction: a teacher may have none."""
    if len(names) != teacher.num_classes:
        raise DataError(f"{where} has {len(names)} classes, the teacher {teacher.num_classes}")
    if names == teacher.class_names:
        return
    count = Counter((*names, *teacher.class_names))
    numbers = {name: number for number, name in enumerate(teacher.class_names)}
    for number, name in enumerate(names):
        other = numbers.get(name, number)
        if other != number and count[name] == 2:  # a name that several classes have tells nothing
            places = f"{name!r} is class {number} and class {other}"
            raise DataError(f"{where} and the teacher have the same classes in another order: {places}")
