"""What a plan needs to know of stage 1 before it runs: identities, fingerprinted semantics, sizes. No torch."""

from dataclasses import dataclass
from typing import Any

from stages.models.identity import teacher_identity
from stages.synth.priors import prior_identity
from stages.synth.settings import SynthSettings

ALGORITHM_VERSION = 1  # raise when the same settings would make other images


@dataclass(frozen=True)
class SynthInputs:
    """Checked identities of prior and teacher, and what they imply."""

    prior: dict[str, Any]
    teacher: dict[str, Any]
    class_names: tuple[str, ...]
    image_size: int


def inspect_inputs(settings: SynthSettings) -> SynthInputs:
    """Find prior and teacher and read their identities; raises DataError or UsageError where one is unusable."""
    teacher = teacher_identity(settings.teacher)
    names = tuple(teacher["config"]["class_names"])
    if settings.method == "noise":
        return SynthInputs({"name": "noise", "sha256": None}, teacher, names, settings.images.size or 32)
    prior = prior_identity(settings.prior)
    return SynthInputs(prior, teacher, names, settings.images.size or prior["image_size"])


def semantics(settings: SynthSettings, inputs: SynthInputs) -> dict[str, Any]:
    """What the fingerprint covers: method, checksums, classes and shard size; not the number of shards, the device,
    or where the models lie."""
    chosen = settings.model_dump(mode="json", exclude={"shards", "device", "teacher"})
    del chosen["prior"]["path"]
    return {
        "algorithm": ALGORITHM_VERSION,
        "settings": chosen,
        "prior": inputs.prior["sha256"],
        "teacher": {"sha256": inputs.teacher["sha256"], "input": inputs.teacher["config"]["input"]},
        "class_names": list(inputs.class_names),
    }
