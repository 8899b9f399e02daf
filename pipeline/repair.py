"""A lost or damaged index comes back from the tars. Used by ``factory rebuild``."""

from typing import Any

from manifests.errors import DataError
from manifests.info import DatasetInfo
from manifests.merge import MANIFEST
from manifests.reader import Manifest
from manifests.rebuild import rebuild
from manifests.storage import Storage
from pipeline.lease import Lease
from pipeline.plan import PLAN, make_plan, read_plan
from pipeline.progress import say
from pipeline.recipe import Recipe
from pipeline.synth import dataset_info, teacher_of
from stages.synth.plan_inputs import inspect_inputs


def rebuild_run(url: str) -> dict[str, Any]:
    """Tables, done records and manifest of a run folder from its tars; ``damaged`` tells what has to be made again.

    The dataset's description comes from the manifest while that can be read, else from the plan, whose prior and
    teacher must then still be where the recipe says.
    """
    storage = Storage(url)
    if not storage.list("shards"):
        raise DataError(f"{storage.url}: nothing to rebuild from: no tars in shards/")
    with Lease(storage, on_line=say):
        rebuilt = rebuild(storage, description(storage))
    return {
        "run": storage.url,
        "manifest": storage.path(MANIFEST),
        "shards": len(rebuilt.info.tars),
        "rows": rebuilt.info.rows,
        "damaged": {str(shard): reason for shard, reason in rebuilt.damaged.items()},
    }


def description(storage: Storage) -> DatasetInfo | None:
    """What the plan says of the dataset; None (the manifest tells) where there is no plan or the manifest is whole."""
    if not storage.exists(PLAN):
        return None
    try:
        Manifest.open(storage.path(MANIFEST), skip_bad=True)
        return None
    except DataError:
        pass
    plan = read_plan(storage)
    recipe = Recipe.model_validate(plan.recipe)
    inputs = inspect_inputs(recipe.synth)
    if make_plan(recipe, inputs).fingerprint != plan.fingerprint:
        raise DataError(
            f"{storage.url}: the prior or the teacher that {PLAN} names is not the one the data was made with"
        )
    return dataset_info(plan, inputs, teacher_of(recipe, inputs))
