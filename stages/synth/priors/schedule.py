"""The noise schedule of a prior: a diffusers scheduler made a pure function of the state.

z = α·z0 + σ·eps with (α, σ) = (√ᾱ, √(1−ᾱ)) where the variance is preserved (ddim, ddpm, dpmsolver++), (1, σ) where it
explodes (euler, euler-ancestral), (1−σ, σ) for flow matching. Equation 4 of DiffDFKD for eps; Salimans & Ho 2022
(appendix D) for v. Few-step priors: consistency functions (``lcm``: Luo et al. 2023, whose ẑ0 is c_skip·z + c_out·z0)
and consistency trajectories (``tcd``: Zheng et al. 2024).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from manifests.errors import DataError, UsageError, first_line
from stages.settings import PriorSettings


@dataclass(frozen=True)
class State:
    """``n`` latents ``z [n, c, h, w]`` at the noise level of denoising step ``step``."""

    z: Tensor
    step: int
    before: Tensor | None = field(default=None, kw_only=True)  # a multistep solver's memory: ẑ0 of the step before

    def tracked(self) -> "State":
        """The same with ``z`` as a leaf of the graph, where gradients are enabled."""
        return replace(self, z=self.z.detach().requires_grad_()) if torch.is_grad_enabled() else self

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "State":
        """Every tensor of the state, the solver's memory too, through the same linear ``change`` of latents."""
        return State(change(self.z), self.step, before=None if self.before is None else change(self.before))


@dataclass(frozen=True)
class Prediction(State):
    """A state that the network has seen."""

    output: Tensor  # of the network after CFG, in the prior's own prediction type
    z0: Tensor  # predicted clean latents

    def detached(self) -> "Prediction":
        """The same numbers without a graph."""
        before = None if self.before is None else self.before.detach()
        return Prediction(self.z.detach(), self.step, self.output.detach(), self.z0.detach(), before=before)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Prediction":
        """Latents, output, prediction and memory together.

        Changing z alone and stepping with the old eps would shift what came from elsewhere by (σ/α)(eps' − eps).
        """
        new = super().mapped(change)
        return Prediction(new.z, self.step, change(self.output), change(self.z0), before=new.before)


@runtime_checkable
class VariationPrior(Protocol):
    """A prior that can be conditioned on an encoder's features of an image, to make variants of it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Features ``[n, d]`` of images ``[n, 3, side, side]`` in [−1, 1]. Without a graph."""

    def encode_with(self, conditions: Sequence[str], embedded: Tensor, noise: Tensor, level: int) -> Any:
        """``encode`` with features ``embedded [n, d]`` of images to vary, to which unit ``noise [n, d]`` is added:
        0 is the least ``level``. Raises UsageError where the level is above the encoder's schedule."""


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
PLAIN = {"beta_schedule", "trained_betas", "prediction_type"}
DISTILLED_OR_SHIFTED = {"original_inference_steps", "snr_shift_scale"}
CONSISTENCY = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
"""Schedulers of few-step priors, and how those were distilled."""
EXPLODING = ("euler", "euler-ancestral")
MAX_TRAIN_STEPS = 100_000
FLOOR = 1e-5  # least α: pure noise has none, and guidance divides by it


