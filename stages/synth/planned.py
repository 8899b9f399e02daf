"""Whether a worker's models are those of its plan: its machine may hold other copies, or somebody overwrote them.

Imports no torch.
"""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.errors import DataError
from stages.synth.plan_inputs import network
from stages.synth.priors.families import folder_sha256

MODELS = ("prior", "teacher", "adversary", "tiny_decoder")

Planned = Mapping[str, Any]
"""What the semantics of a plan hold of ``MODELS``; nothing is asked of a model that is not in it."""


def planned_models(semantics: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan's ``semantics`` that workers compare with what they load. JSON-able."""
    return {name: semantics[name] for name in MODELS if name in semantics}


def check_network(planned: Planned, name: str, where: str, identity: dict[str, Any]) -> None:
    """Raises DataError where the classifier that was loaded from ``where`` is not the plan's ``name``."""
    if name in planned:
        for key, value in network(identity).items():
            _compare(f"{name} {where}", key, value, planned[name].get(key))


def check_folder(planned: Planned, name: str, folder: Path, variant: str | None = None) -> None:
    """Raises DataError where the model in ``folder`` is not the plan's ``name``. Reads all that loading reads."""
    if name in planned:
        _compare(f"{name} {folder}", "sha256", folder_sha256(folder, variant), planned[name])


def _compare(what: str, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise DataError(
            f"{what} on {platform.node()} is not the one that the run was planned with: its {key} is {found}, expected "
            f"{wanted}"
        )
