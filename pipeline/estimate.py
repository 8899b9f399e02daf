"""``factory run synth --dry-run``: what a run would make and cost. No run is written and no weight loaded; a prior
that a hub holds is fetched into its cache."""

from collections.abc import Iterator
from typing import Any

from manifests.shard import committed
from manifests.storage import Storage
from pipeline.executors.settings import ExecutorSettings
from pipeline.plan import make_plan, refuse_file
from pipeline.recipe import Recipe
from pipeline.terminal import flop, plain, plain_block, size
from stages.settings import SynthSettings
from stages.synth.inputs import SynthInputs, inspect_inputs, varies
from stages.synth.priors.files import NotFetched

JSON_BYTES = 2048  # the sample's row in its tar, with tar headers
RAW_SHARE = {"png": 0.83, "jpg": 0.2, "webp": 0.2}  # of the raw pixels; noisy images need about this much


def dry_run(recipe: Recipe, out: str, place: ExecutorSettings) -> dict[str, Any]:
    """What ``run_synth`` would do; finds the same unusable inputs, but goes on without a prior that cannot be fetched:
    what would need it is None, and ``unknown`` says why."""
    synth, storage = recipe.synth, Storage(out)
    refuse_file(storage)
    inputs: SynthInputs | None = None
    unknown = None
    try:
        inputs = inspect_inputs(synth)
    except NotFetched as error:
        unknown = str(error)
    trajectories = synth.groups_per_shard * synth.group_size
    images = trajectories * synth.images_per_trajectory
    image_size = inputs.image_size if inputs else synth.images.size
    per_image = image_size and 3 * image_size**2 * RAW_SHARE[synth.images.format] + JSON_BYTES
    plan = make_plan(recipe, inputs) if inputs else None
    done = len(committed(storage))
    return {
        "out": storage.url,
        "fingerprint": plan and plan.fingerprint,
        "recipe": recipe.model_dump(mode="json", exclude={"distill", "rounds"}),
        "workers": place.workers,
        "shards": synth.shards,
        "shards_done": done,
        "groups_per_shard": synth.groups_per_shard,
        "trajectories": trajectories * synth.shards,
        "images": images * synth.shards,
        "image_size": image_size,
        "classes": inputs and len(inputs.class_names),
        "denoiser_calls": denoiser_calls(synth, inputs) * trajectories * max(0, synth.shards - done),
        "disk_bytes_at_most": per_image and round(images * synth.shards * per_image),
        "cost": cost(synth, inputs) if inputs else None,
        "prior": inputs and inputs.prior,
        "teacher": inputs and inputs.teacher,
        "versions": plan and plan.versions,
        "unknown": unknown,
    }


def cost(synth: SynthSettings, inputs: SynthInputs) -> dict[str, Any] | None:
    """Counted FLOPs of a trajectory by purpose, and bytes of a worker; None for ``noise``, which runs no model."""
    if synth.method == "noise":
        return None
    from stages.cost import synth_cost

    found = synth_cost(synth, inputs.sources)
    if found is None:
        return None
    return {
        "flop_per_trajectory": found.flops,
        "denoiser": found.denoiser,
        "guidance_decoder": found.guidance_decoder,
        "guidance_teacher": found.guidance_teacher,
        "inversion": found.inversion,
        "stored_decodes": found.stored,
        "scores": found.score,
        "fit_decoder_once": found.fit,
        "flop": found.flops * synth.shards * synth.groups_per_shard * synth.group_size,
        "weights_bytes": found.weights,
        "saved_bytes_per_trajectory": found.saved,
        "saved_bytes_per_group": found.saved * synth.group_size,
    }


def dry_run_lines(result: dict[str, Any]) -> Iterator[str]:
    """The dry run for people: settings first, then what they amount to."""
    import yaml

    yield plain_block(yaml.safe_dump(result["recipe"], sort_keys=False, allow_unicode=True, width=110))
    yield f"out             {plain(result['out'])} ({result['shards_done']} of {result['shards']} shards done)"
    if result["unknown"]:
        yield f"unknown         {plain(result['unknown'])}; so classes, compute, memory and fingerprint are not known"
    else:
        prior, teacher = result["prior"], result["teacher"]
        yield f"prior           {plain(prior.get('name'))}, sha256 {str(prior.get('sha256'))[:12]}"
        yield f"teacher         {plain(teacher.get('architecture'))}, sha256 {teacher['sha256'][:12]}"
        yield f"classes         {result['classes']}"
    pixels = f"{result['image_size']} px" if result["image_size"] else "the prior's size"
    yield f"images          {result['images']} of {pixels}, from {result['trajectories']} trajectories"
    yield f"denoiser calls  {result['denoiser_calls']} still to make (a batch of one each; CFG included)"
    if result["cost"]:
        yield from cost_lines(result["cost"], result["images"], result["recipe"]["synth"]["group_size"])
    if result["disk_bytes_at_most"]:
        yield f"disk            at most about {size(result['disk_bytes_at_most'])}"
    if result["fingerprint"]:
        yield f"fingerprint     {result['fingerprint']}"


def cost_lines(cost: dict[str, Any], images: int, group: int) -> Iterator[str]:
    """Compute and memory for people."""
    parts = {
        "denoiser": cost["denoiser"],
        "guidance decoder": cost["guidance_decoder"],
        "guiding teacher": cost["guidance_teacher"],
        "inversion": cost["inversion"],
        "stored images": cost["stored_decodes"],
        "their scores": cost["scores"],
    }
    named = ", ".join(f"{name} {flop(value)}" for name, value in parts.items() if value)
    yield f"compute         {flop(cost['flop'])} in all, {flop(cost['flop'] / images)} an image (counted)"
    yield f"                a trajectory: {named}"
    if cost["fit_decoder_once"]:
        once = flop(cost["fit_decoder_once"])
        yield f"                first a decoder is fitted, {once}, unless an earlier run left one"
    yield (
        f"memory          {size(cost['weights_bytes'])} of weights, {size(cost['saved_bytes_per_group'])} saved for "
        f"backward passes ({size(cost['saved_bytes_per_trajectory'])} × {group}); working memory comes on top"
    )


def denoiser_calls(synth: SynthSettings, inputs: SynthInputs | None) -> int:
    """Denoiser evaluations per trajectory: one per step, two where classifier-free guidance is on."""
    if not synth.needs_prior:
        return 0
    prior = synth.prior
    conditional = inputs is None or inputs.prior["conditioning"] != "none"
    times, first = 1, 0
    if synth.method == "dda":
        alone = inputs is not None and varies(inputs.prior)
        times, first = synth.dda.variants, synth.dda.first_step(prior.steps, alone)
    return times * sum(1 + (conditional and prior.cfg_at(step) != 1) for step in range(first, prior.steps))
