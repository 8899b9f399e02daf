"""A worker of stage 1: load the models once; for each group of a shard sample, score and write; commit the shard."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from manifests.errors import DataError, NumericsError, UsageError
from manifests.schema import Row, make_key
from manifests.shard import ShardWriter, done_record
from manifests.storage import Storage
from stages.memory import Repeatable, find_device, free_memory, out_of_memory, retry_with_smaller_batches
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher
from stages.models.source import ModelSource
from stages.models.teacher import Teacher
from stages.progress import OnProgress, ShardWatch
from stages.settings import SynthSettings
from stages.synth.cmi import cmi
from stages.synth.dda import dda
from stages.synth.decoders import TinyDecoder, fidelity, load_decoder, use_tiny_decoder
from stages.synth.group import Group, make_group
from stages.synth.guidance import Losses, Population, two_views
from stages.synth.images import ImageWriter, Sample, as_stored, to_pixels
from stages.synth.inputs import Pinned, check_folder, check_network, model_sources
from stages.synth.inversion import deepinversion, inverted_side
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import Counters, DecodedGroup, Models, check_intermediates, diffdfkd, dmkd
from stages.synth.scores import FINAL, SOURCE, judge, score

log = logging.getLogger(__name__)

METHODS = {"diffdfkd": diffdfkd, "dmkd": dmkd, "cmi": cmi, "deepinversion": deepinversion, "dda": dda}
MAX_SKIPPED = 0.05
"""Share of a shard's guided updates that may be left out."""


def load_models(
    settings: SynthSettings,
    run: Storage | None = None,
    planned: Pinned | None = None,
    sources: Mapping[str, ModelSource] | None = None,
) -> Models:
    """Prior, teacher and adversary on the device asked for. Raises where they do not fit each other or the method, or
    are not the ``planned`` ones.

    ``run`` is the run's folder, through which its workers share what they fit; ``sources`` are the classifiers, where
    this process has resolved them already.
    """
    planned, device = planned or {}, str(find_device(settings.device))
    models = load_classifiers(settings, sources or model_sources(settings), device, planned)
    for source in (sources or {}).values():
        source.release()
    teacher, adversary = models["teacher"], models.get("adversary")
    prior = load_prior(settings.prior.labeled(teacher.class_names), device) if settings.needs_prior else None
    if prior:
        check_folder(planned, "prior", prior.source)
        check_intermediates(settings.images.intermediates, prior.timesteps)
        use_tiny_decoder(prior, settings)
    decode = load_decoder(prior, settings, teacher, run) if prior and settings.guides else None
    for tiny in (decode, prior and prior.tiny):
        if isinstance(tiny, TinyDecoder):
            check_folder(planned, "tiny_decoder", tiny.source)
    share = settings.guidance.bn_population
    if share and settings.groups_per_shard == 1:
        log.warning("guidance.bn_population joins the groups of a shard, which is one: set groups_per_shard")
    return Models(prior, teacher, adversary, device, decode, population=Population(share) if share else None)


def load_classifiers(
    settings: SynthSettings, sources: Mapping[str, ModelSource], device: str = "cpu", planned: Pinned | None = None
) -> dict[str, Teacher]:
    """Teacher and adversary by role. Raises as :func:`load_models`."""
    models = {role: load_teacher(source, device) for role, source in sources.items()}
    teacher, adversary = models["teacher"], models.get("adversary")
    for role, model in models.items():
        check_network(planned or {}, role, getattr(settings, role).name, model.identity)
    if settings.method != "dmkd":
        if not teacher.differentiable:
            raise UsageError(f"{teacher.what} gives no gradient and cannot guide: use --method dmkd")
        if bn_weight(settings) and not teacher.has_batchnorm:
            views = settings.method == "diffdfkd" and two_views(settings.guidance, teacher)
            instead = ", view consistency is on instead" if views else ""
            log.warning("%s has no BatchNorm: the feature-statistics term is off%s", teacher.what, instead)
    if settings.method == "dda" and settings.dda.space == "teacher" and teacher.class_weights is None:
        raise UsageError(f"{teacher.what} shows no features to filter by: set dda.space=contrastive")
    if adversary:
        check_adversary(adversary, teacher)
    return models


def check_adversary(adversary: Teacher, teacher: Teacher) -> None:
    """Raises UsageError where ``adversary`` gives no gradient, DataError where it knows other classes than ``teacher``,
    or the same ones in another order."""
    if not adversary.differentiable:
        raise UsageError(f"{adversary.what} gives no gradient and cannot be an adversary: name a network")
    if adversary.num_classes != teacher.num_classes:
        raise DataError(f"the adversary has {adversary.num_classes} classes, the teacher {teacher.num_classes}")
    if adversary.class_names != teacher.class_names and {*adversary.class_names} == {*teacher.class_names}:
        raise DataError("the adversary and the teacher have the same classes in another order")


