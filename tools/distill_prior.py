"""Distill a diffusion prior to few steps from its own samples alone, and save it as a latent consistency model.

    python tools/distill_prior.py stages/assets/strokes32 --recipe demo --out build/strokes32-lcm --work build/lcm \
        --minutes 30

The prior draws a pool of DDIM paths for the prompts of a recipe: latents at a few noise levels of each, and the clean
latent where it ends. A copy of its UNet learns the consistency function (Song et al. 2023) at these levels: from any
of them to the end of the path at once, as Luhman & Luhman 2021 learn the whole path. Paths are drawn once, so that a
training step takes one pass of one network; bootstrapping from the student's own neighbors (latent consistency
distillation) takes four, and far more steps. No image that the prior did not draw is seen. A second call with more
``--minutes`` goes on where the first stopped. The result is used with ``prior.distilled=lcm``, in at most ``--levels``
steps.
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

AT_ONCE = 256
SCALE_EMBEDDING = 64  # width of the embedded CFG scale
HUBER = 1e-3
CARD = """---
license: {license}
library_name: diffusers
tags: [latent-diffusion, latent-consistency-model]
---
# {name}: {base} in 1 to {levels} steps

A latent consistency model in diffusers' format, distilled from `{base}` by `tools/distill_prior.py`:

    factory run synth --prior {out} --set prior.distilled=lcm --set prior.scheduler=lcm --set prior.steps={levels}

- **Data**: {pool:,} DDIM paths of {path_steps} steps that `{base}` drew itself for the prompts of recipe `{recipe}`,
  {scale}. No other image was used.
- **Training**: {steps:,} steps of {batch} latents at timesteps {times}, {minutes:.0f} minutes on {device}; mean
  absolute error of the clean latent {loss:.4f}.
