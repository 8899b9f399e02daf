"""DiffDFKD (Qi et al.): the teacher guides every denoising step; latents of one class are cut and mixed (LCA)."""

from collections.abc import Iterator

import torch

from stages.models.teacher import Teacher
from stages.synth.groups import Group
from stages.synth.prior import Prior
from stages.synth.sampler import Frame, Guide, Work, denoise
from stages.synth.settings import SynthSettings


def synthesise(
    prior: Prior, teacher: Teacher, group: Group, settings: SynthSettings, device: str, work: Work
) -> Iterator[Frame]:
    """L = w_ce·CE + w_bn·BN + w_adv·ADV (equation 9), ẑ0 ← ẑ0 − s·∇L (10), LCA (11), then the scheduler's step (5)."""
    guide = Guide(settings.guidance, teacher, torch.tensor(group.labels, device=device))
    yield from denoise(prior, group, settings.seed, device, guide, settings.lca, settings.images.intermediates, work)
