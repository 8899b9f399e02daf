"""The public names of dfkd-factory, each loaded when it is first used: importing this package imports no torch.

    from dfkd_factory import Manifest, Recipe, load_student, run_distill, run_synth

    recipe = Recipe.load("demo", "synth.guidance.step_size=0.2")
    dataset = run_synth(recipe, "runs/digits", shards=8)
    result = run_distill(recipe, [dataset.manifest])
    student = load_student(result.students["digits-cnn-small"].folder)
    sure = Manifest.open(dataset.manifest).where("confidence >= 0.5")

docs/api.md shows each of them.
"""

from typing import TYPE_CHECKING

from manifests import lazy_exports

if TYPE_CHECKING:  # "as": exported again
    from manifests.integrity import verify as verify
    from manifests.reader import Manifest as Manifest
    from manifests.shard import ShardWriter as ShardWriter
    from pipeline.distill import run_distill as run_distill
    from pipeline.recipe import Recipe as Recipe
    from pipeline.rounds import RoundsResult as RoundsResult
    from pipeline.rounds import run_rounds as run_rounds
    from pipeline.run_all import AllResult as AllResult
    from pipeline.run_all import run_all as run_all
    from pipeline.synth import SynthResult as SynthResult
    from pipeline.synth import run_synth as run_synth
    from stages.distill.evaluate import evaluate as evaluate
    from stages.distill.export import load_student as load_student
    from stages.distill.results import DistillResult as DistillResult
    from stages.distill.results import StudentResult as StudentResult
    from stages.models.loading import load_teacher as load_teacher
    from stages.settings import ModelSettings as ModelSettings
    from stages.settings import PriorSettings as PriorSettings
    from stages.synth.guidance import Guidance as Guidance
    from stages.synth.priors.kinds import load_prior as load_prior
    from stages.synth.sampler import sample as sample

MODULES = {
    "AllResult": "pipeline.run_all",
    "DistillResult": "stages.distill.results",
    "Guidance": "stages.synth.guidance",
    "Manifest": "manifests.reader",
    "ModelSettings": "stages.settings",
    "PriorSettings": "stages.settings",
    "Recipe": "pipeline.recipe",
    "RoundsResult": "pipeline.rounds",
    "ShardWriter": "manifests.shard",
    "StudentResult": "stages.distill.results",
    "SynthResult": "pipeline.synth",
    "evaluate": "stages.distill.evaluate",
    "load_prior": "stages.synth.priors.kinds",
    "load_student": "stages.distill.export",
    "load_teacher": "stages.models.loading",
    "run_all": "pipeline.run_all",
    "run_distill": "pipeline.distill",
    "run_rounds": "pipeline.rounds",
    "run_synth": "pipeline.synth",
    "sample": "stages.synth.sampler",
    "verify": "manifests.integrity",
}
"""The module of each public name; the imports above say the same to type checkers."""
__getattr__, __dir__, __all__ = lazy_exports(__name__, MODULES)