def predicted_z0(z: Tensor, output: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """The clean latent that ``output`` stands for; shapes follow ``z``."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    if kind == "v_prediction":
        norm = math.hypot(alpha, sigma)  # 1 where the variance is preserved
        return (alpha / norm**2) * z - (sigma / norm) * output
    if kind == "flow_prediction":
        return z - sigma * output
    return output


def moved(z: Tensor, output: Tensor, delta: Tensor, alpha: float, sigma: float, kind: str) -> tuple[Tensor, Tensor]:
    """``(z, output)`` after ẑ0 moved by ``delta`` with eps kept: z' = z + α·Δ."""
    if kind == "v_prediction":
        output = output - (sigma / math.hypot(alpha, sigma)) * delta
    elif kind == "flow_prediction":
        output = output - delta
    elif kind == "sample":
        output = output + delta
    return z + alpha * delta, output


def scheduler_class(config: dict[str, Any]) -> Any:
    """The class of diffusers that ``config`` names, or None."""
    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    return kind if isinstance(kind, type) else None


def parameters_of(kind: Any) -> set[str]:
    """What the scheduler class ``kind`` is built with."""
    return set(inspect.signature(kind.__init__).parameters) if kind else set()


def read_noise_schedule(config: dict[str, Any], source: str, distilled: bool = False) -> dict[str, Any]:
    """``config`` (a ``scheduler_config.json``) with the ``trained_betas [T]`` that its own class gives it.

    What a class is made for shows in its parameters: betas and a type of prediction mean plain latents and any number
    of steps. Shifted signal-to-noise ratios (CogVideoX), preconditioned (EDM), consistency and discrete ones have other
    parameters: another scheduler over their weights would make noise. So it would over networks ``distilled`` to few
    steps (LCM, TCD) that are not called so.

    Raises DataError for those, UsageError for the last, and DataError for values that give no noise schedule.
    """
    name, given = repr(config.get("_class_name")).strip("'"), {"beta_start", "beta_end", *PLAIN}
    kind = scheduler_class(config)
    lacks = kind is not None and kind.__module__.startswith("diffusers.utils.dummy")  # a package for its steps
    if lacks and given <= config.keys():
        kind = DDPMScheduler  # computes betas alike; only defaults differ by class
    consistency = CONSISTENCY.get(str(name))
    if consistency and not distilled:
        raise UsageError(f"prior {source} is a few-step one, made for {name}: set prior.distilled={consistency}")
    parameters = parameters_of(kind) - ({"original_inference_steps"} if consistency else set())
    edm = " with timestep_type continuous" if config.get("timestep_type") == "continuous" else ""
    if not parameters >= PLAIN or parameters & DISTILLED_OR_SHIFTED or edm:
        raise DataError(
            f"prior {source} is made for {name}{edm}, which samples no plain latents over a noise schedule of betas, "
            "and so cannot be guided safely, nor replaced; if the network was trained with such a schedule, save that "
            "scheduler (e.g. DDPMScheduler) in its place"
            + (f", or write {', '.join(sorted(given - config.keys()))} into its config" if lacks else "")
        )
    known = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule", "trained_betas") if key in config}
    count = config.get("num_train_timesteps", 1000)
    try:
        betas = kind(num_train_timesteps=count, **known).betas
    except Exception as error:  # whatever a value of another type leads to
        values = ", ".join(f"{key} {value!r}"[:80] for key, value in known.items())
        raise DataError(
            f"prior {source}: {name} makes no noise schedule of {values}: {printable_line(error)}"
        ) from error
    if len(betas) != count:
        raise DataError(f"prior {source}: trained_betas has {len(betas)} values, num_train_timesteps is {count}")
    if not (betas.min() >= 0 and betas.max() <= 1 and betas.max() > 0):  # false for NaN, too
        raise DataError(
            f"prior {source}: betas from {betas.min():g} to {betas.max():g} are no noise schedule: expected 0 to 1 "
            f"(beta_start {config.get('beta_start')!r}, beta_end {config.get('beta_end')!r})"
        )
    config = {key: value for key, value in config.items() if key != "_use_default_values"}  # would drop these
    return config | {"num_train_timesteps": count, "trained_betas": betas.tolist()}


def printable_line(error: Exception) -> str:
    """The first line of an error of a library, which may repeat what stands in a file."""
    return repr(first_line(error))[1:-1]


def build_scheduler(config: dict[str, Any], settings: PriorSettings, source: str) -> Any:
    """The diffusers scheduler of ``settings`` over the noise schedule of ``config``.

    Nothing that is not linear in ẑ0 is left on (clipping, thresholding): guidance moves ẑ0 and expects it to stay.
    Raises DataError as :func:`read_noise_schedule`, and where the settings contradict each other.
    """
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_TRAIN_STEPS:
        raise DataError(f"prior {source}: num_train_timesteps is {count!r}, expected 1 to {MAX_TRAIN_STEPS}")
    flow = config.get("_class_name") in FLOWS or config.get("prediction_type") == "flow_prediction"
    if config.get("_class_name") not in FLOWS:
        config = read_noise_schedule(config, source, settings.distilled is not None)
    kind = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise DataError(f"prior {source}: prediction type {kind!r} is unknown; known: {', '.join(PREDICTION_TYPES)}")
    if config.get("use_flow_sigmas") and not flow:
        raise DataError(f"prior {source}: use_flow_sigmas is true, but prediction_type is {kind}: one of them is wrong")
    zero_snr = config.get("rescale_betas_zero_snr") or config.get("trained_betas", [0])[-1] == 1
    if zero_snr and kind == "epsilon":
        raise DataError(
            f"prior {source}: with rescale_betas_zero_snr (zero terminal SNR) the last step is noise alone, of which "
            "prediction_type epsilon predicts no image: one of them is wrong (v_prediction, or rescale_betas_zero_snr "
            "false)"
        )
    name = settings.scheduler
    if flow and name not in ("euler", "dpmsolver++"):
        raise UsageError(f"prior {source} predicts a flow, which {name} cannot sample: set prior.scheduler=euler")
    if settings.distilled in ("turbo", "lightning", "hyper"):
        config = config | {"timestep_spacing": "trailing"}  # they begin at the last timestep, where training did
    if settings.distilled == "lightning" and settings.steps == 1:
        config = config | {"prediction_type": "sample"}
    if name == "lcm":
        return LCMScheduler.from_config(config, clip_sample=False, thresholding=False)
    if name == "tcd":
        return TCDScheduler.from_config(config, clip_sample=False, thresholding=False)
    if name == "euler-ancestral":
        return EulerAncestralDiscreteScheduler.from_config(config)
    if name == "ddim":
        return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    if name == "ddpm":  # learned variances are dropped with the network's extra channels
        fixed = config.get("variance_type") in ("fixed_small_log", "fixed_large", "fixed_large_log")
        variance = config["variance_type"] if fixed else "fixed_small"
        return DDPMScheduler.from_config(config, clip_sample=False, thresholding=False, variance_type=variance)
    if name == "dpmsolver++":
        second_order = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        linear: dict[str, Any] = {"thresholding": False, "variance_type": None, "prediction_type": kind}
        flows: dict[str, Any] = {
            "use_flow_sigmas": True,
            "flow_shift": config.get("flow_shift", config.get("shift", 1.0)),
        }
        return DPMSolverMultistepScheduler.from_config(config, **second_order, **linear, **(flows if flow else {}))
    if flow:
        plain = {"stochastic_sampling": False, "use_dynamic_shifting": False, "invert_sigmas": False}
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift, **plain)
    return EulerDiscreteScheduler.from_config(config, final_sigmas_type="zero")


