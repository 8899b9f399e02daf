"""One worker's life: load prior and teacher once, then make shards of groups and commit them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from manifests.errors import DataError, FactoryError, NumericsError, UsageError
from manifests.shard import ShardWriter, done_record
from manifests.storage import Storage
from stages.micro_batches import free_memory, out_of_memory
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher
from stages.synth.groups import Group, make_group
from stages.synth.guidance import two_views
from stages.synth.guidance_decoder import fidelity, load_decoder
from stages.synth.image_writer import ImageWriter, Sample
from stages.synth.images import to_pixels
from stages.synth.latent_mix import Mix
from stages.synth.priors import load_prior
from stages.synth.sampler import Frame, Models, Work
from stages.synth.scores import teacher_columns
from stages.synth.settings import SynthSettings
from stages.synth.worker import OnGroup

log = logging.getLogger(__name__)
MAX_SKIPPED = 0.05
"""Share of a shard's guided updates that may be left out."""


def load_models(settings: SynthSettings, run: Storage | None = None) -> Models:
    """Prior, teacher and adversary on the device asked for. Raises where they do not fit each other or the method.

    ``run`` is the run's folder, through which its workers share what they fit.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(settings.teacher, device)
    if settings.method == "diffdfkd":
        if not teacher.differentiable:
            raise UsageError(f"{teacher.what} gives no gradient and cannot guide: use --method dmkd")
        if settings.guidance.bn and not teacher.has_batchnorm:
            instead = ", view consistency is on instead" if two_views(settings.guidance, teacher) else ""
            log.warning("%s has no BatchNorm: the feature-statistics term is off%s", teacher.what, instead)
    adversary = load_teacher(settings.adversary, device) if settings.adversary else None
    if adversary and adversary.num_classes != teacher.num_classes:
        raise DataError(f"the adversary has {adversary.num_classes} classes, the teacher {teacher.num_classes}")
    prior = load_prior(settings.prior.labelled(teacher.class_names), device)
    decode = load_decoder(prior, settings, teacher, run) if settings.method == "diffdfkd" else None
    return Models(prior, teacher, adversary, device, decode)


def news(models: Models, settings: SynthSettings) -> dict[str, Any]:
    """What a worker tells once, with its first shard: how well guidance's own decoder follows the full one."""
    if models.decode is None:
        return {}
    facts = fidelity(models.decode, models.prior, settings, models.teacher)
    return {"decoder": {"kind": settings.guidance.decoder, "sha256": getattr(models.decode, "sha256", None)} | facts}


