"""DiffDFKD (Qi et al.): the teacher guides every denoising step; latents of one class are cut and mixed (LCA)."""

from collections.abc import Iterator

import torch

from stages.synth.groups import Group
from stages.synth.sampler import Frame, Guide, Models, Work, denoise
from stages.synth.settings import SynthSettings


def diffdfkd(models: Models, group: Group, settings: SynthSettings, work: Work) -> Iterator[Frame]:
    """L = w_ce·CE + w_bn·BN + w_adv·ADV (equation 9), ẑ0 ← ẑ0 − s·∇L (10), LCA (11), then the scheduler's step (5)."""
    labels = torch.tensor(group.labels, device=models.device)
    guide = Guide(settings.guidance, models.teacher, labels, models.adversary, models.decode)
    assert models.prior is not None
    kept = settings.images.intermediates
    yield from denoise(models.prior, group, settings.seed, models.device, guide, settings.lca, kept, work)
