"""DM-KD (Li et al. 2023): plain samples of the prior, no guidance. The baseline, and the source of generate-then-select
(``min_confidence`` marks as kept what the teacher agrees with)."""

from collections.abc import Iterator

from stages.synth.groups import Group
from stages.synth.sampler import Frame, Models, Work, denoise
from stages.synth.settings import SynthSettings


def dmkd(models: Models, group: Group, settings: SynthSettings, work: Work) -> Iterator[Frame]:
    """Denoise without looking at the teacher; it only scores what was made."""
    assert models.prior is not None
    kept = settings.images.intermediates
    yield from denoise(models.prior, group, settings.seed, models.device, None, None, kept, work)
