"""Train the embedded prior on drawn strokes and save it as a ``StableDiffusionPipeline`` folder.

    python tools/train_strokes_prior.py --out stages/assets/strokes32 --work build/strokes32

Three steps, each resumable from ``--work``: draw the images, fit the VAE, fit UNet + text encoder on cached latents
(epsilon prediction, captions dropped for classifier-free guidance, EMA). Runs on CPU or GPU; a second call with more
``--denoiser-steps`` goes on where the first stopped. Weights are stored as fp16 safetensors.
"""

import argparse
from pathlib import Path

import strokes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from prior_training import (
    CAPTION_DROP,
    Budget,
    Fitted,
    Recipe,
    averaged,
    build_text_encoder,
    build_tokenizer,
    fit,
    save_checkpoint,
    save_pipeline,
    token_ids,
)

TOKENS = 24
CARD = """---
license: apache-2.0
library_name: diffusers
tags: [latent-diffusion, procedural-data]
---
# Strokes prior (`embedded:strokes32`)

A small latent diffusion model in the standard `StableDiffusionPipeline` format: VAE {vae:.2f} M, UNet {unet:.2f} M,
text encoder {text:.2f} M parameters, stored as fp16 safetensors. It draws 32×32 pen strokes, white on black.

- **Data**: {images:,} procedurally drawn images (`tools/strokes.py`: lines, arcs, curves, loops, waves, corners with
  random shapes). No dataset was used, and no digit or letter is among the shapes that the script knows.
- **Captions** say how an image was drawn: "two thin connected strokes, a loop and an arc".
- **Training**: `python tools/train_strokes_prior.py --out stages/assets/strokes32 --work build/strokes32`;
  VAE {vae_steps:,} steps of 96 images, denoiser {steps:,} steps of {batch} latents with captions dropped {drop:.0%} of
  the time, AdamW, averaged weights (EMA). Final denoising loss {loss:.4f} (mean squared error of eps).
- **VAE**: {error:.2%} of the pixel variance of 512 held-out drawings is lost in 8×8×4 latents.
- **Limits**: made for the example and for tests. It knows strokes and nothing else.
"""


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 24, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=strokes.SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=strokes.SIZE // 4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, h, w]`` to three equal channels in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def unexplained(vae: AutoencoderKL, images: torch.Tensor, device: str) -> float:
    """Share of the pixel variance that encoding and decoding loses."""
    x = pixels(images).to(device)
    return (F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample, x) / x.var()).item()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, work: Path, device: str) -> None:
    """L1 + L2 reconstruction and a small KL term; prints held-out pixel error, leaves the averaged weights."""
    held = images[-512:]

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        x = pixels(images[torch.randint(len(images) - 512, (96,), generator=generator)]).to(device)
        x = x.to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(out, x) + F.mse_loss(out, x) + 1e-5 * posterior.kl().mean()

    def report(fitted: Fitted) -> str:
        with averaged({"vae": vae}, fitted):
            return f"held-out unexplained variance {unexplained(vae, held, device):.4f}"

    recipe = Recipe(lr=2e-3, weight_decay=1e-4)
    fit({"vae": vae}, loss_of, Budget(steps=steps), recipe, work / "vae.pt", report).load_into({"vae": vae})


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    return torch.cat([vae.encode(pixels(b).to(device)).latent_dist.mean.cpu() for b in images.split(500)])


def train_denoiser(unet, text_encoder, tokens, latents, empty, steps, batch, work, device) -> Fitted:
    """Epsilon-matching; captions are dropped for classifier-free guidance."""
    scheduler = build_scheduler()

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        z, t = latents[rows].to(device), torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(z.shape, generator=generator).to(device)
        ids = torch.where(torch.rand(batch, 1, generator=generator) < CAPTION_DROP, empty, tokens[rows])
        t = t.to(device)
        prediction = unet(scheduler.add_noise(z, noise, t), t, text_encoder(ids.to(device))[0]).sample
        return F.mse_loss(prediction, noise)

    nets = {"unet": unet, "text": text_encoder}
    fitted = fit(nets, loss_of, Budget(steps=steps), Recipe(lr=1e-3), work / "denoiser.pt", lambda _: "")
    fitted.load_into(nets)
    return fitted


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--vae-steps", type=int, default=2_000)
    parser.add_argument("--denoiser-steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export-only", action="store_true", help="save what the checkpoints hold now")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)

    pool = args.work / f"strokes-{args.images}.pt"
    if not pool.exists():
        images, captions = strokes.draw(args.images, seed=0)
        save_checkpoint(pool, {"images": images, "captions": captions})
    drawn = torch.load(pool, weights_only=True)
    images, captions = drawn["images"], drawn["captions"]
    tokenizer = build_tokenizer(captions, args.work / "tokenizer", TOKENS)
    vae, unet, text = build_vae(), build_unet(), build_text_encoder(tokenizer, 64)
    for net in (vae, unet, text):
        net.to(args.device)

    train_vae(vae, images, 0 if args.export_only else args.vae_steps, args.work, args.device)
    vae.eval()
    latents = cache_latents(vae, images, args.device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor

    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [""])
    steps = 0 if args.export_only else args.denoiser_steps
    fitted = train_denoiser(unet, text, ids, latents, empty, steps, args.batch, args.work, args.device)
    error = unexplained(vae, images[-512:], args.device)
    millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (vae, unet, text)]
    save_pipeline(args.out, vae, unet, text, tokenizer, build_scheduler())
    (args.out / "README.md").write_text(
        CARD.format(
            vae=millions[0],
            unet=millions[1],
            text=millions[2],
            images=args.images,
            vae_steps=args.vae_steps,
            steps=fitted.step,
            batch=args.batch,
            drop=CAPTION_DROP,
            loss=fitted.loss,
            error=error,
        )
    )
    print(f"saved {args.out}", flush=True)


if __name__ == "__main__":
    main()
