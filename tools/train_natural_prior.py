"""Train a small natural-image prior on 32×32 photographs and save it as a ``StableDiffusionPipeline`` folder.

    python tools/train_natural_prior.py --images tinyimagenet32-train.parquet --classes tinyimagenet32-classes.json \
        --out priors/natural32 --work build/natural32

Three phases, resumable from ``--work``, first and last within a budget of minutes (all its runs together): the VAE
(12×8×8 latents), the latents of every image and its mirror image, then UNet + text encoder (v-prediction on a cosine
schedule, captions dropped for classifier-free guidance). Both keep averaged weights. On a GPU: ``--batch 1024
--vae-batch 256 --vae-minutes 1 --denoiser-minutes 4``. ``--export-only`` saves what the checkpoints hold.
"""

import argparse
import hashlib
import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import natural_groups
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from patch_codec import CHANNELS, PATCH, PatchPCA, build_codec, unexplained
from PIL import Image
from prior_training import (
    CAPTION_DROP,
    Budget,
    Fitted,
    Recipe,
    averaged,
    build_text_encoder,
    build_tokenizer,
    fit,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
    token_ids,
)
from torch import Tensor
from torchvision.utils import save_image

SIZE = 32
TOKENS, TEXT_WIDTH = 16, 128
HELD_OUT = 2_000
ANCHOR = 0.01  # weight beside the share of the pixel variance that reconstruction loses
SHOWN = ("tabby", "german shepherd", "goose", "bullfrog", "sports car", "school bus", "lifeboat", "seashore")


@dataclass
class Pool:
    """uint8 images ``[n, 3, 32, 32]``, shuffled once, with labels; the last ``HELD_OUT`` are never trained on."""

    images: Tensor
    labels: Tensor
    names: list[str]


def load_pool(source: Path, classes: Path, last: int = 0) -> Pool:
    """A parquet file (``jpg`` bytes, ``label``), or a folder with one sub-folder a class, named as ``classes`` says;
    all images, or only the ``last`` ones of the shuffled order."""
    names = [entry["name"] for entry in json.loads(classes.read_text())]
    if source.is_dir():
        files = sorted(f for f in source.glob("*/*") if f.is_file())
        labels, read = [names.index(f.parent.name) for f in files], lambda row: files[row].read_bytes()
    else:
        table = pq.read_table(source, columns=["jpg", "label"])
        labels, read = table["label"].to_pylist(), lambda row: table["jpg"][row].as_py()
    order = np.random.default_rng(0).permutation(len(labels))[-last:]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as workers:
        opened = list(workers.map(small_image, [read(int(row)) for row in order], chunksize=500))
    images = torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).contiguous()
    return Pool(images, torch.tensor(labels)[order], names)


def small_image(data: bytes) -> np.ndarray:
    """uint8 ``[32, 32, 3]``."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE)))


def pixels(images: Tensor, device: str) -> Tensor:
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def build_unet(channels: list[int]) -> UNet2DConditionModel:
    """Plain blocks, attention (self and cross) at 4×4; the caption also reaches every block beside the time."""
    return UNet2DConditionModel(
        sample_size=SIZE // PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler() -> DDIMScheduler:
    """Cosine: small latents need less noise than the schedule of Stable Diffusion gives (Hoogeboom et al. 2023)."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,  # unused by trailing steps; Stable Diffusion's pipeline asks for it
    )


