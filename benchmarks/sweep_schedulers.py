"""Every scheduler class of diffusers as that of a prior: its noise schedule is read exactly, or the class is refused.

    python benchmarks/sweep_schedulers.py

For each class: files with its own defaults and with noise schedules of published models, read by every scheduler that
samples here. ``difference`` is the largest from the class's own ᾱ over all of these. Fails above 1e-6.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers

from manifests.errors import DataError
from stages.settings import PriorSettings
from stages.synth.priors.schedule import CONSISTENCY, Schedule

LIMIT = 1e-6
SAMPLERS = ("ddim", "ddpm", "dpmsolver++", "euler")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FILES = [
    {},
    STABLE_DIFFUSION,
    STABLE_DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2"},  # DeepFloyd IF
    {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"},  # latent diffusion
    {"trained_betas": [0.001 * 1.004**step for step in range(500)], "num_train_timesteps": 500},
]


def classes() -> list[str]:
    return [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]


def differences(name: str) -> Iterator[float]:
    """Of ᾱ as read from the class's own, for each of ``FILES`` that the class knows and each sampler.

    Raises DataError where the class is refused.
    """
    kind = getattr(diffusers, name)
    few = CONSISTENCY.get(name)  # a few-step prior, which is declared and sampled by its own kind alone
    samplers = (few,) if few else ("euler",) if name.startswith("FlowMatch") else SAMPLERS

    def read(file: dict[str, Any], sampler: str) -> Schedule:
        settings = PriorSettings.model_validate({"scheduler": sampler, "steps": 4, "distilled": few})
        return Schedule(file | {"_class_name": name}, settings, name)

    read({}, samplers[0])
    for file in () if name.startswith("FlowMatch") else FILES:  # these have no ᾱ
        own = kind(**file) if file.keys() <= kind().config.keys() else None
        for sampler in samplers if own is not None else ():
            yield (read(file, sampler).scheduler.alphas_cumprod - own.alphas_cumprod).abs().max().item()


def sweep(names: list[str]) -> list[tuple[str, str, float]]:
    """(class, outcome, largest difference) of each of the classes ``names``."""
    rows = []
    for name in names:
        try:
            found = list(differences(name))
            rows.append(
                (name, f"read: {len(found)} schedules" if found else "read: sigmas of a flow", max(found, default=0.0))
            )
        except DataError as error:
            rows.append((name, "refused by name" if f"made for {name}," in str(error) else f"REFUSED: {error}", 0.0))
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    rows = sweep(classes())
    print(f"diffusers {diffusers.__version__}\n\n| scheduler | outcome | difference |\n|---|---|---|")
    for name, outcome, difference in rows:
        print(f"| {name} | {outcome} | {f'{difference:.0e}' if outcome.startswith('read') else ''} |")
    sys.exit(any(difference > LIMIT or "REFUSED" in outcome for _, outcome, difference in rows))


if __name__ == "__main__":
    main()