class Schedule:
    """The denoising steps that ``settings`` ask for; ``source`` names the prior in errors.

    ``times`` are the network's input, ``timesteps`` the same rounded for the manifest (noisiest first).
    """

    def __init__(self, config: dict[str, Any], settings: PriorSettings, source: str) -> None:
        name, steps = settings.scheduler, settings.steps
        try:
            self.name, self.eta, self.scheduler = name, settings.eta, build_scheduler(config, settings, source)
        except (DataError, UsageError):
            raise
        except Exception as error:  # diffusers checks few of the values in a config
            raise DataError(
                f"prior {source}: {name} cannot be built from scheduler_config.json: {printable_line(error)}"
            ) from error
        self.flow = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) or bool(
            getattr(self.scheduler.config, "use_flow_sigmas", False)
        )
        self.kind = "flow_prediction" if self.flow else self.scheduler.config.prediction_type
        if name == "lcm" and steps > (levels := self.scheduler.config.original_inference_steps):
            raise UsageError(
                f"prior {source} was distilled at {levels} noise levels: set prior.steps to {levels} or less"
            )
        try:
            self.scheduler.set_timesteps(steps)
        except Exception as error:
            raise UsageError(f"prior {source} cannot be sampled in {steps} steps: {printable_line(error)}") from error
        self.scheduler.is_scale_input_called = True  # ``network_input`` does it; silences a warning
        self.times = [t.item() for t in self.scheduler.timesteps]
        if len(self.times) != steps:
            raise UsageError(f"{name} takes {len(self.times)} steps where {steps} are asked for: change prior.steps")
        last = self.scheduler.config.num_train_timesteps - 1
        if not self.flow and not 0 <= min(self.times) <= max(self.times) <= last:
            raise UsageError(
                f"prior {source}: {steps} steps end outside of its {last + 1} timesteps (steps_offset "
                f"{self.scheduler.config.get('steps_offset')}): lower prior.steps, or correct scheduler_config.json"
            )
        self.timesteps = [round(t) for t in self.times]
        self.stochastic = name in ("ddpm", "lcm", "tcd", "euler-ancestral")
        self.levels = [self._level(step) for step in range(steps)]

    def _level(self, step: int) -> tuple[float, float]:
        if self.name in ("ddim", "ddpm", "lcm", "tcd"):
            bar = float(self.scheduler.alphas_cumprod[self.timesteps[step]])
            alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        else:
            sigma = float(self.scheduler.sigmas[step])
            if self.flow:
                alpha = 1 - sigma
            elif self.name in EXPLODING:
                alpha = 1.0
            else:
                alpha = 1 / math.hypot(1, sigma)
                sigma *= alpha
        return max(alpha, FLOOR), sigma

    def start(self, noise: Tensor) -> State:
        """Unit noise ``[n, c, h, w]`` as the state before the first step."""
        scale = float(self.scheduler.init_noise_sigma) if self.name in EXPLODING and not self.flow else 1.0
        return State(noise if scale == 1 else noise * scale, 0)

    def noised(self, z0: Tensor, noise: Tensor, step: int) -> State:
        """The state before denoising step ``step`` of clean latents ``z0``: α·z0 + σ·noise; the noise alone at step 0,
        ``z0`` itself after the last step."""
        if step == 0:
            return self.start(noise)
        alpha, sigma = self.levels[step] if step < len(self.levels) else (1.0, 0.0)
        return State(alpha * z0 + sigma * noise, step)

    def network_input(self, state: State) -> Tensor:
        """Latents as the network expects them, of unit variance."""
        if self.name not in EXPLODING or self.flow:
            return state.z
        return state.z / math.hypot(*self.levels[state.step])

    def prediction(self, state: State, output: Tensor) -> Prediction:
        """The prediction that the network's ``output`` for ``state`` stands for."""
        z0 = predicted_z0(state.z, output, *self.levels[state.step], self.kind)
        if self.name == "lcm":
            skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(self.times[state.step])
            z0 = skip * state.z + out * z0
        return Prediction(state.z, state.step, output, z0, before=state.before)

    def move(self, state: Prediction, delta: Tensor) -> Prediction:
        """ẑ0 by ``delta``, eps kept. The solver's memory moves along, or it would take the jump for a slope."""
        z, output = moved(state.z, state.output, delta, *self.levels[state.step], self.kind)
        before = None if state.before is None else state.before + delta
        return Prediction(z, state.step, output, state.z0 + delta, before=before)

    def step(self, state: Prediction, rngs: Sequence[torch.Generator] | None = None) -> State:
        """One step of the scheduler; ``rngs``, one per trajectory, are what a stochastic one draws its noise from."""
        scheduler, time = self.scheduler, self.scheduler.timesteps[state.step]
        scheduler._step_index = state.step  # never searched for: timesteps may repeat
        if self.stochastic:
            if rngs is None:
                raise ValueError(f"{self.name} draws noise: it needs one generator per trajectory")
            if self.name == "lcm":  # with the ẑ0 that guidance moved, not one computed anew from z and the output
                return self._renoised(state, rngs)
            given = {"eta": self.eta} if self.name == "tcd" else {}
            next_z = scheduler.step(state.output, time, state.z, generator=list(rngs), **given).prev_sample
            return State(next_z, state.step + 1)
        if self.name != "dpmsolver++":
            return State(scheduler.step(state.output, time, state.z).prev_sample, state.step + 1)
        scheduler.model_outputs = [None, state.before]
        scheduler.lower_order_nums = 0 if state.before is None else 1
        return State(scheduler.step(state.output, time, state.z).prev_sample, state.step + 1, before=state.z0)

    def _renoised(self, state: Prediction, rngs: Sequence[torch.Generator]) -> State:
        """ẑ0 with fresh noise at the next level (Song et al. 2023, algorithm 1); as it is after the last step."""
        if state.step + 1 == len(self.levels):
            return State(state.z0, state.step + 1)
        noise = randn_tensor(state.z0.shape, generator=list(rngs), device=state.z0.device, dtype=state.z0.dtype)
        return self.noised(state.z0, noise, state.step + 1)
