"""The teacher cache: its logits for every fixed view of every image, computed once, looked up ever after.

    FOLDER/logits.safetensors   dense: logits [views, rows, C] fp16; top: values [views, rows, K + 1] fp16 with the
                                 mean of the rest last, classes [views, rows, K]
    FOLDER/key.json              what they are the logits of, and their sha256; sealed, written last

Used by ``factory run distill --set teacher_cache.enabled=true --set augment.num_views=8 …``.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, Interrupted
from manifests.storage import Storage
from stages.distill.batches import Batch, Batches
from stages.distill.checkpoint import damage_reported, differences
from stages.distill.losses import Targets
from stages.distill.rows import rows_digest
from stages.distill.runtime import Callbacks
from stages.models.teacher import Teacher

FOLDER, LOGITS, KEY, SHA256 = "teacher-cache", "logits.safetensors", "key.json", "sha256"
DENSE_CLASSES, DEFAULT_TOP = 256, 64
CHUNK = 512
HALF_MAX = 65504.0


@dataclass(frozen=True)
class TeacherCache:
    """Logits by row and view number."""

    tensors: dict[str, Tensor]
    classes: int

    def targets(self, batch: Batch) -> Targets:
        """What :func:`stages.distill.losses.teacher_targets` would compute, to half precision."""
        device = batch.x.device
        turn, row = (torch.from_numpy(numbers) for numbers in (batch.turns, batch.rows))
        looked_up = {name: tensor[turn, row].to(device) for name, tensor in self.tensors.items()}
        if "logits" in looked_up:
            return Targets(looked_up["logits"].float(), None, [])
        return Targets(from_top(looked_up["values"].float(), looked_up["classes"].long(), self.classes), None, [])


def to_top(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` largest of ``[n, C]`` logits and their classes ``[n, top]``.

    A last value, so ``[n, top + 1]``, stands for each of the others: the log of their mean exponential, with which the
    probabilities of what was kept are right (at τ = 1).
    """
    best = logits.topk(top, 1)
    others = logits.scatter(1, best.indices, -math.inf)
    rest = others.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - top)
    return torch.cat([best.values, rest], 1), best.indices


def from_top(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """``[n, count]`` logits from what :func:`to_top` kept."""
    return values[:, -1:].expand(-1, count).clone().scatter_(1, classes, values[:, :-1])


def open_teacher_cache(teacher: Teacher, batches: Batches, out: Storage, callbacks: Callbacks) -> TeacherCache:
    """The cache of this run, computed where there is none. Raises DataError where it belongs to something else."""
    settings = batches.settings.teacher_cache
    storage = Storage(settings.folder or out.folder(FOLDER))
    top = settings.top_k or (DEFAULT_TOP if teacher.num_classes > DENSE_CLASSES else teacher.num_classes)
    top = top if top < teacher.num_classes else 0
    key = _key(teacher, batches, top)
    if batches.ranks.any([storage.exists(KEY)])[0]:
        return TeacherCache(_read(storage, key), teacher.num_classes)
    tensors = _computed(teacher, batches, top, callbacks)
    if batches.ranks.first:
        data = safetensors.torch.save(tensors)
        storage.write(LOGITS, data)
        storage.write(KEY, dump_checked({**key, SHA256: hashlib.sha256(data).hexdigest()}))
        views = batches.settings.augment.num_views
        callbacks.on_event("teacher_cached", folder=storage.url, bytes=len(data), views=views)
    return TeacherCache(tensors, teacher.num_classes)


def _key(teacher: Teacher, batches: Batches, top: int) -> dict[str, Any]:
    """What decides the cached logits."""
    settings = batches.settings
    return {
        "version": 1,
        "teacher": {name: teacher.identity[name] for name in ("architecture", "sha256")},
        "preprocessing": teacher.input.settings.model_dump(mode="json"),
        "augmentation": {**settings.augment.model_dump(mode="json"), "seed": settings.seed},
        "manifests": [{"digest": s.digest, "selected": rows_digest(s.rows)} for s in batches.rows.selections],
        "top": top,
    }


def _read(storage: Storage, key: dict[str, Any]) -> dict[str, Tensor]:
    remedy = f"delete {storage.url} to compute it anew"
    with damage_reported(storage, KEY, remedy):
        recorded = load_checked(storage.read(KEY))
        sha256 = recorded.pop(SHA256)
    changed = differences(recorded, key)
    if changed:
        raise DataError(
            f"{storage.url} holds a teacher's answers to something else: {'; '.join(changed[:4])}. "
            "Name another teacher_cache.folder, or delete this one"
        )
    data = storage.read(LOGITS, most=None)
    with damage_reported(storage, LOGITS, remedy):
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its checksum differs")
        return safetensors.torch.load(data)


@torch.no_grad()
def _computed(teacher: Teacher, batches: Batches, top: int, callbacks: Callbacks) -> dict[str, Tensor]:
    views, rows, ranks = batches.settings.augment.num_views, len(batches.rows), batches.ranks
    width = top + 1 if top else teacher.num_classes
    values = torch.zeros(views, rows, width, dtype=torch.float16)
    small = torch.int16 if teacher.num_classes <= torch.iinfo(torch.int16).max else torch.int32
    classes = torch.zeros(views, rows, top, dtype=small)
    total = batches.settings.total_steps(batches.steps)
    chunk = batches.chunk(CHUNK)
    for turn in range(views):
        for together in range(0, rows, chunk * ranks.size):  # a chunk for each process
            start = together + chunk * ranks.rank
            part = np.arange(start, min(start + chunk, rows))
            if len(part):
                logits = teacher.logits(batches.fixed(part, turn)).clamp(-HALF_MAX, HALF_MAX)
                here = slice(start, start + len(part))
                if top:
                    logits, best = to_top(logits, top)
                    classes[turn, here] = best.to(small).cpu()
                values[turn, here] = logits.half().cpu()
            if ranks.any([callbacks.should_stop()])[0]:
                raise Interrupted("interrupted before training; the same command starts the teacher's answers again")
        for kept in (values[turn], classes[turn]):
            ranks.add(kept.view(torch.uint8))  # exact: every byte is 0 in all processes but one
        callbacks.on_progress(0, total, f"teacher's answers to view {turn + 1} of {views}")
    return {"values": values, "classes": classes} if top else {"logits": values}
