"""``factory run synth --dry-run``: what a run would make and cost. No run is written and no weight loaded; a prior
that a hub holds is fetched into its cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manifests.shard import committed
from manifests.storage import Storage
from pipeline.bench import Time
from pipeline.plan import make_plan, refuse_file
from pipeline.recipe import Recipe
from pipeline.terminal import flop, pairs, size
from stages.settings import SynthSettings
from stages.synth.inputs import SynthInputs, inspect_inputs, varies
from stages.synth.priors.files import NotFetched

JSON_BYTES = 2048  # the sample's row in its tar, with tar headers
RAW_SHARE = {"png": 0.83, "jpg": 0.2, "webp": 0.2}  # of the raw pixels; noisy images need about this much


@dataclass(frozen=True)
class Cost:
    """Counted FLOPs, of a trajectory by purpose and of the whole run (``flop``), and a worker's bytes of memory."""

    flop_per_trajectory: int
    denoiser: int
    guidance_decoder: int
    guidance_teacher: int
    inversion: int
    stored_decodes: int
    scores: int
    fit_decoder_once: int
    flop: int
    weights_bytes: int
    saved_bytes_per_trajectory: int
    saved_bytes_per_group: int

    def lines(self, images: int, group: int) -> Iterator[tuple[str, str | None]]:
        parts = {
            "denoiser": self.denoiser,
            "guidance decoder": self.guidance_decoder,
            "guiding teacher": self.guidance_teacher,
            "inversion": self.inversion,
            "stored images": self.stored_decodes,
            "their scores": self.scores,
        }
        named = ", ".join(f"{name} {flop(value)}" for name, value in parts.items() if value)
        fit = f"first a decoder is fitted, {flop(self.fit_decoder_once)}, unless an earlier run left one"
        yield "compute", f"{flop(self.flop)} in all, {flop(self.flop / images)} an image (counted)"
        yield "", f"a trajectory: {named}"
        yield "", fit if self.fit_decoder_once else None
        yield (
            "memory",
            f"{size(self.weights_bytes)} of weights, {size(self.saved_bytes_per_group)} saved for backward passes "
            f"({size(self.saved_bytes_per_trajectory)} × {group}); working memory comes on top",
        )


@dataclass(frozen=True)
class SynthEstimate:
    """What ``run_synth`` would make. What depends on a prior that cannot be fetched is None; ``unknown`` says why."""

    out: str
    fingerprint: str | None
    recipe: dict[str, Any]
    workers: int
    shards: int
    shards_done: int
    groups_per_shard: int
    trajectories: int
    images: int
    image_size: int | None
    classes: int | None
    denoiser_calls: int
    disk_bytes_at_most: int | None
    cost: Cost | None
    time: Time | None
    prior: dict[str, Any] | None
    teacher: dict[str, Any] | None
    versions: dict[str, str] | None
    unknown: str | None

    def lines(self) -> Iterator[str]:
        """Settings first, then what they amount to."""
        import yaml

        yield yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=110)
        entries: list[tuple[str, str | None]] = [
            ("out", f"{self.out} ({self.shards_done} of {self.shards} shards done)")
        ]
        if self.prior and self.teacher:
            entries += [
                ("prior", f"{self.prior.get('name')}, sha256 {str(self.prior.get('sha256'))[:12]}"),
                ("teacher", f"{self.teacher.get('architecture')}, sha256 {self.teacher['sha256'][:12]}"),
                ("classes", str(self.classes)),
            ]
        else:
            entries.append(("unknown", f"{self.unknown}; so classes, compute, memory and fingerprint are not known"))
        pixels = f"{self.image_size} px" if self.image_size else "the prior's size"
        disk = self.disk_bytes_at_most and f"at most about {size(self.disk_bytes_at_most)}"
        entries += [
            ("images", f"{self.images} of {pixels}, from {self.trajectories} trajectories"),
            ("denoiser calls", f"{self.denoiser_calls} still to make (a batch of one each; CFG included)"),
            *(self.cost.lines(self.images, self.recipe["synth"]["group_size"]) if self.cost else ()),
            *(self.time.entries() if self.time else ()),
            ("disk", disk or None),
            ("fingerprint", self.fingerprint),
        ]
        yield from pairs(16, *entries)


def dry_run(recipe: Recipe, out: str, workers: int = 1, price: float | None = None) -> SynthEstimate:
    """What ``run_synth`` would do; finds the same unusable inputs, but goes on without a prior that cannot be
    fetched."""
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
    total = cost(synth, inputs) if inputs else None
    left = max(0, synth.shards - done)
    work = total.flop * left // synth.shards if total else None
    return SynthEstimate(
        out=storage.url,
        fingerprint=plan.fingerprint if plan else None,
        recipe=recipe.model_dump(mode="json", exclude={"distill", "rounds"}),
        workers=workers,
        shards=synth.shards,
        shards_done=done,
        groups_per_shard=synth.groups_per_shard,
        trajectories=trajectories * synth.shards,
        images=images * synth.shards,
        image_size=image_size,
        classes=len(inputs.class_names) if inputs else None,
        denoiser_calls=denoiser_calls(synth, inputs) * trajectories * left,
        disk_bytes_at_most=round(images * synth.shards * per_image) if per_image else None,
        cost=total,
        time=Time.of("synth", recipe, images * left, work, workers, price) if left else None,
        prior=inputs.prior if inputs else None,
        teacher=inputs.teacher if inputs else None,
        versions=plan.versions if plan else None,
        unknown=unknown,
    )


def cost(synth: SynthSettings, inputs: SynthInputs) -> Cost | None:
    """What ``synth`` costs; None for ``noise``, which runs no model, and where it cannot be counted."""
    if synth.method == "noise":
        return None
    from stages.cost import synth_cost

    found = synth_cost(synth, inputs.sources)
    if found is None:
        return None
    return Cost(
        flop_per_trajectory=found.flops,
        denoiser=found.denoiser,
        guidance_decoder=found.guidance_decoder,
        guidance_teacher=found.guidance_teacher,
        inversion=found.inversion,
        stored_decodes=found.stored,
        scores=found.score,
        fit_decoder_once=found.fit,
        flop=found.flops * synth.shards * synth.groups_per_shard * synth.group_size,
        weights_bytes=found.weights,
        saved_bytes_per_trajectory=found.saved,
        saved_bytes_per_group=found.saved * synth.group_size,
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
