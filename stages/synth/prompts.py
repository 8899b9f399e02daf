"""The prompt bank: a template with a random subject and style per trajectory (DiffDFKD, section IV-A)."""

from stages.synth.seeds import python_rng
from stages.synth.settings import PromptSettings


def prompt_for(settings: PromptSettings, class_name: str, seed: int, trajectory: int) -> str:
    """The prompt of one trajectory, a pure function of ``(settings, class, seed, trajectory)``.

    With ``class_names`` the subject is the teacher's class name (the named track); else a random entry of ``subjects``.
    """
    rng = python_rng(seed, "prompt", trajectory)
    subject = rng.choice(settings.subjects)  # drawn on both tracks, so that they share their styles
    style = rng.choice(settings.styles)
    return settings.template.format(subject=class_name if settings.class_names else subject, style=style)
