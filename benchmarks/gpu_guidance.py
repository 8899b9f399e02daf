"""Guided against unguided sampling on a GPU, with networks of the true shapes of Stable Diffusion 1.5 and DiT-XL/2.

    python benchmarks/gpu_guidance.py --peak 989 [--shapes sd15 dit] [--batch 16] [--json gpu.json]
    python benchmarks/gpu_guidance.py --tiny --device cpu        # the same code on small networks, without a GPU

Weights are random (they do not matter for time), saved to a temporary folder and loaded like any prior, so this runs
what a user runs: bf16, channels_last, fused attention, CFG in one batch, the default guidance. Prints images a second
from the first latent to the final image, peak memory, the share of the GPU's dense bf16 peak (``--peak``, TFLOP/s; work
as counted by ``--dry-run``), and how often a group makes the host wait for the GPU, the loading of its noise and this
script's own look at its images included. "Of unguided" is beside unguided sampling in 50 steps, where that was chosen.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from counted_work import DIT, SD15, TEACHER, VAE, settings, write_prior
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, UNet2DConditionModel
from guidance_cost import published
from transformers import CLIPTextConfig, CLIPTextModel

from stages.cost import synth_cost
from stages.models.build import build_net
from stages.models.loading import save_model
from stages.models.source import ModelConfig
from stages.settings import SynthSettings
from stages.synth.group import make_group
from stages.synth.sampler import Counters, diffdfkd, dmkd
from stages.synth.worker import load_models

FEW = {"steps": 20}
LATE = {"interval": [0.6, 1.0]}  # 8 of 20 steps
BASE = "unguided, 50 steps"
PUBLISHED = "published, 50 steps, one image at a time"
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the prior, of guidance (None: unguided)
    BASE: ({}, None),
    "unguided, 20 steps": (FEW, None),
    PUBLISHED: ({}, {"decoder": "full", "gradient_at": "xt", "normalize": "none", "step_size": 1e-3}),
    "full VAE, 50 steps guided": ({}, {"decoder": "full"}),
    "tiny decoder, 50 steps guided": ({}, {"decoder": "tiny"}),
    "fitted decoder, 50 steps guided": ({}, {"decoder": "fitted"}),
    "fitted decoder, 20 steps guided (the defaults)": (FEW, {"decoder": "fitted"}),
    "fitted decoder, 8 of 20 steps guided": (FEW, {"decoder": "fitted", **LATE}),
    "fitted decoder, 8 of 20 steps guided, CFG on half": (
        FEW | {"cfg_interval": [0.5, 1.0]},
        {"decoder": "fitted", **LATE},
    ),
}
NETWORKS = {"unet": UNet2DConditionModel, "transformer": DiTTransformer2DModel, "vae": AutoencoderKL}
SMALL = {
    "VAE": {"block_out_channels": [32, 32, 32, 32]},
    "SD15": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 8},
    "DIT": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8},
}


def save_random(folder: Path, pipeline: str, parts: dict[str, dict[str, Any]]) -> Path:
    """A prior of these configs with random bf16 weights."""
    torch.manual_seed(0)
    write_prior(folder, pipeline, parts)
    for name in parts:
        config = NETWORKS[name].load_config(str(folder), subfolder=name)
        NETWORKS[name].from_config(config).to(torch.bfloat16).save_pretrained(folder / name)
    if (folder / "text_encoder").is_dir():
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        text.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    return folder


def save_teacher(folder: Path) -> Path:
    values = {name: value for name, value in TEACHER.items() if name not in ("name", "weights")}
    config = ModelConfig(architecture=TEACHER["name"], channels=3, **values)
    save_model(folder, build_net(config), config)
    return folder


def timed(chosen: SynthSettings, rounds: int, peak: float, as_published: bool) -> dict[str, float | None]:
    """Images a second of the fastest of ``rounds`` groups, after one that warms up."""
    started = time.perf_counter()
    models, gpu = load_models(chosen), chosen.device.startswith("cuda")
    loading = time.perf_counter() - started
    method = dmkd if chosen.method == "dmkd" else diffdfkd

    def sample(index: int) -> float:
        group = make_group(chosen, index, models.teacher.class_names)
        images, started = 1 if as_published else chosen.group_size, time.perf_counter()
        if as_published:
            published(models, group, chosen, images)
        else:
            for frame in method(models, group, chosen, Counters()):
                float(frame.images.sum())  # wait for the GPU
        if gpu:
            torch.cuda.synchronize()
        return images / (time.perf_counter() - started)

    sample(0)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    rate = max(sample(i) for i in range(1, rounds + 1))
    work = counted(chosen, as_published)
    return {
        "images_per_s": rate,
        "tflop_per_image": work / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "share_of_peak": rate * work / (peak * 1e12) if gpu else None,
        "waits": waits(sample) if gpu and not as_published else None,
        "loading_s": loading,
    }


def counted(chosen: SynthSettings, as_published: bool) -> float:
    """FLOPs of an image. The published code evaluates the denoiser again after every update: forwards, as unguided."""
    ours = synth_cost(chosen.model_copy(update={"device": "cpu"}))
    free = synth_cost(chosen.model_copy(update={"device": "cpu", "method": "dmkd"}))
    return ours.flop_per_trajectory + free.denoiser * as_published


def waits(sample: Any) -> int:
    """How often one group makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sample(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["sd15", "dit"], default=["sd15", "dit"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--batch", type=int, default=16, help="trajectories of a group")
    parser.add_argument("--steps", type=int, help="in every row, to try the script itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the GPU; an H100's by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    vae, sd15, dit = ({**c, **(SMALL[n] if args.tiny else {})} for n, c in (("VAE", VAE), ("SD15", SD15), ("DIT", DIT)))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        AutoencoderTiny().to(torch.bfloat16).save_pretrained(folder / "taesd")
        teacher = {"name": str(save_teacher(folder / "teacher"))}
        kinds = {"sd15": ("StableDiffusionPipeline", {"unet": sd15}), "dit": ("DiTPipeline", {"transformer": dit})}
        for shape in args.shapes:
            pipeline, parts = kinds[shape]
            path = save_random(folder / shape, pipeline, parts | {"vae": vae})
            prior = {"path": str(path)}
            prior |= {"labels": {name: i for i, name in enumerate(TEACHER["class_names"])}} if shape == "dit" else {}
            print(f"\n| {shape}, groups of {args.batch} | images / s | of unguided | peak GiB | of peak | waits |")
            print("|---|---|---|---|---|---|")
            for name in sorted(args.rows, key=lambda row: row != BASE):  # the others are divided by it
                sampled, guidance = ROWS[name]
                tiny = {"tiny_decoder": str(folder / "taesd")} if (guidance or {}).get("decoder") == "tiny" else {}
                more = {"device": args.device, "group_size": args.batch, "teacher": teacher}
                more |= {"method": "dmkd"} if guidance is None else {}
                steps = {"steps": args.steps} if args.steps else {}
                chosen = settings({"scheduler": "ddim"} | prior | sampled | steps, (guidance or {}) | tiny, **more)
                made = timed(chosen, args.rounds, args.peak, name == PUBLISHED)
                found.setdefault(shape, {})[name] = made
                base = found[shape].get(BASE)
                beside = made["images_per_s"] / base["images_per_s"] if base else None
                text = f"| {name} | {made['images_per_s']:.2f} "
                shown = [("{:.2f}", beside), ("{:.1f}", made["peak_gib"]), ("{:.1%}", made["share_of_peak"])]
                for form, value in (*shown, ("{}", made["waits"])):
                    text += "| – " if value is None else f"| {form.format(value)} "
                print(text + "|", flush=True)
                if args.json:  # after every row, so that a run cut off keeps what it measured
                    args.json.write_text(
                        json.dumps({"device": args.device, "batch": args.batch, "rows": found}, indent=1)
                    )


if __name__ == "__main__":
    main()