def train_vae(pool: Pool, budget: Budget, args: argparse.Namespace) -> tuple[AutoencoderDC, Fitted, PatchPCA]:
    """Reconstruction, from the patch PCA on, with latents held near its codes (so their spectrum stays that of images).

    In fp32: what is left of the error is below bf16's.
    """
    train, device = pool.images[:-HELD_OUT].to(args.device), args.device
    some = pixels(train[:20_000], "cpu")
    pca, variance = PatchPCA.fit(some), some.var().item()
    codec = build_codec(pca, *args.vae_widths).to(device, memory_format=torch.channels_last)
    held = pixels(pool.images[-HELD_OUT:][:500], device)

    def loss_of(generator: torch.Generator) -> Tensor:
        x = pixels(train[torch.randint(len(train), (args.vae_batch,), generator=generator, device=device)], device)
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5, x, x.flip(-1))
        z = codec.encode(x).latent
        return F.mse_loss(codec.decode(z).sample, x) / variance + ANCHOR * F.mse_loss(z, pca.codes(x))

    def report(fitted: Fitted) -> str:
        with averaged({"vae": codec}, fitted):
            return f"held-out unexplained {unexplained(codec, held):.5f} (PCA {pca.unexplained:.5f})"

    recipe = Recipe(lr=1e-3, weight_decay=1e-4)
    fitted = fit({"vae": codec}, loss_of, budget, recipe, args.work / "vae.pt", report, args.log_seconds, device)
    fitted.load_into({"vae": codec})
    return codec, fitted, pca


def refusal(work: Path, budget: Budget) -> str | None:
    """Why the denoiser begun in ``work`` cannot go on: ``vae.pt`` is not the one it learned, or would not stay it."""
    vae, denoiser = (load_checkpoint(work / name) for name in ("vae.pt", "denoiser.pt"))
    if not denoiser:
        return None
    step = vae.get("step", 0)
    begun = denoiser.get("vae_step", step)
    line = f"--work {work}: denoiser.pt was begun on step {begun} of the VAE"
    if step != begun:
        return f"{line}, vae.pt holds step {step}: delete denoiser.pt to begin it again"
    if budget.progress(step, vae.get("seconds", 0.0)) < 1:
        return f"{line}, --vae-minutes {budget.minutes:g} would train that on: give fewer, or delete denoiser.pt"
    return None


@torch.no_grad()
def cache_latents(
    vae: AutoencoderDC, images: Tensor, path: Path, source: dict[str, Any], device: str, keep: bool
) -> Tensor:
    """fp16 ``[n, 2, 12, 8, 8]``: every image and its mirror image.

    Those at ``path`` where they have this ``source`` (the VAE's step, the images' checksum); else made, and kept there
    if ``keep``.
    """
    found = load_checkpoint(path)
    if any(found.get(key) != value for key, value in source.items()):
        pairs = (torch.stack([part, part.flip(-1)], 1).flatten(0, 1) for part in images.split(125))
        made = [vae.encode(pixels(pair, device)).latent.half().unflatten(0, (-1, 2)) for pair in pairs]
        found = source | {"latents": torch.cat(made)}
        if keep:
            save_checkpoint(path, found)
    return found["latents"].to(device)


