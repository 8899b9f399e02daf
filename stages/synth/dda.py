"""DDA (Li et al. 2024): inverted images, then variants of each by the prior; those that stray are filtered out.

The paper feeds features of an image encoder to the diffusion model (image variation): so does a prior that has one,
with its image as the only condition (``StableDiffusionImageVariationPipeline``) or beside a prompt (Stable unCLIP).
Image-to-image is the substitute that any other prior allows. Its self-supervised term is distillation's
``loss.variants_ce``.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from stages.seeds import derive
from stages.settings import DdaSettings, SynthSettings
from stages.synth.cmi import Inversion
from stages.synth.group import Group
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.schedule import VariationPrior
from stages.synth.sampler import Counters, DecodedGroup, Models, denoise


def dda(models: Models, group: Group, settings: SynthSettings, counters: Counters) -> Iterator[DecodedGroup]:
    """F_syn by inversion (equation 5), G_k = Diff(F_syn, n_k) (6); the worker keeps cos(G_k, F_syn) > ω (8)."""
    prior = models.prior
    assert prior is not None
    inversion = Inversion(models, group, settings, counters)
    source = inversion.frame()
    yield source
    origin = variation(prior, source.images, group, settings.dda)
    for variant in range(settings.dda.variants):
        seed = derive(settings.seed, "variant", variant)
        guide = models.guidance(group, settings, seed) if settings.dda.guided else None
        (made,) = denoise(prior, group, seed, guide=guide, counters=counters, on_step=models.on_step, **origin(seed))
        made.source = 0
        made.embed = inversion.embed if settings.dda.space == "contrastive" else None
        yield made


def variation(
    prior: DiffusionPrior, images: Tensor, group: Group, settings: DdaSettings
) -> Callable[[int], dict[str, Any]]:
    """What :func:`denoise` is given, by seed, to vary ``images``: a condition on their features with noise of that
    seed, or their latents with noise added as the start."""
    if isinstance(prior, VariationPrior):
        conditions, embedded = group.conditions(prior.conditioning), prior.embed_images(images)

        def condition(seed: int) -> dict[str, Any]:
            noise = group.noise(derive(seed, "embedding"), embedded.shape[1:]).to(embedded)
            return {"condition": prior.encode_with(conditions, embedded, noise, settings.noise_level)}

        return condition
    latents, first = prior.encode_images(images), settings.first_step(len(prior.timesteps), False)

    def start(seed: int) -> dict[str, Any]:
        return {"start": prior.noised(latents, group.noise(seed, prior.latent_shape).to(latents), first)}

    return start
