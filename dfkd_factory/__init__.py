"""The public names of dfkd-factory, each loaded when it is first used: importing this package imports no torch.

    from dfkd_factory import Manifest, Recipe, load_student, run_distill, run_synth

    recipe = Recipe.load("demo", "synth.guidance.step_size=0.2")
    dataset = run_synth(recipe, "runs/digits", shards=8)
    result = run_distill(recipe, [dataset.manifest])
    student = load_student(result.students["digits-cnn-small"].folder)
    sure = Manifest.open(dataset.manifest).select("confidence >= 0.5")

docs/api.md shows each of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as": exported again
    from manifests.reader import Manifest as Manifest
    from manifests.shard import ShardWriter as ShardWriter
    from manifests.verify import verify as verify
    from pipeline.distill import DistillResult as DistillResult
    from pipeline.distill import StudentResult as StudentResult
    from pipeline.distill import run_distill as run_distill
    from pipeline.recipe import Recipe as Recipe
    from pipeline.rounds import RoundsResult as RoundsResult
    from pipeline.rounds import run_rounds as run_rounds
    from pipeline.synth import SynthResult as SynthResult
    from pipeline.synth import run_synth as run_synth
    from stages.distill.evaluate import evaluate as evaluate
    from stages.distill.export import load_student as load_student
    from stages.models.loading import load_teacher as load_teacher
    from stages.settings import ModelSettings as ModelSettings
    from stages.settings import PriorSettings as PriorSettings
    from stages.synth.priors.kinds import load_prior as load_prior
    from stages.synth.sampler import Guide as Guidance  # noqa: F401
    from stages.synth.sampler import denoise as sample  # noqa: F401

NAMES = {
    "DistillResult": "pipeline.distill:DistillResult",
    "Guidance": "stages.synth.sampler:Guide",
    "Manifest": "manifests.reader:Manifest",
    "ModelSettings": "stages.settings:ModelSettings",
    "PriorSettings": "stages.settings:PriorSettings",
    "Recipe": "pipeline.recipe:Recipe",
    "RoundsResult": "pipeline.rounds:RoundsResult",
    "ShardWriter": "manifests.shard:ShardWriter",
    "StudentResult": "pipeline.distill:StudentResult",
    "SynthResult": "pipeline.synth:SynthResult",
    "evaluate": "stages.distill.evaluate:evaluate",
    "load_prior": "stages.synth.priors.kinds:load_prior",
    "load_student": "stages.distill.export:load_student",
    "load_teacher": "stages.models.loading:load_teacher",
    "run_distill": "pipeline.distill:run_distill",
    "run_rounds": "pipeline.rounds:run_rounds",
    "run_synth": "pipeline.synth:run_synth",
    "sample": "stages.synth.sampler:denoise",
    "verify": "manifests.verify:verify",
}
"""Public name → ``module:attribute``; the imports above say the same to type checkers."""
__all__ = [*NAMES]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return __all__