def decoder_report(models: Models, settings: SynthSettings) -> dict[str, Any]:
    """Fidelity of the guidance decoder, reported once with a worker's first shard (skipped if the full decoder's
    backward pass does not fit in memory)."""
    if models.decode is None or models.prior is None:
        return {}
    kind, facts = settings.guidance.decoder, {}
    try:
        facts = fidelity(models.decode, models.prior, settings, models.teacher)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        log.warning("guidance.decoder=%s: no memory to compare its gradients with the full decoder's", kind)
    free_memory()  # the comparison may have taken more than the run will
    return {"decoder": {"kind": kind, "sha256": getattr(models.decode, "sha256", None)} | facts}


def bn_weight(settings: SynthSettings) -> float:
    """The weight of the feature-statistics term in the settings of the method."""
    if settings.method == "diffdfkd":
        return settings.guidance.bn
    return settings.deepinversion.bn if settings.method == "deepinversion" else settings.cmi.bn


def steps_of_group(models: Models, settings: SynthSettings) -> int:
    """Steps of a group over all phases of the method: optimizer steps of an inversion, denoising steps."""
    inversion = {"cmi": settings.cmi.batches * settings.cmi.steps, "deepinversion": settings.deepinversion.steps}
    inversion["dda"] = inversion["cmi"]
    if models.prior is None:
        return inversion[settings.method]
    steps = len(models.prior.timesteps)
    if settings.method == "dda":
        alone = models.prior.source.family.image_encoder is not None
        steps = settings.dda.variants * (steps - settings.dda.first_step(steps, alone))
    return inversion.get(settings.method, 0) + steps


