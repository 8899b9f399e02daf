"""Every scheduler over every prediction type: ẑ0 is the scheduler's own, moves keep eps, cuts cover the memory."""

import diffusers
import pytest
import torch
from pydantic import ValidationError

from manifests.errors import DataError, UsageError
from stages.seeds import torch_rng
from stages.settings import PriorSettings
from stages.synth.latent_mix import Mix, mixing
from stages.synth.priors.schedule import Prediction, Schedule

STEPS = 6
SHAPE = (3, 4, 8, 8)
KINDS = ("epsilon", "v_prediction", "sample")
CASES = [(name, kind) for name in ("ddim", "ddpm", "dpmsolver++", "euler") for kind in KINDS]
CASES += [("dpmsolver++", "flow_prediction"), ("euler", "flow_prediction")]
CASES += [(name, kind) for name in ("lcm", "tcd", "euler-ancestral") for kind in ("epsilon", "v_prediction")]


def config(kind):
    if kind == "flow_prediction":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return {"_class_name": "PNDMScheduler", "prediction_type": kind, **betas}


def scheduled(config, name, steps, **more):
    distilled = name if name in ("lcm", "tcd") else None
    return Schedule(config, PriorSettings(scheduler=name, steps=steps, **{"distilled": distilled} | more), "x")


@pytest.fixture(params=CASES, ids="-".join)
def schedule(request):
    name, kind = request.param
    made = scheduled(config(kind), name, STEPS)
    assert made.kind == kind and len(made.timesteps) == STEPS and made.timesteps == sorted(made.timesteps)[::-1]
    return made


def rngs(step):
    return [torch_rng(0, "step", trajectory, step) for trajectory in range(SHAPE[0])]


def run(schedule, steps):
    """A walk with random network outputs: the prediction at every one of ``steps``."""
    generator = torch.Generator().manual_seed(1)
    state = schedule.start(torch.randn(SHAPE, generator=generator))
    for step in range(steps):
        state = schedule.prediction(state, torch.randn(SHAPE, generator=generator))
        yield state
        state = schedule.step(state, rngs(step))


def test_z0_is_the_schedulers_own(schedule):
    scheduler = schedule.scheduler
    for state in run(schedule, STEPS):
        time, scheduler._step_index = scheduler.timesteps[state.step], state.step
        if schedule.name == "dpmsolver++":
            theirs = scheduler.convert_model_output(state.output, sample=state.z)
        elif schedule.kind == "flow_prediction":  # offers none: its step to noise level 0 says the same
            theirs = state.z - scheduler.sigmas[state.step] * state.output
        elif schedule.name == "lcm":
            theirs = scheduler.step(state.output, time, state.z).denoised
        elif schedule.name == "tcd":  # offers none: with all noise fresh its step goes by timestep 0, but for its rest
            at_0 = scheduler.step(state.output, time, state.z, eta=1).pred_noised_sample
            alpha, sigma = schedule.levels[state.step]
            eps, bar = (state.z - alpha * state.z0) / sigma, scheduler.alphas_cumprod[0]
            theirs = (at_0 - (1 - bar).sqrt() * eps) / bar.sqrt()
        else:
            theirs = scheduler.step(state.output, time, state.z).pred_original_sample
        torch.testing.assert_close(state.z0, theirs, rtol=1e-4, atol=1e-4)


def test_network_sees_what_scale_model_input_gives(schedule):
    if schedule.kind == "flow_prediction":
        pytest.skip("flow matching scales nothing")
    for state in run(schedule, STEPS):
        schedule.scheduler._step_index = state.step
        theirs = schedule.scheduler.scale_model_input(state.z, schedule.scheduler.timesteps[state.step])
        torch.testing.assert_close(schedule.network_input(state), theirs)


def test_start_is_the_schedulers_own(schedule):
    noise = torch.randn(SHAPE)
    initial = getattr(schedule.scheduler, "init_noise_sigma", 1.0)
    torch.testing.assert_close(schedule.start(noise).z, noise * initial)


def test_a_move_keeps_eps(schedule):
    delta = torch.randn(SHAPE)
    for state in run(schedule, STEPS):
        shifted = schedule.move(state, delta)
        again = schedule.prediction(shifted, shifted.output)  # ẑ0 worked out anew from the moved (z, output)
        torch.testing.assert_close(again.z0, state.z0 + delta, rtol=1e-4, atol=1e-3)
        alpha, sigma = schedule.levels[state.step]
        eps = [(s.z - alpha * s.z0) / sigma for s in (state, shifted)]
        torch.testing.assert_close(eps[0], eps[1], rtol=1e-3, atol=1e-3)


