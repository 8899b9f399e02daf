"""The denoising loop: calls per step, gradients against finite differences, order of decode, update and cut."""

import pytest
import torch

from stages.models.loading import untrained_teacher
from stages.models.source import resolve
from stages.settings import GuidanceSettings, LatentMixSettings, ModelSettings, PriorSettings
from stages.synth.group import Group
from stages.synth.guidance import Guidance
from stages.synth.latent_mix import LatentMix
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import Prediction, State
from stages.synth.sampler import Counters, denoise, intermediate_steps, sample
from tests.synth.tiny import TinyTeacher

GROUP = Group(0, (0, 1, 2, 3), (0, 1, 0, 1), ("a", "b", "a", "b"))
LABELS = torch.tensor(GROUP.labels)


def frames(prior, guide=None, **kw):
    return list(denoise(prior, GROUP, 0, guide=guide, **kw))


def mix(prior, settings):
    return LatentMix(settings, GROUP, 0, prior.timesteps, prior.latent_shape)


def test_unguided_equals_the_pipelines_own_loop(prior):
    z = GROUP.noise(0, prior.latent_shape)
    condition = prior.encode(GROUP.prompts)
    with torch.no_grad():
        for t in prior.timesteps:
            z = prior.schedule.scheduler.step(prior.network(z, t, condition).sample, t, z).prev_sample
        expected = prior.decode(z)
    torch.testing.assert_close(frames(prior)[-1].images, expected)


@pytest.mark.parametrize("through", ["x0", "xt"])
def test_one_prior_evaluation_per_step(prior, monkeypatch, through):
    calls = []
    original = prior.network.forward
    monkeypatch.setattr(prior.network, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    guide = Guidance(prior, TinyTeacher(), LABELS, GuidanceSettings(gradient_at=through, every=2))
    counters = Counters()
    frames(prior, guide, intermediates=2, counters=counters)
    assert len(calls) == counters.evaluations == len(prior.timesteps)
    assert (counters.guided_steps, counters.decodes) == (3, 2 + 1)


@pytest.mark.parametrize("through", ["x0", "xt"])
def test_gradient_matches_finite_differences(prior, monkeypatch, through):
    """The update with raw gradients, against central differences of the total loss in random directions."""
    for network in (prior.network, prior.vae):
        network.double()
    try:
        settings = GuidanceSettings(gradient_at=through, normalize="none", step_size=1.0, bn=0.3)
        condition = prior.encode(GROUP.prompts).double()
        monkeypatch.setattr(prior, "predict", double_predict(prior))
        monkeypatch.setattr(prior, "decode", lambda z0: prior.vae.decode(z0 / 0.7).sample)
        guide = Guidance(prior, TinyTeacher(dtype=torch.float64), LABELS, settings)
        z = GROUP.noise(0, prior.latent_shape).double()

        def loss(z):
            state = prior.predict(State(z, 2), condition)
            point = prior.decode(state.z0 if through == "xt" else z)
            return guide.terms(point, torch.Generator()).total(settings).item()

        source = z.clone().requires_grad_(through == "xt")
        with torch.set_grad_enabled(through == "xt"):
            state = prior.predict(State(source, 2), condition)
        base = z if through == "xt" else state.z0.detach()
        moved = guide(state)
        alpha = prior.levels(2)[0]
        step = (moved.z0 - state.z0.detach()) * (alpha if through == "xt" else 1.0)  # zt: the move of z_t itself
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                numeric = (loss(base + 1e-5 * direction) - loss(base - 1e-5 * direction)) / 2e-5
            assert -(step * direction).sum().item() == pytest.approx(numeric, rel=1e-4)
    finally:
        for network in (prior.network, prior.vae):
            network.float()


def double_predict(prior):
    """``predict`` without the cast to float32 that production wants for half-precision priors."""

    def predict(state, condition):
        output = prior.network(state.z, prior.timesteps[state.step], condition).sample
        alpha, sigma = prior.levels(state.step)
        return Prediction(state.z, state.step, output, (state.z - sigma * output) / alpha)

    return predict


@pytest.mark.parametrize("through", ["x0", "xt"])
def test_guidance_lowers_the_guided_loss(prior, through):
    teacher = TinyTeacher()
    guide = Guidance(prior, teacher, LABELS, GuidanceSettings(gradient_at=through, step_size=0.3, bn=0.0))

    def final_loss(images):
        return torch.nn.functional.cross_entropy(teacher.logits(images), LABELS).item()

    assert final_loss(frames(prior, guide)[-1].images) < final_loss(frames(prior)[-1].images) - 1e-3


def test_intermediates_are_decoded_before_the_update_and_cut_of_their_step(prior):
    cut_at_3 = mix(prior, LatentMixSettings(every=3, interval=(0, 1)))
    first_at_3 = GuidanceSettings(interval=(0.5, 1.0), step_size=0.5)
    guide = Guidance(prior, TinyTeacher(), LABELS, first_at_3)
    assert intermediate_steps(1, 6) == {3}
    plain = frames(prior, intermediates=1)
    steered = frames(prior, guide, mix=cut_at_3, intermediates=1)
    assert torch.equal(plain[0].images, steered[0].images)
    assert not any(steered[0].mixes) and all(steered[1].mixes)
    assert not torch.equal(plain[1].images, steered[1].images)
    assert [f.timestep for f in steered] == [prior.timesteps[3], 0]


def test_inner_updates_move_further(prior):
    teacher = TinyTeacher()
    condition = prior.encode(GROUP.prompts)
    with torch.no_grad():
        state = prior.predict(State(GROUP.noise(0, prior.latent_shape), 2), condition)

    def loss_after(inner):
        guide = Guidance(prior, teacher, LABELS, GuidanceSettings(updates_per_step=inner, step_size=0.05, bn=0.0))
        return guide.terms(prior.decode(guide(state).z0), torch.Generator()).ce.sum().item()

    assert loss_after(4) < loss_after(1)


def test_an_adversary_equal_to_the_teacher_adds_nothing(prior):
    guide = Guidance(prior, TinyTeacher(), LABELS, GuidanceSettings(adversarial=1.0), adversary=TinyTeacher())
    losses = guide.terms(torch.randn(4, 3, 16, 16), torch.Generator())
    assert losses.adversarial.abs().max() < 1e-6  # the student equals the teacher: no disagreement to chase


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
def test_the_loop_never_waits_for_the_device(prior_folder, scheduler):
    """On a device without data nothing can be read back: it runs to the end."""
    settings = PriorSettings(
        path=str(prior_folder), steps=6, cfg_scale=2.0, cfg_interval=(0.0, 0.5), scheduler=scheduler
    )
    meta, teacher = load_prior(settings, "meta"), untrained_teacher(resolve(ModelSettings()))
    guide = Guidance(meta, teacher, LABELS.to("meta"), GuidanceSettings(updates_per_step=2))
    cut = mix(meta, LatentMixSettings(every=2, interval=(0, 1)))
    start = meta.start(torch.empty(4, *meta.latent_shape, device="meta"))
    drawn = sample(meta, start, meta.encode(GROUP.prompts), guide=guide, mix=cut, store=(3,), rngs=generators)
    assert [(step, z.shape) for step, z in drawn] == [(3, start.z.shape), (6, start.z.shape)]
    assert guide.steps == 6 and all(len(mixes) == 2 for mixes in cut.record())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        guide.skipped.tolist()


def generators(step):
    return [torch.Generator() for _ in GROUP.trajectories]
