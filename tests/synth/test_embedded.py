"""The embedded prior and teacher: prompts matter, and guidance makes the digits that the teacher knows."""

import pytest
import torch

from pipeline.recipe import resolve
from stages.models.loading import load_teacher
from stages.settings import PriorSettings
from stages.synth.group import make_group
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import Counters, Models, diffdfkd, dmkd
from tests.synth.tiny import feature_statistics


@pytest.fixture(scope="module")
def demo():
    recipe = resolve("demo", sets=["synth.group_size=40", "synth.prior.steps=12"]).synth
    return recipe, load_prior(recipe.prior, "cpu"), load_teacher(recipe.teacher, "cpu")


def final(method, demo, **changes):
    settings, prior, teacher = demo
    settings = settings.model_copy(update=changes)
    group = make_group(settings, 0, teacher.class_names)
    *_, last = method(Models(prior, teacher, None, "cpu"), group, settings, Counters())
    return last, torch.tensor(group.labels)


def test_thick_prompts_draw_more_ink_than_thin_ones(demo):
    settings = demo[0]

    def ink(style):
        bank = settings.prompts.model_copy(update={"styles": (style,), "subjects": ("a loop and a line",)})
        frame, _ = final(dmkd, demo, prompts=bank)
        return ((frame.images.clamp(-1, 1) + 1) / 2).mean().item()

    assert ink("two thick connected strokes") > 1.4 * ink("two thin connected strokes")


def test_guidance_makes_what_the_teacher_was_asked_for(demo):
    """BatchNorm distance and class loss of the finished images fall well below those of the same noise unguided."""
    from stages.synth.guidance import class_prior

    teacher = demo[2]

    def measures(method):
        frame, labels = final(method, demo)
        with torch.no_grad():
            logits, inputs = teacher.with_batchnorm_inputs(frame.images)
        agreement = (logits.argmax(1) == labels).float().mean().item()
        return agreement, class_prior(logits, labels).mean().item(), feature_statistics(inputs, teacher.batchnorms)

    plain, guided = measures(dmkd), measures(diffdfkd)
    assert plain[0] < 0.4 and guided[0] > 0.8
    assert guided[1] < 0.3 * plain[1]
    assert guided[2] < 0.7 * plain[2]


def test_the_embedded_prior_is_a_plain_diffusers_folder():
    """What loads it is what loads Stable Diffusion; CFG and a negative prompt change the result."""
    plain = load_prior(PriorSettings(steps=4, cfg_scale=1.0), "cpu")
    steered = load_prior(PriorSettings(steps=4, cfg_scale=4.0, negative_prompt="one thin stroke, a line"), "cpu")
    assert plain.image_size == 32 and plain.latent_shape == (4, 8, 8)
    assert plain.encode(["one thick stroke, a loop"]).shape[0] == 1
    assert steered.encode(["one thick stroke, a loop"]).shape[0] == 2