def test_a_move_by_delta_arrives_as_alpha_delta(schedule):
    """Exactly α of the next level, for the multistep solver too: its memory moves along."""
    delta = torch.randn(SHAPE)
    for state in run(schedule, STEPS - 1):
        alpha = schedule.levels[state.step + 1][0]
        plain, guided = (schedule.step(s, rngs(state.step)).z for s in (state, schedule.move(state, delta)))
        torch.testing.assert_close(guided - plain, alpha * delta, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "traditional"])
def test_mixing_before_a_step_equals_mixing_after_it(schedule, kind):
    """Every scheduler is linear per cell, so latents, output and memory mixed together give the mixed latents, now and
    one step later, where a multistep solver looks back."""
    if schedule.stochastic and kind == "traditional":
        pytest.skip("the noise that a step adds is not mirrored")
    change = mixing({0: Mix(0, 0, 2, 2, 1, 3, 5, 0.25), 1: Mix(0, 0, 2, 0, 1, 8, 6, 0.5)}, 3, SHAPE, kind)
    same_noise = lambda step: [torch_rng(0, "step", 0, step) for _ in range(3)]  # noqa: E731
    for state in list(run(schedule, STEPS - 1))[1:]:
        before = schedule.step(state.mapped(change), same_noise(0))
        after = schedule.step(state, same_noise(0)).mapped(change)
        torch.testing.assert_close(before.z, after.z, rtol=1e-4, atol=1e-4)
        output = torch.randn(SHAPE)
        second = [schedule.step(schedule.prediction(s, output), same_noise(1)).z for s in (before, after)]
        torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)


def test_a_walk_equals_the_schedulers_own(schedule):
    """The memory that travels in the state gives the latents that a scheduler with its own memory gives."""
    fresh = scheduled(config(schedule.kind), schedule.name, STEPS).scheduler
    z = None
    for state in run(schedule, STEPS):
        z = state.z if z is None else z
        torch.testing.assert_close(state.z, z, rtol=1e-4, atol=1e-4)
        extra = {"generator": rngs(state.step)} if schedule.stochastic else {}
        z = fresh.step(state.output, fresh.timesteps[state.step], z, **extra).prev_sample


def test_ddpm_noise_depends_on_seed_trajectory_and_step_alone():
    schedule = scheduled(config("epsilon"), "ddpm", STEPS)
    z, output = torch.randn(SHAPE), torch.randn(SHAPE)
    state = Prediction(z, 1, output, z)
    torch.manual_seed(5)
    whole = schedule.step(state, rngs(1)).z
    torch.manual_seed(6)
    alone = schedule.step(Prediction(z[2:], 1, output[2:], z[2:]), rngs(1)[2:]).z
    assert torch.equal(whole[2:], alone)
    assert not torch.equal(whole, schedule.step(state, rngs(2)).z)
    with pytest.raises(ValueError, match="one generator per trajectory"):
        schedule.step(state)


@pytest.mark.parametrize("name", ["pndm", "heun", "unipc", "deis"])
def test_schedulers_that_cannot_be_guided_are_refused_by_name(name):
    with pytest.raises(ValidationError, match=f"{name} cannot be guided safely: .*; use ddim, ddpm"):
        PriorSettings(scheduler=name)


