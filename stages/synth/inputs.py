"""What a plan needs to know of stage 1 before it runs, and whether a worker's models are those. Imports no torch."""

import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manifests.errors import DataError, UsageError, suggest
from stages.models.source import ModelSource, resolve
from stages.settings import ALGORITHM_VERSION, LOSS_SCALE, ModelSettings, PriorSettings, SynthSettings
from stages.synth.priors.files import FAMILIES, ModelFolder, check_labels, locate_prior, locate_tiny_decoder

log = logging.getLogger(__name__)


NO_PRIOR: dict[str, Any] = {"name": "none", "sha256": None, "conditioning": "none"}


@dataclass(frozen=True)
class SynthInputs:
    """Checked identities of prior and teacher, and what they imply. ``sources``: of ``teacher`` and ``adversary``."""

    prior: dict[str, Any]
    teacher: dict[str, Any]
    adversary: dict[str, Any] | None
    class_names: tuple[str, ...]
    image_size: int
    sources: Mapping[str, ModelSource]
    tiny_decoder: str | None = None  # sha256
    decisions: Mapping[str, str] = field(default_factory=dict)  # what was settled of the prior, and from what


def inspect_inputs(settings: SynthSettings) -> SynthInputs:
    """Find prior and teacher and read their identities; raises DataError or UsageError where one is unusable."""
    if settings.method == "import":
        raise UsageError("method import takes images from elsewhere: factory import DATA --teacher T --out RUN")
    sources = model_sources(settings)
    teacher, adversary = (sources[name].identity if name in sources else None for name in ("teacher", "adversary"))
    assert teacher is not None
    names = tuple(teacher["config"]["class_names"])
    if settings.method == "noise":
        size = settings.images.size or 32
        return SynthInputs({"name": "noise", "sha256": None}, teacher, None, names, size, sources)
    check_classes("prompts.classes", settings.prompts.classes, names)
    source = locate_prior(settings.prior) if settings.needs_prior else None
    prior = source.identity if source else NO_PRIOR
    if prior["name"] == PriorSettings().path and settings.teacher.name != ModelSettings().name:
        log.warning("prior %s draws pen strokes alone: name one for your teacher, prior.path", prior["name"])
    if source and source.geometry.note:
        log.warning("prior %s: %s", source.folder, source.geometry.note)
    if settings.prompts.classes and prior["conditioning"] != "text":
        log.warning("prior %s takes no prompts: prompts.classes plays no part", prior["name"])
    if prior["conditioning"] == "class":
        check_classes("prior.labels", settings.prior.labels, names)
        check_labels(settings.prior, settings.prior.path, prior["classes"], names)
    if prior["conditioning"] == "image" and settings.method != "dda":
        raise UsageError(
            f"prior {prior['name']} only varies images: it takes part in --method dda, not {settings.method}"
        )
    if settings.method == "dda":
        check_start(settings, varies(prior))
    tiny = None
    if source and settings.uses_tiny_decoder:
        tiny = locate_tiny_decoder(settings.guidance.tiny_decoder, source).sha256
    side = teacher["config"]["input"]["size"] if settings.inverts else prior["image_size"]
    decisions = source.decisions if source else {}
    return SynthInputs(prior, teacher, adversary, names, settings.images.size or side, sources, tiny, decisions)


def check_classes(key: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Raises UsageError where the table ``key`` has a name that is no class of the teacher's."""
    if unknown := [name for name in given if name not in names]:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UsageError(f"{key}: the teacher has no class {unknown[0]!r}{more}; {suggest(unknown[0], names)}")


def model_sources(settings: SynthSettings) -> dict[str, ModelSource]:
    """The classifiers of ``settings`` by role: ``teacher`` and, where there is one, ``adversary``."""
    named = {"teacher": settings.teacher, "adversary": settings.adversary}
    return {role: resolve(model) for role, model in named.items() if model}


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
            "step_size allow none from there on"
        )


def semantics(settings: SynthSettings, inputs: SynthInputs) -> dict[str, Any]:
    """What the fingerprint covers: method, checksums, classes and shard size; not the number of shards, the device,
    where progress goes, or where the models lie.

    Settings at their defaults are left out, so that a new setting does not orphan a half-made dataset.
    """
    elsewhere: Any = dict.fromkeys(("shards", "device", "loggers", "teacher", "adversary"), True)
    elsewhere |= {"prior": {"path", "lora"}, "guidance": {"tiny_decoder"}}
    chosen = settings.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)
    covered = {
        "algorithm": ALGORITHM_VERSION,
        "settings": {name: value for name, value in chosen.items() if value != {}},
        "prior": inputs.prior["sha256"],
        "teacher": network(inputs.teacher),
        "class_names": list(inputs.class_names),
    }
    if settings.guides and settings.prior.dtype == "fp16":
        covered["loss_scale"] = LOSS_SCALE
    if inputs.adversary:
        covered["adversary"] = network(inputs.adversary)
    if inputs.tiny_decoder:
        covered["tiny_decoder"] = inputs.tiny_decoder
    return covered


def network(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a classifier changes the images: its weights, the network around them, and how it sees."""
    config = identity["config"]
    return {
        "sha256": identity["sha256"],
        "architecture": identity["architecture"],
        "stem": config.get("stem"),
        "input": config.get("input"),
    }


MODELS = ("prior", "teacher", "adversary", "tiny_decoder")

Pinned = Mapping[str, Any]
"""The checksums (or networks) in a plan's semantics of ``MODELS``. A worker compares them with what it loads: its
machine may hold other copies, or somebody overwrote them. Models that are not in it are not compared."""


def pinned_models(semantics: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan's ``semantics`` that workers compare with what they load. JSON-able."""
    return {name: semantics[name] for name in MODELS if name in semantics}


def check_network(planned: Pinned, name: str, where: str, identity: dict[str, Any]) -> None:
    """Raises DataError where the classifier that was loaded from ``where`` is not the plan's ``name``."""
    if name in planned:
        for key, value in network(identity).items():
            _compare(f"{name} {where}", key, value, planned[name].get(key))


def check_folder(planned: Pinned, name: str, source: ModelFolder) -> None:
    """Raises DataError where the model in ``source`` is not the plan's ``name``. Reads all that loading reads."""
    if name in planned:
        _compare(f"{name} {source.folder}", "sha256", source.sha256, planned[name])


def _compare(what: str, key: str, loaded: Any, expected: Any) -> None:
    if loaded != expected:
        raise DataError(
            f"{what} on {platform.node()} is not the one that the run was planned with: its {key} is {loaded}, "
            f"expected {expected}"
        )
