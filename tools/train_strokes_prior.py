"""Train the embedded prior on drawn strokes and save it as a ``StableDiffusionPipeline`` folder.

    python tools/train_strokes_prior.py --out stages/assets/strokes32 --work build/strokes32

Three steps, each resumable from ``--work``: draw the images, fit the VAE, fit UNet + text encoder on cached latents
(epsilon prediction, captions dropped for classifier-free guidance, EMA). Runs on CPU or GPU; a second call with more
``--denoiser-steps`` goes on where the first stopped. Weights are stored as fp16 safetensors.
"""

import argparse
import json
import math
import time
from pathlib import Path

import strokes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
CAPTION_DROP = 0.1  # share of captions emptied, for classifier-free guidance
EMA_DECAY = 0.999


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP BPE tokenizer fitted on the captions: whole words for our vocabulary, bytes for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^\sa-z]+"), "removed", invert=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        sorted(set(captions)),
        trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>"),
    )
    learnt = json.loads(raw.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in learnt["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m.split(" ")) for m in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, h, w]`` to three equal channels in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def save_checkpoint(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


@torch.no_grad()
def unexplained(vae: AutoencoderKL, images: torch.Tensor, device: str) -> float:
    """Share of the pixel variance that encoding and decoding loses."""
    x = pixels(images).to(device)
    return (F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample, x) / x.var()).item()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, work: Path, device: str) -> None:
    """L1 + L2 reconstruction and a small KL term, one-cycle Adam; prints held-out pixel error."""
    path, held = work / "vae.pt", images[-512:]
    state = torch.load(path, weights_only=True) if path.exists() else None
    if state:
        vae.load_state_dict(state["model"])
        if state["step"] >= steps:
            return
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    begin = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = state["step"]
    started = time.time()
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        x = pixels(images[torch.randint(len(images) - 512, (96,), generator=generator)]).to(device)
        x = x.to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = F.l1_loss(out, x) + F.mse_loss(out, x) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            error = unexplained(vae, held, device)
            print(
                f"vae {step + 1}/{steps} loss {loss:.4f} held-out unexplained variance {error:.4f} "
                f"{(time.time() - started) / (step + 1 - begin):.2f} s/step",
                flush=True,
            )
            save_checkpoint(
                path,
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                },
            )


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    return torch.cat([vae.encode(pixels(b).to(device)).latent_dist.mean.cpu() for b in images.split(500)])


def train_denoiser(unet, text_encoder, tokens, latents, empty, steps, batch, work, device, log_every=50):
    """Epsilon-matching with a warm-up + cosine schedule over ``steps``; returns (EMA weights, step, running loss)."""
    path, nets = work / "denoiser.pt", {"unet": unet, "text": text_encoder}
    parameters = [p for net in nets.values() for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    ema = {k: {n: v.detach().clone() for n, v in net.state_dict().items()} for k, net in nets.items()}
    scheduler, begin, running = build_scheduler(), 0, None
    if path.exists():
        state = torch.load(path, weights_only=True)
        for key, net in nets.items():
            net.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        ema, begin, running = state["ema"], state["step"], state.get("loss")
    started = time.time()
    for step in range(begin, steps):
        for group in optimizer.param_groups:
            warm, done = min(1.0, (step + 1) / 200), step / steps
            group["lr"] = 1e-3 * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        generator = torch.Generator().manual_seed(1_000_000 + step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        z, t = latents[rows].to(device), torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(z.shape, generator=generator).to(device)
        ids = torch.where(torch.rand(batch, 1, generator=generator) < CAPTION_DROP, empty, tokens[rows])
        t = t.to(device)
        prediction = unet(scheduler.add_noise(z, noise, t), t, text_encoder(ids.to(device))[0]).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for key, net in nets.items():
            for name, value in net.state_dict().items():
                if value.is_floating_point():
                    ema[key][name].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % log_every == 0 or step + 1 == steps:
            print(
                f"denoiser {step + 1}/{steps} loss {running:.4f} "
                f"{(time.time() - started) / (step + 1 - begin):.2f} s/step",
                flush=True,
            )
        if (step + 1) % (5 * log_every) == 0 or step + 1 == steps:
            save_checkpoint(
                path,
                {
                    "unet": unet.state_dict(),
                    "text": text_encoder.state_dict(),
                    "ema": ema,
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "loss": running,
                },
            )
    return ema, max(begin, steps), running or math.nan


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
    tokenizer = build_tokenizer(captions, args.work / "tokenizer")
    vae, unet, text = build_vae(), build_unet(), build_text_encoder(tokenizer)
    for net in (vae, unet, text):
        net.to(args.device)

    train_vae(vae, images, 0 if args.export_only else args.vae_steps, args.work, args.device)
    vae.eval()
    latents = cache_latents(vae, images, args.device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor

    def encode(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids

    steps = 0 if args.export_only else args.denoiser_steps
    ema, done, loss = train_denoiser(
        unet, text, encode(captions), latents, encode([""]), steps, args.batch, args.work, args.device
    )
    error = unexplained(vae, images[-512:], args.device)
    millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (vae, unet, text)]
    unet.load_state_dict(ema["unet"])
    text.load_state_dict(ema["text"])
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        unet=unet.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.out, safe_serialization=True)
    (args.out / "README.md").write_text(
        CARD.format(
            vae=millions[0],
            unet=millions[1],
            text=millions[2],
            images=args.images,
            vae_steps=args.vae_steps,
            steps=done,
            batch=args.batch,
            drop=CAPTION_DROP,
            loss=loss,
            error=error,
        )
    )
    print(f"saved {args.out}", flush=True)


if __name__ == "__main__":
    main()
