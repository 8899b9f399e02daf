"""``factory prompts``: what stage 1 would ask its prior for, class by class. Loads no network."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from manifests.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.terminal import pairs, plain, say
from stages.hub import NotFetched
from stages.settings import SynthSettings
from stages.synth.group import make_group
from stages.synth.inputs import inspect_inputs, model_sources


@dataclass(frozen=True)
class ClassPrompts:
    """``different``: prompts that the bank has for the class; ``first``: those of its first trajectories, in order.
    ``prior_label``: what a class-conditional prior is given in their place."""

    label: int
    name: str
    different: int
    first: tuple[str, ...]
    prior_label: int | None = None


@dataclass(frozen=True)
class Prompts:
    """``conditioning``: what the prior takes, text, class or none; None where the hub holds it and was not reached."""

    prior: str
    conditioning: str | None
    negative_prompt: str
    classes: tuple[ClassPrompts, ...]

    def lines(self) -> Iterator[str]:
        kinds = {"class": "class labels", "none": "nothing: it is unconditional", "image": "images", "text": "prompts"}
        yield f"prior {plain(self.prior)} takes {kinds.get(str(self.conditioning), 'prompts, if it is a text prior')}"
        if self.negative_prompt and self.conditioning in ("text", None):
            yield f"negative prompt: {plain(self.negative_prompt)}"
        for each in self.classes:
            head = f"{each.label} {plain(each.name)}"
            if each.prior_label is not None:
                yield f"{head}: the prior's label {each.prior_label}"
            elif each.different:
                yield f"{head}: {each.different:,} different {'prompt' if each.different == 1 else 'prompts'}"
                yield from pairs(4, *(("", plain(prompt)) for prompt in each.first))


def prompts(recipe: Recipe, most: int = 3) -> Prompts:
    """What ``recipe`` asks for, with the ``most`` first prompts of each class. Errors as
    :func:`stages.synth.inputs.inspect_inputs`."""
    synth = recipe.synth
    if not synth.needs_prior:
        raise UsageError(f"method {synth.method} asks no prior for anything")
    conditioning: str | None = None
    try:
        inputs = inspect_inputs(synth)
        names, conditioning = inputs.class_names, inputs.prior["conditioning"]
    except NotFetched as error:
        say(f"{error}; so what the prior takes is not known")
        names = tuple(model_sources(synth)["teacher"].identity["config"]["class_names"])
    labels = synth.prior.labeled(names).labels if conditioning == "class" else {}
    asks = conditioning in ("text", None)
    first = first_prompts(synth, names, most) if asks else [()] * len(names)
    classes = tuple(
        ClassPrompts(label, name, different(synth, name) if asks else 0, first[label], labels.get(name))
        for label, name in enumerate(names)
    )
    return Prompts(synth.prior.path, conditioning, synth.prior.negative_prompt, classes)


def first_prompts(synth: SynthSettings, names: tuple[str, ...], most: int) -> list[tuple[str, ...]]:
    """The ``most`` first prompts of every class, as the run draws them: each group brings at least two of a class."""
    found: list[list[str]] = [[] for _ in names]
    for index in count():
        if min(map(len, found)) >= most:
            return [tuple(each[:most]) for each in found]
        group = make_group(synth, index, names)
        for label, prompt in zip(group.labels, group.prompts, strict=True):
            found[label].append(prompt)
    raise AssertionError


def different(synth: SynthSettings, name: str) -> int:
    """How many different prompts the bank has for a class."""
    bank = synth.prompts
    return len(
        {
            template.format(subject=subject, style=style)
            for template in bank.all_templates
            for subject in bank.subjects_of(name)
            for style in bank.styles
        }
    )
