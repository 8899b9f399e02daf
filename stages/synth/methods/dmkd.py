"""DM-KD (Li et al. 2023): plain samples of the prior, no guidance. The baseline, and the source of generate-then-select
(``min_confidence`` marks as kept what the teacher agrees with)."""

from collections.abc import Iterator

from stages.models.teacher import Teacher
from stages.synth.groups import Group
from stages.synth.prior import Prior
from stages.synth.sampler import Frame, Work, denoise
from stages.synth.settings import SynthSettings


def synthesise(
    prior: Prior, teacher: Teacher, group: Group, settings: SynthSettings, device: str, work: Work
) -> Iterator[Frame]:
    """Denoise without looking at the teacher; it only scores what was made."""
    yield from denoise(prior, group, settings.seed, device, None, None, settings.images.intermediates, work)