def test_priors_made_for_another_kind_of_sampling_are_refused_by_name():
    with pytest.raises(DataError, match="prior x is made for EDMEulerScheduler"):
        scheduled({"_class_name": "EDMEulerScheduler"}, "ddim", 4)
    with pytest.raises(UsageError, match="few-step one, made for LCMScheduler: set prior.distilled=lcm"):
        scheduled({"_class_name": "LCMScheduler"}, "ddim", 4)
    with pytest.raises(DataError, match="prediction type 'score' is unknown"):
        scheduled({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "ddim", 4)
    with pytest.raises(UsageError, match="predicts a flow, which ddim cannot sample"):
        scheduled(config("flow_prediction"), "ddim", 4)
    with pytest.raises(UsageError, match="cannot be sampled in 200 steps"):
        scheduled(config("epsilon") | {"num_train_timesteps": 100}, "ddim", 200)


@pytest.mark.parametrize(
    ("distilled", "scheduler", "first"),
    [("lcm", "lcm", 999), ("tcd", "tcd", 999), ("turbo", "euler-ancestral", 999), ("lightning", "euler", 999),
     ("hyper", "ddim", 999)],
)  # fmt: skip
def test_how_a_prior_was_distilled_decides_the_rest(distilled, scheduler, first):
    settings = PriorSettings(distilled=distilled)
    assert (settings.scheduler, settings.steps, settings.cfg_scale) == (scheduler, 4, 1)
    assert Schedule(config("epsilon"), settings, "x").timesteps[0] == first
    kept = PriorSettings(distilled=distilled, steps=2, cfg_scale=1.5)
    assert (kept.steps, kept.cfg_scale) == (2, 1.5)
    assert PriorSettings.model_validate(settings.model_dump()) == settings


def test_contradictions_are_one_line():
    with pytest.raises(ValidationError, match="distilled lcm is sampled with lcm, not ddim"):
        PriorSettings(distilled="lcm", scheduler="ddim")
    with pytest.raises(ValidationError, match="tcd needs a distilled network"):
        PriorSettings(scheduler="tcd")


def test_lightning_in_one_step_predicts_the_sample():
    schedule = Schedule(config("epsilon"), PriorSettings(distilled="lightning", steps=1), "x")
    state = schedule.start(torch.randn(SHAPE))
    output = torch.randn(SHAPE)
    torch.testing.assert_close(schedule.step(schedule.prediction(state, output)).z, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_pure_noise_divides_by_nothing(kind):
    """Zero terminal SNR and flow matching begin at α = 0."""
    name = "euler" if kind == "flow_prediction" else "ddim"
    given = config(kind) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = scheduled(given, name, 4)
    assert schedule.levels[0][0] == pytest.approx(1e-5) and schedule.levels[0][1] == pytest.approx(1.0)
    for state in run(schedule, 4):
        assert torch.isfinite(state.z0).all()


PLAIN = {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "linear", "trained_betas": None}


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"])
@pytest.mark.parametrize("sampled", ["ddim", "ddpm", "dpmsolver++", "euler"])
def test_plain_schedulers_are_sampled_with_every_other(name, sampled):
    assert scheduled({"_class_name": name} | PLAIN, sampled, 4).scheduler.betas[-1] == pytest.approx(0.01)


def test_a_scheduler_whose_package_is_missing_is_read_from_its_file(monkeypatch):
    missing = type("SDEScheduler", (), {"__module__": "diffusers.utils.dummy_torch_objects"})
    monkeypatch.setattr(diffusers, "SDEScheduler", missing, raising=False)
    given = {"_class_name": "SDEScheduler", "prediction_type": "v_prediction"} | PLAIN
    assert scheduled(given, "ddim", 4).scheduler.betas[0] == pytest.approx(0.001)
    del given["beta_end"]
    with pytest.raises(DataError, match="made for SDEScheduler.* or write beta_end into its config"):
        scheduled(given, "ddim", 4)


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_betas_that_only_ddpm_knows(schedule):
    own = diffusers.DDPMScheduler(beta_schedule=schedule)
    read = scheduled({"_class_name": "DDPMScheduler", "beta_schedule": schedule}, "ddim", 4)
    assert torch.equal(read.scheduler.alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr .* prediction_type epsilon"),
        ({"trained_betas": [0.1, 0.5, 1.0], "num_train_timesteps": 3}, "zero terminal SNR.* prediction_type epsilon"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is true, but prediction_type is epsilon"),
        ({"prediction_type": ["epsilon"]}, r"prediction type \['epsilon'\] is unknown"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, expected 1 to"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, expected 1 to"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, num_train_timesteps is 1000"),
        ({"trained_betas": "many"}, "DDPMScheduler makes no noise schedule of trained_betas 'many'"),
        ({"beta_schedule": "wave"}, "makes no noise schedule of beta_schedule 'wave'"),
        ({"beta_start": -0.1}, "betas from -0.1 to 0.02 are no noise schedule"),
        ({"beta_end": 20.0}, r"betas from 0.0001 to 20 are no noise schedule: .*beta_end 20.0"),
        ({"beta_end": float("nan")}, "are no noise schedule"),
        ({"beta_start": 0, "beta_end": 0}, "betas from 0 to 0 are no noise schedule"),
        ({"timestep_type": "continuous"}, "samples no plain latents"),
        ({"_class_name": "NoScheduler"}, "made for NoScheduler"),
        ({"_class_name": ["DDPMScheduler"]}, r"made for \['DDPMScheduler'\]"),
        ({"_class_name": None}, "made for None"),
        ({"steps_offset": -5}, r"4 steps end outside of its 1000 timesteps \(steps_offset -5\)"),
        ({"steps_offset": 10**9}, "outside of its 1000 timesteps"),
        ({"timestep_spacing": "wide"}, "cannot be sampled in 4 steps"),
        ({"steps_offset": "one"}, "cannot be sampled in 4 steps"),
    ],
)
def test_configurations_that_cannot_work_are_refused_before_sampling(values, message):
    for name in ("ddim", "euler"):
        if name == "euler" and "steps_offset" in values:
            continue  # which it does not use here
        with pytest.raises((DataError, UsageError), match=message) as error:
            scheduled({"_class_name": "DDPMScheduler"} | values, name, 4)
        assert "\n" not in str(error.value)
