"""DDA (Li et al. 2024): inverted images, then variants of each by the prior; those that stray are filtered out.

The paper feeds features of an image encoder to the diffusion model (image variation). Image-to-image is the substitute
that any prior allows. Its self-supervised term is distillation's ``loss.derived``.
"""

from collections.abc import Iterator

import torch

from stages.seeds import derive
from stages.synth.groups import Group
from stages.synth.methods.cmi import Inversion
from stages.synth.sampler import Frame, Guide, Models, Work, denoise
from stages.synth.settings import SynthSettings


def synthesise(models: Models, group: Group, settings: SynthSettings, work: Work) -> Iterator[Frame]:
    """F_syn by inversion (equation 5), G_k = Diff(F_syn, n_k) (6); the worker keeps cos(G_k, F_syn) > ω (8)."""
    own, prior = settings.dda, models.prior
    assert prior is not None
    inversion = Inversion(models, group, settings, work)
    source = inversion.frame()
    yield source
    origin, first = prior.encode_images(source.images), own.first_step(len(prior.timesteps))
    labels = torch.tensor(group.labels, device=models.device)
    guide = Guide(settings.guidance, models.teacher, labels, models.adversary, models.decode) if own.guided else None
    for variant in range(own.variants):
        seed = derive(settings.seed, "variant", variant)
        (made,) = denoise(prior, group, seed, models.device, guide, None, 0, work, origin, first)
        made.source = 0
        made.embed = inversion.embed if own.space == "contrastive" else None
        yield made