@torch.no_grad()
def sample(unet, text, vae, ids: Tensor, empty: Tensor, device: str, cfg: float = 2.0, steps: int = 25) -> Tensor:
    """Images in [0, 1], plain DDIM."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    hidden = text(torch.cat([empty.expand_as(ids), ids.to(device)]))[0]
    z = torch.randn(len(ids), CHANNELS, *(SIZE // PATCH,) * 2, generator=torch.Generator().manual_seed(0)).to(device)
    for time in scheduler.timesteps:
        negative, positive = unet(torch.cat([z, z]), time, hidden).sample.chunk(2)
        z = scheduler.step(negative + cfg * (positive - negative), time, z).prev_sample
    return (vae.decode(z / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)


def train_denoiser(nets, vae, vae_step: int, latents: Tensor, pool: Pool, tokenizer, budget: Budget, args) -> Fitted:
    """Mean squared error of v (Salimans & Ho 2022), uniform times; reports held-out loss and draws a grid."""
    unet, text, device, scheduler = nets["unet"], nets["text"], args.device, build_scheduler()
    alphas, empty = scheduler.alphas_cumprod.to(device), token_ids(tokenizer, [""]).to(device)
    labels = pool.labels.to(device)
    texts = [natural_groups.captions(name) for name in pool.names]
    longest = max(map(len, texts))  # every class gets as many rows, so that a row is one draw
    captions = torch.stack([token_ids(tokenizer, (t * longest)[:longest]) for t in texts]).to(device)

    def loss_on(rows: Tensor, generator: torch.Generator, drop: float) -> Tensor:
        n, draws = len(rows), {"generator": generator, "device": device}
        t = torch.randint(1000, (n,), **draws)
        ids = captions[labels[rows], torch.randint(longest, (n,), **draws)]
        ids = torch.where(torch.rand(n, 1, **draws) < drop, empty, ids)
        z = latents[rows, torch.randint(2, (n,), **draws)].float() * vae.config.scaling_factor
        noise = torch.randn(z.shape, **draws)
        alpha, sigma = (a[t, None, None, None] for a in (alphas**0.5, (1 - alphas) ** 0.5))
        noisy = (alpha * z + sigma * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.bf16):
            v = unet(noisy, t, text(ids)[0]).sample.float()
        return F.mse_loss(v, alpha * noise - sigma * z)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents) - HELD_OUT, (args.batch,), generator=generator, device=device)
        return loss_on(rows, generator, CAPTION_DROP)

    def report(fitted: Fitted) -> str:
        ids = token_ids(tokenizer, [name for name in SHOWN for _ in range(4)])
        held = torch.arange(len(latents) - HELD_OUT, len(latents), device=device)[:1000]
        with averaged(nets, fitted), torch.no_grad():
            save_image(sample(unet, text, vae, ids, empty, device), args.work / f"samples-{fitted.step:07d}.png")
            return f"held-out {loss_on(held, torch.Generator(device).manual_seed(0), 0.0):.4f}"

    recipe = Recipe(lr=args.lr, warmup=500, ema=0.9995 if args.batch > 256 else 0.999)
    path, more = args.work / "denoiser.pt", {"vae_step": vae_step}
    return fit(nets, loss_of, budget, recipe, path, report, 3 * args.log_seconds, device, more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="parquet (jpg, label) or folder of class folders")
    parser.add_argument("--classes", type=Path, required=True, help="JSON list of {name}, in label order")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--denoiser-minutes", type=float, default=90)
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 160])
    parser.add_argument("--vae-widths", type=int, nargs=2, default=[32, 40], help="encoder and decoder")
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export-only", action="store_true", help="save what the checkpoints hold now")
    args = parser.parse_args()
    budgets = [Budget(minutes=0 if args.export_only else m) for m in (args.vae_minutes, args.denoiser_minutes)]
    if refused := refusal(args.work, budgets[0]):
        parser.error(refused)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)

    pool = load_pool(args.images, args.classes)
    texts = sorted({caption for name in pool.names for caption in natural_groups.captions(name)})
    tokenizer = build_tokenizer(texts, args.work / "tokenizer", TOKENS)
    text = build_text_encoder(tokenizer, TEXT_WIDTH).to(args.device)
    unet = build_unet(args.channels).to(args.device, memory_format=torch.channels_last)

    vae, coded, pca = train_vae(pool, budgets[0], args)
    source = {"vae_step": coded.step, "images": hashlib.sha256(pool.images.numpy()).hexdigest()}
    path, keep = args.work / "latents.pt", not args.export_only
    latents = cache_latents(vae, pool.images, path, source, args.device, keep)
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    nets = {"unet": unet, "text": text}
    drawn = train_denoiser(nets, vae, coded.step, latents, pool, tokenizer, budgets[1], args)
    drawn.load_into(nets)
    error = unexplained(vae, pixels(pool.images[-HELD_OUT:], args.device))
    save_pipeline(args.out, vae, unet, text, tokenizer, build_scheduler())
    facts = {
        "parameters": {k: sum(p.numel() for p in n.parameters()) for k, n in (("vae", vae), *nets.items())},
        "images": len(latents) - HELD_OUT,
        "vae": {"steps": coded.step, "seconds": round(coded.seconds), "held_out_unexplained": round(error, 5)},
        "pca_unexplained": round(pca.unexplained, 5),
        "denoiser": {"steps": drawn.step, "seconds": round(drawn.seconds), "samples": drawn.step * args.batch},
        "loss": round(drawn.loss, 4),
        "device": args.device,
    }
    (args.work / "facts.json").write_text(json.dumps(facts, indent=1))
    print(f"saved {args.out}: {json.dumps(facts)}", flush=True)


if __name__ == "__main__":
    main()
