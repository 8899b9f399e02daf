"""What a plan needs to know of stage 1 before it runs, and whether a worker's models are those. Imports no torch."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from manifests.errors import DataError, UsageError
from stages.models.source import teacher_identity
from stages.settings import ModelSettings, PriorSettings, SynthSettings
from stages.synth.group import uneven_lap
from stages.synth.priors.files import FAMILIES, check_labels, folder_sha256, prior_identity, tiny_decoder

log = logging.getLogger(__name__)


ALGORITHM_VERSION = 1  # raise when the same settings would make other images
DECODER_VERSION = 2  # of fitted decoders alone: raise when the same prior would give another map
GROUPS_VERSION = 2  # of groups that 1 did not balance alone: raise when these would get other classes
STRIDE_VERSION = 2  # of intervals guided at every k-th step from where 1 rounded away from the first step alone
LOSSY_VERSION = 2  # of jpg and webp alone: 1 asked the teacher about the pixels before they were encoded

FIRST_DEFAULTS: dict[str, dict[str, Any]] = {"prior": {"steps": 50}, "guidance": {"decoder": "full", "bn": 0.1}}
"""Settings whose default has changed, with the first one: what plans of every version mean where they name none."""

NO_PRIOR: dict[str, Any] = {"name": "none", "sha256": None, "conditioning": "none"}


@dataclass(frozen=True)
class SynthInputs:
    """Checked identities of prior and teacher, and what they imply."""

    prior: dict[str, Any]
    teacher: dict[str, Any]
    adversary: dict[str, Any] | None
    class_names: tuple[str, ...]
    image_size: int
    tiny_decoder: str | None = None  # sha256


def inspect_inputs(settings: SynthSettings) -> SynthInputs:
    """Find prior and teacher and read their identities; raises DataError or UsageError where one is unusable."""
    teacher = teacher_identity(settings.teacher)
    adversary = teacher_identity(settings.adversary) if settings.adversary else None
    names = tuple(teacher["config"]["class_names"])
    if settings.method == "noise":
        return SynthInputs({"name": "noise", "sha256": None}, teacher, None, names, settings.images.size or 32)
    prior = prior_identity(settings.prior) if settings.needs_prior else NO_PRIOR
    if prior["name"] == PriorSettings().path and settings.teacher.name != ModelSettings().name:
        log.warning("prior %s draws pen strokes alone: name one for your teacher, prior.path", prior["name"])
    if prior["conditioning"] == "class":
        check_labels(settings.prior, settings.prior.path, prior["classes"], names)
    if settings.method == "dda":
        check_start(settings, varies(prior))
    tiny = None
    if settings.guides and settings.guidance.decoder == "tiny":
        tiny = folder_sha256(tiny_decoder(settings.prior, settings.guidance.tiny_decoder))
    side = teacher["config"]["input"]["size"] if settings.inverts else prior["image_size"]
    return SynthInputs(prior, teacher, adversary, names, settings.images.size or side, tiny)


def varies(prior: dict[str, Any]) -> bool:
    """Whether the prior of this identity varies images by itself, as DDA's paper does."""
    return FAMILIES[prior["pipeline"]].image_encoder is not None


def check_start(settings: SynthSettings, varies: bool) -> None:
    """Raises UsageError where image-to-image leaves no step, or none to guide, for a method that asks for some."""
    steps, first = settings.prior.steps, settings.dda.first_step(settings.prior.steps, varies)
    if first == steps:
        raise UsageError(
            f"dda.strength {settings.dda.strength:g} leaves none of {steps} steps: set {1 / steps:g} or more"
        )
    if settings.dda.guided and not any(settings.guidance.at(step, steps) for step in range(first, steps)):
        raise UsageError(
            f"dda.guided steers nothing: variants begin at step {first} of {steps}, and guidance.interval, every and "
            "scale allow none from there on"
        )


def semantics(settings: SynthSettings, inputs: SynthInputs) -> dict[str, Any]:
    """What the fingerprint covers: method, checksums, classes and shard size; not the number of shards, the device,
    or where the models lie.

    Settings at their first defaults are left out, so that a later version's new setting does not orphan a half-made
    dataset; a default that changes must go to ``FIRST_DEFAULTS``, or a plan would take the old value for the new one.
    """
    elsewhere: Any = dict.fromkeys(("shards", "device", "teacher", "adversary"), True)
    elsewhere |= {"prior": {"path"}, "guidance": {"tiny_decoder"}}
    chosen = settings.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)
    _name_changed_defaults(chosen, settings)
    covered = {
        "algorithm": ALGORITHM_VERSION,
        "settings": {name: value for name, value in chosen.items() if value != {}},
        "prior": inputs.prior["sha256"],
        "teacher": network(inputs.teacher),
        "class_names": list(inputs.class_names),
    }
    if inputs.adversary:
        covered["adversary"] = network(inputs.adversary)
    if inputs.tiny_decoder:
        covered["tiny_decoder"] = inputs.tiny_decoder
    if settings.guides and settings.guidance.decoder == "fitted":
        covered["fitted_decoder"] = DECODER_VERSION
    if settings.method != "noise" and uneven_lap(settings.group_size, len(inputs.class_names)):
        covered["groups"] = GROUPS_VERSION
    if settings.guides and settings.guidance.every > 1 and rounded_away(settings):
        covered["stride"] = STRIDE_VERSION
    if settings.method != "noise" and settings.images.format != "png":
        covered["lossy"] = LOSSY_VERSION
    return covered


def rounded_away(settings: SynthSettings) -> bool:
    """Whether ⌈start · steps⌉ in floating point, from which steps were once counted, is not the interval's first."""
    low, steps = settings.guidance.interval[0], settings.prior.steps
    return ceil(low * steps) != settings.guidance.first(steps)


def _name_changed_defaults(chosen: dict[str, Any], settings: SynthSettings) -> None:
    """In ``chosen`` (what differs from today's defaults), name what differs from the first ones instead.

    A decoder that no teacher looks through stays out: unguided datasets of older versions go on.
    """
    for section, defaults in FIRST_DEFAULTS.items():
        for name, first in defaults.items():
            value = getattr(getattr(settings, section), name)
            if value == first:
                chosen.get(section, {}).pop(name, None)
            elif section != "guidance" or settings.guides:
                chosen.setdefault(section, {})[name] = value


def network(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a classifier changes the images: its weights, the network around them, and how it sees."""
    config = identity["config"]
    return {
        "sha256": identity["sha256"],
        "architecture": identity["architecture"],
        "stem": config.get("stem"),
        "input": config.get("input"),
    }


# Whether a worker's models are those of its plan: its machine may hold other copies, or somebody overwrote them.
#
# Imports no torch.


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
