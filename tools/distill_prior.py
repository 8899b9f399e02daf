"""Distill a diffusion prior to few steps from its own samples alone, and save it as a latent consistency model.

    python tools/distill_prior.py stages/assets/strokes32 --recipe demo --out build/strokes32-lcm --work build/lcm \
        --minutes 30

Latent consistency distillation (Luo et al. 2023, algorithm 1): the prior draws a pool of latents for the prompts of a
recipe; a copy of its UNet, which also takes the scale of classifier-free guidance as an input, learns to give the same
clean latent for neighbors on the prior's own DDIM paths. No image that the prior did not draw is seen. A second call
with more ``--minutes`` goes on where the first stopped. The result is used with ``prior.distilled=lcm``.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from prior_training import Budget, Recipe, fit, load_checkpoint, save_checkpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.recipe import resolve
from stages.seeds import torch_rng
from stages.settings import PriorSettings
from stages.synth.group import prompt_for
from stages.synth.priors.kinds import TextPrior, load_prior
from stages.synth.priors.schedule import predicted_z0
from stages.synth.sampler import sample

SOLVER_STEPS = 50  # of the DDIM solver whose neighbors are made consistent
POOL_STEPS = 25  # with which the pool is drawn
AT_ONCE = 256
SCALE_EMBEDDING = 64  # width of the embedded CFG scale
TARGET_DECAY = 0.95
HUBER = 1e-3
CARD = """---
license: apache-2.0
library_name: diffusers
tags: [latent-diffusion, latent-consistency-model]
---
# {name}: {base} in few steps

A latent consistency model in diffusers' format, distilled from `{base}` by `tools/distill_prior.py`: use it with
`prior.path={name} prior.distilled=lcm` (4 steps; `prior.cfg_scale` from {low:g} to {high:g} is an input of the network
and costs no second evaluation).

- **Data**: {pool:,} latents that the prior drew itself ({pool_steps} DDIM steps, CFG {pool_scale:g}) for the prompts of
  recipe `{recipe}`. No other image was used.