class ShardWorker:
    """Implements :class:`stages.synth.worker.Worker` for every method that samples the prior."""

    def __init__(self, settings: SynthSettings, storage: str, fingerprint: str) -> None:
        self.settings, self.storage, self.fingerprint = settings, Storage(storage), fingerprint
        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.benchmark = False  # a fixed kernel choice: the same bytes on every run
        self.models = load_models(settings, self.storage)
        self.teacher, self.device = self.models.teacher, self.models.device
        self.news = news(self.models, settings)
        self.prior_labels = settings.prior.labelled(self.teacher.class_names).labels
        self.synthesise = import_module(f"stages.synth.methods.{settings.method}").synthesise

    def run(self, shard: int, on_group: OnGroup | None = None) -> dict[str, Any]:
        """Make and commit shard ``shard``; see :class:`stages.synth.worker.Worker`."""
        started, settings, work = time.monotonic(), self.settings, Work()
        splits: dict[int, int] = {}
        self.models.limit_batches(None)
        record = done_record(self.storage, shard)
        if record is None:
            with (
                ShardWriter(self.storage, shard, self.fingerprint) as writer,
                ImageWriter(writer, settings.images.format) as images,
            ):
                for position in range(settings.groups_per_shard):
                    index = shard * settings.groups_per_shard + position
                    group = make_group(settings, index, self.teacher.class_names)
                    images.write(self.fitting_rows(group, work))
                    check_skipped(work, settings, (position + 1) / settings.groups_per_shard)
                    if limit := self.models.prior.batch_limit:
                        splits[index] = limit
                    if on_group:
                        on_group(position + 1, settings.groups_per_shard)
                images.flush()
                record = writer.commit()
        news, self.news = self.news, {}
        return {
            "shard": shard,
            "rows": record.rows,
            "kept": record.kept,
            "bytes": record.tar_bytes,
            "seconds": round(time.monotonic() - started, 3),
            **asdict(work),
            **({"warnings": [skipped_line(work, settings)]} if work.skipped_updates else {}),
            **({"splits": splits} if splits else {}),
            **news,
        }

    def fitting_rows(self, group: Group, work: Work) -> list[Sample]:
        """:meth:`group_rows`; a group that does not fit the memory is done again in micro-batches of half the size.

        Later groups of the shard keep that size. Raises FactoryError where one trajectory at a time is too many.
        """
        size, before = self.models.prior.batch_limit or len(group.trajectories), asdict(work)
        while True:
            try:
                return self.group_rows(group, work)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise FactoryError(
                        f"group {group.index} does not fit the memory, not even one trajectory at a time "
                        f"({str(error).splitlines()[0]}): free memory, or try prior.dtype=fp16"
                    ) from error
            vars(work).update(before)
            size = -(-size // 2)
            self.models.limit_batches(size)
            free_memory()  # after the except block, which held the failed attempt's tensors

    def group_rows(self, group: Group, work: Work) -> list[Sample]:
        """Synthesise a group: manifest row and pixels of each stored sample, trajectory by trajectory."""
        frames = list(self.synthesise(self.models, group, self.settings, work))
        stored = [self.stored_frame(frame, group) for frame in frames]
        final = stored[-1][2]
        made: list[list[Sample]] = [[] for _ in group.trajectories]
        for frame, (pixels, columns, features) in zip(frames, stored, strict=True):
            is_final = frame is frames[-1]
            cosine = self.cosines(features, None if is_final else final, group)
            for i in range(len(group.trajectories)):
                row = self.row(group, i, frame) | columns[i]
                if cosine is not None:
                    row |= {"cosine": cosine[i], "cosine_space": "teacher"}
                    row["cosine_ref"] = f"class:{group.labels[i]}" if is_final else "final"
                made[i].append((row, pixels[i]))
        return [sample for trajectory in made for sample in trajectory]

    def cosines(self, features: torch.Tensor | None, final: torch.Tensor | None, group: Group) -> list[float] | None:
        """Cosine of each sample's features with those of its final image, or of the final ones with their class's
        weight row; None where the teacher shows no features."""
        weights = self.teacher.class_weights
        if features is None or weights is None:
            return None
        reference = weights[torch.tensor(group.labels)] if final is None else final
        return [float(c) for c in F.cosine_similarity(features, reference.to(features), dim=1)]

    def stored_frame(
        self, frame: Frame, group: Group
    ) -> tuple[torch.Tensor, list[dict[str, Any]], torch.Tensor | None]:
        """Pixels as they are stored (uint8 ``[n, h, w, 3]``), teacher columns and teacher features taken from them."""
        if not torch.isfinite(frame.images).all():
            raise DataError(
                f"group {group.index}: the prior decoded NaN or infinite pixels at step {frame.step}; "
                "try prior.dtype=fp32 or a smaller guidance.scale"
            )
        pixels = to_pixels(frame.images, self.settings.images.size)
        images = to_unit(pixels).to(self.device)
        with torch.no_grad():
            logits, features = self.teacher.with_features(images)
        columns = teacher_columns(logits, group.labels, self.settings.min_confidence)
        if self.settings.store_logits:
            for column, values in zip(columns, logits.cpu().half().tolist(), strict=True):
                column["logits"] = values
        return pixels, columns, features

    def row(self, group: Group, position: int, frame: Frame) -> dict[str, Any]:
        """The columns that tell how a sample was made."""
        settings, label, losses = self.settings, group.labels[position], frame.losses
        conditioning = self.models.prior.conditioning
        return {
            "label": label,
            "class_name": self.teacher.class_names[label],
            "prompt": group.prompts[position] if conditioning == "text" else None,
            "negative_prompt": settings.prior.negative_prompt if conditioning == "text" else None,
            "prior_label": self.prior_labels[self.teacher.class_names[label]] if conditioning == "class" else None,
            "method": settings.method,
            "seed": settings.seed,
            "group": group.index,
            "trajectory": group.trajectories[position],
            "step": frame.step,
            "timestep": frame.timestep,
            "lca": [mix_row(mix, group.trajectories) for mix in frame.mixes[position]],
            "loss_ce": losses.ce[position].item() if losses else None,
            "loss_adv": losses.adversarial[position].item() if losses else None,
            "loss_bn": losses.bn.item() if losses else None,
            "skipped_updates": (frame.skipped[position] or None) if frame.skipped else None,
        }


def skipped_line(work: Work, settings: SynthSettings) -> str:
    """What the guidance left out, for people."""
    return (
        f"{work.skipped_updates} of {work.updates * settings.group_size} guided updates were left out: their gradient "
        f"is not finite (prior.dtype={settings.prior.dtype})"
    )


def check_skipped(work: Work, settings: SynthSettings, share: float) -> None:
    """Raises NumericsError once more updates are left out than a whole shard may; ``share`` of it is done."""
    if work.skipped_updates > MAX_SKIPPED * work.updates * settings.group_size / share:
        half = settings.prior.dtype == "fp16"
        remedy = "set prior.dtype=bf16 or fp32" if half else "check the weights and inputs of teacher and prior"
        raise NumericsError(f"{skipped_line(work, settings)}, more than {MAX_SKIPPED:.0%} of a shard's; {remedy}")


def mix_row(mix: Mix, trajectories: Sequence[int]) -> dict[str, Any]:
    """A mix as the manifest stores it: the partner by its trajectory number, not its position."""
    return asdict(mix) | {"partner": trajectories[mix.partner]}
