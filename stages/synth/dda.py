"""DDA (Li et al. 2024): inverted images, then variants of each by the prior; those that stray are filtered out.

The paper feeds features of an image encoder to the diffusion model (image variation): so does a prior that has one.
Image-to-image is the substitute that any other prior allows. Its self-supervised term is distillation's
``loss.variants_ce``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stages.seeds import derive
from stages.settings import DdaSettings, SynthSettings
from stages.synth.cmi import Inversion
from stages.synth.group import Group
from stages.synth.priors.schedule import Prior, VariationPrior
from stages.synth.sampler import Counters, DecodedGroup, Guide, Models, denoise


def dda(models: Models, group: Group, settings: SynthSettings, work: Counters) -> Iterator[DecodedGroup]:
    """F_syn by inversion (equation 5), G_k = Diff(F_syn, n_k) (6); the worker keeps cos(G_k, F_syn) > ω (8)."""
    own, prior = settings.dda, models.prior
    assert prior is not None
    inversion = Inversion(models, group, settings, work)
    source = inversion.frame()
    yield source
    beginning = begin(prior, source.images, group, own)
    labels = torch.tensor(group.labels, device=models.device)
    guide = Guide(settings.guidance, models.teacher, labels, models.adversary, models.decode) if own.guided else None
    for variant in range(own.variants):
        seed = derive(settings.seed, "variant", variant)
        (made,) = denoise(prior, group, seed, models.device, guide, None, 0, work, **beginning(seed))
        made.source = 0
        made.embed = inversion.embed if own.space == "contrastive" else None
        yield made


def begin(prior: Prior, images: Tensor, group: Group, own: DdaSettings) -> Callable[[int], dict[str, Any]]:
    """What denoising with a seed takes of the source ``images``: a condition on their features, with noise of that
    seed; or their latents and the step to start from."""
    if not isinstance(prior, VariationPrior):
        origin, first = prior.encode_images(images), own.first_step(len(prior.timesteps), False)
        return lambda seed: {"origin": origin, "first": first}
    conditions, embedded = group.conditions(prior.conditioning), prior.embed_images(images)

    def varied(seed: int) -> dict[str, Any]:
        noise = group.noise(derive(seed, "embedding"), embedded.shape[1:]).to(embedded)
        return {"condition": prior.encode_with(conditions, embedded, noise, own.noise_level)}

    return varied
