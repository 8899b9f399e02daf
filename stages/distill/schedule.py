"""The learning rate as a pure function of the step: nothing to save, nothing to forget on resume."""

import math

from stages.distill.settings import OptimiserSettings


def lr_factor(settings: OptimiserSettings, step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` (0 … total − 1).

    cosine and step: linear warm-up, then half a cosine to 0, or ``gamma`` at each milestone. onecycle: a cosine from
    1/25 up to 1 over ``warmup``, then a cosine down to 1/10,000 (Smith and Topin 2017, annealed as in PyTorch).
    """
    done = step / total
    if settings.schedule == "onecycle":
        if done < settings.warmup:
            return _cosine(1 / 25, 1.0, done / settings.warmup)
        return _cosine(1.0, 1e-4, (done - settings.warmup) / (1 - settings.warmup))
    rising = math.ceil(settings.warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if settings.schedule == "step":
        return settings.gamma ** sum(done >= milestone for milestone in settings.milestones)
    return _cosine(1.0, 0.0, (step - rising) / (total - rising))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
