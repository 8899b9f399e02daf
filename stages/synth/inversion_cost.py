"""What inverting the teacher costs: counted on a few images and iterations of the real thing, with random weights."""

import torch

from manifests.errors import UsageError
from stages.counting import Flops, saved_bytes
from stages.models.blank import blank_teacher
from stages.models.identity import resolve
from stages.synth.groups import make_group
from stages.synth.methods.cmi import cmi
from stages.synth.methods.deepinversion import deepinversion
from stages.synth.sampler import Models, Work
from stages.synth.settings import SynthSettings


def inversion_cost(settings: SynthSettings) -> tuple[int, int]:
    """FLOPs of one inverted image, and bytes that its iteration saves for the backward pass.

    Every iteration costs the same, and so does every image but for the contrastive products of a large bank, which are
    left out. Raises UsageError for a black box.
    """
    few = 2 * settings.cmi.batches
    steps = settings.deepinversion.steps if settings.method == "deepinversion" else settings.cmi.steps
    (one, kept), (two, _), (_, more) = (_invert(settings, n, k) for n, k in ((few, 1), (few, 2), (2 * few, 1)))
    return (one + (steps - 1) * (two - one)) // few, (more - kept) // few


def _invert(settings: SynthSettings, images: int, steps: int) -> tuple[int, int]:
    """FLOPs and saved bytes of inverting a group of ``images`` in ``steps`` iterations."""
    teacher = blank_teacher(settings.teacher, "cpu")
    if teacher is None:
        raise UsageError(f"teacher '{settings.teacher.name}' is a black box and cannot be inverted: use --method dmkd")
    adversary = blank_teacher(settings.adversary, "cpu") if settings.adversary else None
    short = {name: getattr(settings, name).model_copy(update={"steps": steps}) for name in ("cmi", "deepinversion")}
    few = settings.model_copy(update={"group_size": images, **short})
    group = make_group(few, 0, resolve(settings.teacher).config.class_names)
    method = deepinversion if settings.method == "deepinversion" else cmi
    models = Models(None, teacher, adversary, "cpu")
    with torch.random.fork_rng(devices=[]), Flops() as counter:
        kept = saved_bytes(lambda: list(method(models, group, few, Work())), [t.net for t in (teacher, adversary) if t])
    return counter.total, kept
