"""Which teacher a run learns from: the one its manifests carry, or the one that the user names. Never guessed."""

from collections.abc import Sequence

import torch

from manifests.errors import DataError
from manifests.reader import Manifest
from stages.models.carried import ASK, carried_teacher, check_classes
from stages.models.loading import load_teacher
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher


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
    teacher = load_teacher(named, device) if named else carried_teacher(manifests[0], device)
    for manifest in manifests:
        check_classes(teacher, manifest)
        recorded = [manifest.info.teacher.get(key) for key in ("sha256", "source_sha256")]
        expected = {str(value) for value in recorded if value is not None}
        if not other and expected and teacher.identity["sha256"] not in expected:
            raise DataError(
                f"{manifest.url} was made for a teacher with sha256 {' or '.join(sorted(expected))}, this one has "
                f"{teacher.identity['sha256']}; {ASK}, or allow another one with other_teacher: true"
            )
    return teacher
