"""How far a prior's samples are from held-out photographs: Fréchet distance in the features of a CIFAR-10 ResNet-20.

    python benchmarks/prior_quality.py --images tinyimagenet32-train.parquet --classes tinyimagenet32-classes.json \
        --features cifar10-resnet20.safetensors --prior priors/natural32 --samples 1000 --grid runs/grid.png

Not the FID of the literature, which needs Inception's weights: features are the 64 pooled channels of the ResNet, so
numbers compare with each other only. Beside the samples stand the yardsticks: other held-out photographs (what a
perfect prior would score), the autoencoder's reconstructions (its floor), and noise. Prompts are the prior's own class
names in turn; the held-out rows are those that ``tools/train_natural_prior.py`` never trained on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from cifar_data import third_party
from train_natural_prior import HELD_OUT, load_pool, pixels

from stages.models.loading import load_teacher
from stages.settings import PriorSettings
from stages.synth.group import Group
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import denoise

BATCH = 50


def frechet(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½) of features ``[n, d]`` (Heusel et al. 2017)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def sampled(prior, prompts: list[str], seed: int) -> Tensor:
    """Images in [-1, 1], one a prompt, as synthesis draws them (unguided)."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        some = tuple(prompts[start : start + BATCH])
        numbers = tuple(range(start, start + len(some)))
        *_, frame = denoise(prior, Group(start // BATCH, numbers, (0,) * len(some), some), seed)
        parts.append(frame.images.clamp(-1, 1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--classes", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True, help="weights of a CIFAR-10 ResNet-20")
    parser.add_argument("--prior", required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, nargs="+", default=[2.0])
    parser.add_argument("--grid", type=Path, help="PNG of the first 100 samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = load_teacher(third_party("resnet20", args.features))

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        hook = net.net.linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for part in x.split(250):
            net.logits(part)
        hook.remove()
        return torch.cat(inputs)

    pool = load_pool(args.images, args.classes, HELD_OUT)
    held = pixels(pool.images, "cpu")
    half = min(HELD_OUT // 2, args.samples)
    real, other = features(held[:half]), features(held[half : 2 * half])
    print(f"| images | Fréchet distance to {half} held-out photographs |\n|---|---|")
    print(f"| {half} other held-out photographs | {frechet(other, real):.2f} |")
    prior = load_prior(PriorSettings(path=args.prior, steps=args.steps), "cpu")
    with torch.no_grad():
        rebuilt = [prior.vae.decode(prior.vae.encode(x).latent).sample for x in held[half : 2 * half].split(250)]
    print(f"| their reconstructions | {frechet(features(torch.cat(rebuilt).clamp(-1, 1)), real):.2f} |")
    noise = torch.rand(half, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    print(f"| uniform noise | {frechet(features(noise), real):.2f} |", flush=True)
    names = np.random.default_rng(0).permutation([name.lower() for name in pool.names * (args.samples // 200 + 1)])
    for cfg in args.cfg:
        prior = load_prior(PriorSettings(path=args.prior, steps=args.steps, cfg_scale=cfg), "cpu")
        images = sampled(prior, [f"a photo of {name}" for name in names[: args.samples]], seed=0)
        print(f"| {args.samples} samples, {args.steps} steps, cfg {cfg:g} | {frechet(features(images), real):.2f} |")
        if args.grid:
            args.grid.parent.mkdir(parents=True, exist_ok=True)
            save_image(images[:100] / 2 + 0.5, args.grid.with_stem(f"{args.grid.stem}-cfg{cfg:g}"), nrow=10)


if __name__ == "__main__":
    main()