- **Limits**: those of `{base}`, and less detail.{license_line}
"""


class Paths:
    """DDIM paths of ``prior`` that pass through ``levels`` noise levels, the first of them the noisiest."""

    def __init__(self, prior: TextPrior, levels: int, between: int, bf16: bool) -> None:
        config, self.bf16 = prior.schedule.scheduler.config, bf16
        self.prior, self.between, self.kind = prior, between, prior.schedule.kind
        self.scheduler = LCMScheduler.from_config(config, clip_sample=False, original_inference_steps=levels)
        self.alphas = self.scheduler.alphas_cumprod.to(prior.device)
        stride = len(self.alphas) // (levels * between)
        self.times = [stride * i - 1 for i in range(levels * between, 0, -1)]
        self.learned = torch.tensor(self.times[::between], device=prior.device)

    def autocast(self) -> torch.autocast:
        """For networks alone."""
        return torch.autocast(torch.device(self.prior.device).type, dtype=torch.bfloat16, enabled=self.bf16)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) ``[n, 1, 1, 1]`` of timesteps ``[n]``."""
        bar = self.alphas[times].view(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def clean(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """ẑ0 that the network's ``output`` stands for."""
        return (z - sigma * output) / alpha if self.kind == "epsilon" else alpha * z - sigma * output

    @torch.no_grad()
    def draw(self, prompts: list[str], scales: Tensor, seed: int) -> Tensor:
        """Latents ``[n, levels + 1, c, h, w]``, the clean one last, of a path for each prompt with its CFG scale
        ``[n]``."""
        prior, paths = self.prior, []
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start : start + AT_ONCE]
            condition = torch.cat([prior.row(prompt) for prompt in some])
            negative = prior.negative().expand_as(condition)
            scale = scales[start : start + AT_ONCE].view(-1, 1, 1, 1).to(prior.device)
            z = torch.randn(len(some), *prior.latent_shape, generator=torch_rng(seed, "pool", start)).to(prior.device)
            passed = []
            for step, time in enumerate(self.times):
                if step % self.between == 0:
                    passed.append(z.cpu())
                times = torch.full((len(some),), time, device=prior.device)
                with self.autocast():
                    output = prior.evaluate(z, times, condition).float()
                    without = output if (scale == 1).all() else prior.evaluate(z, times, negative).float()
                output = without + scale * (output - without)
                alpha, sigma = self.levels(times)
                z0 = self.clean(z, output, alpha, sigma)
                if step + 1 < len(self.times):
                    ahead, noise = self.levels(torch.full_like(times, self.times[step + 1]))
                    z = ahead * z0 + noise * (z - alpha * z0) / sigma
            paths.append(torch.stack([*passed, z0.cpu()], dim=1).half())
            print(f"pool: {start + len(some)} of {len(prompts)} paths", flush=True)
        return torch.cat(paths)

    def function(self, network: Any, z: Tensor, times: Tensor, scale: Tensor, condition: Tensor) -> Tensor:
        """f(z, t) = c_skip·z + c_out·ẑ0, as ``prior.distilled=lcm`` samples with it."""
        size = network.config.time_cond_proj_dim
        embedded = get_timestep_embedding(1000 * (scale - 1), size) if size else None
        with self.autocast():
            output = network(z, times, condition, timestep_cond=embedded, added_cond_kwargs={}).sample.float()
        alpha, sigma = self.levels(times)
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(times.view(-1, 1, 1, 1))
        return skip * z + out * self.clean(z, output, alpha, sigma)

    def loss(self, network: Any, path: Tensor, scale: Tensor, condition: Tensor, rng: torch.Generator) -> Tensor:
        """Pseudo-Huber distance (Song & Dhariwal 2023) of f at one level of each ``path [n, levels + 1, c, h, w]`` from
        the path's end."""
        n = len(path)
        level = torch.randint(len(self.learned), (n,), generator=rng).to(path.device)
        z, z0 = path[torch.arange(n), level].float(), path[:, -1].float()
        error = self.function(network, z, self.learned[level], scale, condition) - z0
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


def student_of(unet: Any, scales: tuple[float, float]) -> UNet2DConditionModel:
    """A copy of ``unet``; for a range of CFG scales it takes the embedded scale, to which it does not react yet."""
    more = {"time_cond_proj_dim": SCALE_EMBEDDING} if scales[0] < scales[1] else {}
    student = UNet2DConditionModel.from_config(dict(unet.config) | more)
    missing, unexpected = student.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and len(missing) == len(more), (missing, unexpected)
    if more:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def save(folder: Path, base: Path, student: Any, scheduler: LCMScheduler) -> None:
    """The pipeline folder ``base`` with the student as its UNet; the noise schedule in the words of ``base``, if LCM's
    scheduler makes the same of them."""
    told = json.loads((base / "scheduler" / "scheduler_config.json").read_text()) | {
        "clip_sample": False, "original_inference_steps": scheduler.config.original_inference_steps
    }  # fmt: skip
    plain = LCMScheduler.from_config(told)
    if torch.equal(plain.alphas_cumprod, scheduler.alphas_cumprod):
        scheduler = plain
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
    parser.add_argument("--pool", type=int, default=8_192, help="paths that the prior draws")
    parser.add_argument("--levels", type=int, default=4, help="most steps that the result is sampled in")
    parser.add_argument("--between", type=int, default=5, help="DDIM steps of a path from one level to the next")
    parser.add_argument(
        "--scales", type=float, nargs=2, default=(1.0, 1.0),
        help="CFG scales to learn; a range makes the scale an input of the network, one scale is built in",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="networks compute in bfloat16 (autocast)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    (low, high), guided = args.scales, args.scales != (1.0, 1.0)

    settings = PriorSettings(path=str(args.prior), cfg_scale=2.0 if guided else 1.0)
    prior = load_prior(settings, args.device)
    assert isinstance(prior, TextPrior) and prior.schedule.kind in ("epsilon", "v_prediction"), "no Stable Diffusion"
    prompts_of = resolve(args.recipe, environ={}).synth.prompts
    prompts = [prompt_for(prompts_of, "", 0, i) for i in range(args.pool)]
    scales = torch.empty(args.pool).uniform_(low, high, generator=torch_rng(0, "scales"))
    paths = Paths(prior, args.levels, args.between, args.bf16)
    kept = args.work / f"paths-{args.pool}-{args.levels}x{args.between}-{low:g}-{high:g}.pt"
    if not kept.exists():
        save_checkpoint(kept, {"paths": paths.draw(prompts, scales, seed=0)})
    pool = load_checkpoint(kept)["paths"]

    torch.manual_seed(0)
    student = student_of(prior.network, (low, high)).to(args.device)

    def loss_of(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (args.batch,), generator=rng)
        condition = torch.cat([prior.row(prompts[row]) for row in rows.tolist()])
        return paths.loss(student, pool[rows].to(args.device), scales[rows].to(args.device), condition, rng)

    budget = Budget(minutes=args.minutes) if args.steps is None else Budget(steps=args.steps)
    recipe = Recipe(lr=args.lr, warmup=50, weight_decay=0.0)
    fitted = fit({"unet": student}, loss_of, budget, recipe, args.work / "lcm.pt", lambda _: "")
    fitted.load_into({"unet": student})
    save(args.out, args.prior, student, paths.scheduler)
    scale = f"with CFG {low:g}" + ("" if low == high else f" to {high:g}, which is an input of the network")
    card = CARD.format(
        name=args.out.name, base=args.prior.name, out=args.out, levels=args.levels, pool=args.pool,
        path_steps=len(paths.times), recipe=args.recipe, scale=scale, steps=fitted.step, batch=args.batch,
        times=", ".join(map(str, paths.learned.tolist())), minutes=fitted.seconds / 60, device=args.device,
        loss=fitted.loss, license="apache-2.0", license_line="",
    )  # fmt: skip
    (args.out / "README.md").write_text(card)
    print(f"saved {args.out}; {args.out / 'README.md'} says how it is used", flush=True)


if __name__ == "__main__":
    main()