- **Training**: {steps:,} steps of {batch} latents, {minutes:.0f} minutes on {device}, final loss {loss:.5f}.
- **Limits**: those of `{base}`, and less detail.
"""


def draw_pool(prior: TextPrior, prompts: list[str], seed: int) -> Tensor:
    """A clean latent of the prior for each prompt, ``[n, c, h, w]``."""
    latents = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        noise = torch.randn(len(some), *prior.latent_shape, generator=torch_rng(seed, "pool", start))
        *_, (_, z) = sample(prior, prior.start(noise.to(prior.device)), prior.encode(some))
        latents.append(z.cpu())
        print(f"pool: {start + len(some)} of {len(prompts)} latents", flush=True)
    return torch.cat(latents)


def with_scale_input(unet: Any) -> UNet2DConditionModel:
    """A copy of ``unet`` that also takes an embedding of the CFG scale, to which it does not react yet."""
    student = UNet2DConditionModel.from_config(dict(unet.config) | {"time_cond_proj_dim": SCALE_EMBEDDING})
    missing, unexpected = student.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and missing == ["time_embedding.cond_proj.weight"], (missing, unexpected)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


class Consistency:
    """The loss of latent consistency distillation for a batch from the pool."""

    def __init__(self, prior: TextPrior, student: Any, target: Any, scales: tuple[float, float]) -> None:
        self.prior, self.student, self.target, self.scales = prior, student, target, scales
        self.scheduler = LCMScheduler.from_config(prior.schedule.scheduler.config, clip_sample=False)
        self.alphas = self.scheduler.alphas_cumprod.to(prior.device)
        self.stride = len(self.alphas) // SOLVER_STEPS

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) ``[n, 1, 1, 1]`` of timesteps ``[n]``."""
        bar = self.alphas[times].view(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def function(self, network: Any, z: Tensor, times: Tensor, scale: Tensor, condition: Tensor) -> Tensor:
        """f(z, t): c_skip·z + c_out·ẑ0."""
        embedded = get_timestep_embedding(1000 * (scale - 1), SCALE_EMBEDDING)
        output = network(z, times, condition, timestep_cond=embedded).sample
        alpha, sigma = self.levels(times)
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(times.view(-1, 1, 1, 1))
        return skip * z + out * predicted_z0(z, output, alpha, sigma, self.prior.schedule.kind)

    def loss(self, z0: Tensor, condition: Tensor, negative: Tensor, generator: torch.Generator) -> Tensor:
        """Pseudo-Huber distance (Song & Dhariwal 2023, equation 7) of f at neighbors of the CFG-guided DDIM path."""
        n, device = len(z0), z0.device
        index = torch.randint(SOLVER_STEPS, (n,), generator=generator).to(device)
        times = (index + 1) * self.stride - 1
        before = (times - self.stride).clamp_min(0)
        scale = torch.empty(n).uniform_(*self.scales, generator=generator).to(device)
        (alpha, sigma), (alpha_before, sigma_before) = self.levels(times), self.levels(before)
        z = alpha * z0 + sigma * torch.randn(z0.shape, generator=generator).to(device)
        with torch.no_grad():
            both = self.prior.network(torch.cat([z, z]), times.repeat(2), torch.cat([negative, condition])).sample
            without, with_ = both.chunk(2)
            output = without + scale.view(-1, 1, 1, 1) * (with_ - without)
            clean = predicted_z0(z, output, alpha, sigma, self.prior.schedule.kind)
            neighbor = alpha_before * clean + sigma_before * (z - alpha * clean) / sigma
            aim = self.function(self.target, neighbor, before, scale, condition)
            for mean, value in zip(self.target.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(value, 1 - TARGET_DECAY)
        error = self.function(self.student, z, times, scale, condition) - aim
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


def save(folder: Path, base: Path, student: Any, scheduler: LCMScheduler) -> None:
    """The pipeline folder ``base`` with the student as its UNet."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(base / part, folder / part, dirs_exist_ok=True)
    student.half().save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prior", type=Path, help="folder of a StableDiffusionPipeline")
    parser.add_argument("--recipe", default="demo", help="whose prompts are drawn")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=8_192, help="latents that the prior draws")
    parser.add_argument("--pool-scale", type=float, default=3.0)
    parser.add_argument("--scales", type=float, nargs=2, default=(1.0, 5.0), help="CFG scales to learn")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    settings = PriorSettings(path=str(args.prior), steps=POOL_STEPS, cfg_scale=args.pool_scale)
    prior = load_prior(settings, args.device)
    assert isinstance(prior, TextPrior), "only Stable Diffusion's kind of prior"
    prompts_of = resolve(args.recipe, environ={}).synth.prompts
    prompts = [prompt_for(prompts_of, "", 0, i) for i in range(args.pool)]
    path = args.work / f"pool-{args.pool}-{args.pool_scale:g}.pt"
    if not path.exists():
        save_checkpoint(path, {"latents": draw_pool(prior, prompts, seed=0)})
    latents = load_checkpoint(path)["latents"]

    torch.manual_seed(0)
    student, target = (with_scale_input(prior.network).to(args.device) for _ in range(2))
    checkpoint = args.work / "lcm.pt"
    if kept := load_checkpoint(checkpoint, args.device):
        target.load_state_dict(kept["target"])
    target.requires_grad_(False)
    consistency = Consistency(prior, student, target, tuple(args.scales))
    negative = prior.negative()

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (args.batch,), generator=generator)
        condition = torch.cat([prior.row(prompts[row]) for row in rows.tolist()])
        z0 = latents[rows].to(args.device)
        return consistency.loss(z0, condition, negative.expand_as(condition), generator)

    recipe = Recipe(lr=args.lr, weight_decay=0.0)
    more = {"target": target.state_dict()}
    budget = Budget(minutes=args.minutes)
    fitted = fit({"unet": student}, loss_of, budget, recipe, checkpoint, lambda _: "", more=more)
    fitted.load_into({"unet": student})
    save(args.out, args.prior, student, consistency.scheduler)
    low, high = args.scales
    card = CARD.format(
        name=args.out.name, base=args.prior.name, low=low, high=high, pool=args.pool, pool_steps=POOL_STEPS,
        pool_scale=args.pool_scale, recipe=args.recipe, steps=fitted.step, batch=args.batch,
        minutes=fitted.seconds / 60, device=args.device, loss=fitted.loss,
    )  # fmt: skip
    (args.out / "README.md").write_text(card)
    print(f"saved {args.out}; use it with prior.path={args.out} prior.distilled=lcm", flush=True)


if __name__ == "__main__":
    main()
