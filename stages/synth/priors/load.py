"""Load the prior of a folder: the class that fits its pipeline."""

import logging

from stages.synth.priors.class_conditional import ClassPrior
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.families import find_prior
from stages.synth.priors.text import TextPrior
from stages.synth.priors.text_if import TextPriorIF
from stages.synth.priors.text_unclip import TextPriorUnclip
from stages.synth.priors.text_xl import TextPriorXL
from stages.synth.priors.unconditional import FreePrior
from stages.synth.settings import PriorSettings

log = logging.getLogger(__name__)


def load_prior(settings: PriorSettings, device: str) -> DiffusionPrior:
    """The prior on ``device``, frozen and in eval mode."""
    folder, name, family = find_prior(settings)
    if name == "StableDiffusionXLPipeline":
        return TextPriorXL(folder, settings, device)
    if name == "IFPipeline":
        return TextPriorIF(folder, settings, device)
    if family.image_encoder:
        return TextPriorUnclip(folder, settings, device)
    if family.conditioning == "text":
        return TextPrior(folder, settings, device)
    if family.conditioning == "class":
        return ClassPrior(folder, settings, device)
    if settings.cfg != 1:
        log.warning("prior %s is unconditional: prior.cfg does not apply", settings.path)
    return FreePrior(folder, settings, device)