class ShardWorker:
    """Makes shards of one plan and commits them into the folder or bucket ``storage``: every method but ``noise``.

    ``settings`` is a dumped :class:`SynthSettings`. Raises DataError if a model that it loads is not the ``planned``
    one (:mod:`stages.synth.inputs`).
    """

    def __init__(
        self,
        settings: dict[str, Any],
        storage: str,
        fingerprint: str,
        planned: Pinned | None = None,
        sources: Mapping[str, ModelSource] | None = None,
    ) -> None:
        self.settings = parsed = SynthSettings.model_validate(settings)
        self.storage, self.fingerprint = Storage(storage), fingerprint
        self.storage.hold()
        torch.set_num_threads(parsed.threads)
        self.repeatable = Repeatable(find_device(parsed.device))
        models = self.repeatable(lambda: load_models(parsed, self.storage, planned, sources))
        self.models = replace(models, on_step=self._on_step)
        self.watch: ShardWatch | None = None
        self.teacher = self.models.teacher
        self.decoder_report = self.repeatable(lambda: decoder_report(self.models, parsed))
        self.prior_labels = parsed.prior.labeled(self.teacher.class_names).labels
        self.side = inverted_side(self.teacher, parsed.images.size) if parsed.inverts else parsed.images.size

    def _on_step(self, losses: Losses | None) -> None:
        if self.watch is not None:
            self.watch.step(lambda: None if losses is None else losses.ce.detach().neg().exp().mean().item())

    def run(self, shard: int, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Make and commit ``shard`` (at once if it is committed already); a small report of JSON values."""
        started, settings, counters = time.monotonic(), self.settings, Counters()
        count, splits = settings.groups_per_shard, {}
        self.models.limit_batches(None)
        watch = self.watch = ShardWatch(shard, count, steps_of_group(self.models, settings), on_progress)
        if self.models.population:
            self.models.population.restart()
        record = done_record(self.storage, shard)
        if record is None:
            with (
                ShardWriter(self.storage, shard, self.fingerprint) as writer,
                ImageWriter(writer, settings.images.format) as images,
            ):
                for position in range(count):
                    group = make_group(settings, shard * count + position, self.teacher.class_names)
                    samples, cost = self.make_group_samples(group, shard, position)
                    if self.models.population:
                        self.models.population.advance()
                    images.write(samples)
                    counters += cost
                    check_skipped(counters, settings, (position + 1) / count)
                    if limit := self.teacher.batch_limit:
                        splits[group.index] = limit
                    watch.end_group([row for row, _ in samples])
                images.flush()
                record = writer.commit()
        first_report, self.decoder_report = self.decoder_report, {}
        return {
            "shard": shard,
            **record.report,
            "seconds": round(time.monotonic() - started, 3),
            **asdict(counters),
            **watch.judgment,
            **({"warnings": [skipped_line(counters, settings)]} if counters.skipped_updates else {}),
            **({"splits": splits} if splits else {}),
            **first_report,
        }

    def make_group_samples(self, group: Group, shard: int, position: int) -> tuple[list[Sample], Counters]:
        """:meth:`samples`; a group that does not fit the memory is made again in micro-batches of half the size.

        Later groups of the shard keep that size. Raises FactoryError where one trajectory at a time is too many.
        """
        return retry_with_smaller_batches(
            lambda: self.repeatable(lambda: self.samples(group, shard, position)),
            self.teacher.batch_limit or len(group.trajectories),
            self.models.limit_batches,
            f"group {group.index} does not fit the memory, not even one trajectory at a time",
            "free memory, or try prior.dtype=fp16",
        )

    def samples(self, group: Group, shard: int, position: int) -> tuple[list[Sample], Counters]:
        """Synthesize a group, number ``position`` of its ``shard``: manifest row and image of each stored sample,
        trajectory by trajectory, and what it cost."""
        settings, teacher, counters = self.settings, self.teacher, Counters()
        if self.watch is not None:
            self.watch.begin_group()
        frames = list(METHODS[settings.method](self.models, group, settings, counters))
        stored = [as_stored(decoded_pixels(frame, group, self.side), settings.images.format) for frame in frames]
        views = [to_unit(pixels).to(self.models.device) for pixels, _ in stored]
        rows = self.rows(group, frames, shard, position)
        logits, features = (by_trajectory(parts) for parts in zip(*(judge(teacher, x) for x in views), strict=True))
        embed = frames[-1].embed
        embeddings = by_trajectory([embed(x).cpu() for x in views]) if embed else None
        weights = None if teacher.class_weights is None else teacher.class_weights.cpu()
        assert logits is not None
        columns = score(
            rows, logits, features, weights, settings.min_confidence, settings.dda.min_cosine, embeddings=embeddings
        )
        if settings.store_logits:
            for column, values in zip(columns, logits.half().tolist(), strict=True):
                column["logits"] = values
        files = [frame_files[i] for i in range(len(group.trajectories)) for _, frame_files in stored]
        return [(row | column, file) for row, column, file in zip(rows, columns, files, strict=True)], counters

    def rows(self, group: Group, frames: Sequence[DecodedGroup], shard: int, position: int) -> list[Row]:
        """The columns of each sample that say how it was made, and what its cosine is with."""
        settings, made = self.settings, []
        first = position * len(group.trajectories) * len(frames)
        for i, (trajectory, label) in enumerate(zip(group.trajectories, group.labels, strict=True)):
            keys = [make_key(shard, first + i * len(frames) + f) for f in range(len(frames))]
            for key, frame in zip(keys, frames, strict=True):
                name, losses, derived = self.teacher.class_names[label], frame.losses, frame.source is not None
                prior = None if settings.inverts and not derived else self.models.prior
                conditioning = prior.conditioning if prior else "none"
                made.append(
                    {
                        "key": key,
                        "label": label,
                        "class_name": name,
                        "prompt": group.prompts[i] if conditioning == "text" else None,
                        "negative_prompt": settings.prior.negative_prompt if conditioning == "text" else None,
                        "prior_label": self.prior_labels[name] if conditioning == "class" else None,
                        "method": settings.method,
                        "seed": settings.seed,
                        "group": group.index,
                        "trajectory": trajectory,
                        "source_key": None if frame.source is None else keys[frame.source],
                        "step": frame.step,
                        "timestep": frame.timestep,
                        "lca": [asdict(m) | {"partner": group.trajectories[m.partner]} for m in frame.mixes[i]],
                        "loss_ce": losses.ce[i].item() if losses else None,
                        "loss_adv": losses.adversarial[i].item() if losses else None,
                        "loss_bn": losses.bn.item() if losses else None,
                        "skipped_updates": (frame.skipped[i] or None) if frame.skipped else None,
                        "cosine_ref": SOURCE if derived else f"class:{label}" if frame.timestep == 0 else FINAL,
                        "cosine_space": "contrastive" if frame.embed else "teacher",
                    }
                )
        return made


def decoded_pixels(frame: DecodedGroup, group: Group, side: int | None) -> Tensor:
    """Its images as :func:`~stages.synth.images.to_pixels`. Raises DataError where they are not finite."""
    if not torch.isfinite(frame.images).all():
        raise DataError(
            f"group {group.index}: the prior decoded NaN or infinite pixels at step {frame.step}; "
            "try prior.dtype=fp32 or a smaller guidance.step_size"
        )
    return to_pixels(frame.images, side)


def by_trajectory(frames: Sequence[Tensor | None]) -> Tensor | None:
    """``[n, …]`` for each frame as ``[n · frames, …]``, trajectory by trajectory; None where there is none."""
    present = [frame for frame in frames if frame is not None]
    return torch.stack(present, dim=1).flatten(0, 1) if present else None


def skipped_line(counters: Counters, settings: SynthSettings) -> str:
    """The guided updates that were left out, for people."""
    total = counters.updates * settings.group_size
    return (
        f"{counters.skipped_updates} of {total} guided updates were left out: their gradient is not finite "
        f"(prior.dtype={settings.prior.dtype})"
    )


def check_skipped(counters: Counters, settings: SynthSettings, share: float) -> None:
    """Raises NumericsError once more updates are left out than a whole shard may; ``share`` of it is done."""
    if counters.skipped_updates > MAX_SKIPPED * counters.updates * settings.group_size / share:
        half = settings.prior.dtype == "fp16"
        remedy = "set prior.dtype=bf16 or fp32" if half else "check the weights and inputs of teacher and prior"
        raise NumericsError(f"{skipped_line(counters, settings)}, more than {MAX_SKIPPED:.0%} of a shard's; {remedy}")
