"""Counted work of stage 1 on priors of their true shapes: FLOPs and saved activations per image, no GPU needed.

    python benchmarks/counted_work.py [--json counted.json]

Stable Diffusion 1.5 (512 px) and DiT-XL/2 (256 px) are built on the meta device from the configs below, with a
ResNet-34 teacher at 224 px; "default settings" name prior and teacher alone. Every row but "published" is the cost of
our own settings (stages/cost.py, tested equal to FLOPs counted while really sampling). One image is stored for
each trajectory. No weights are needed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import AutoencoderTiny, DDIMScheduler
from diffusers.utils.logging import set_verbosity_error
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.recipe import resolve
from stages.cost import SynthCost, synth_cost
from stages.settings import SynthSettings

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
TEACHER = {
    "name": "resnet34",
    "weights": "not-read.safetensors",
    "num_classes": 10,
    "class_names": [f"class {i}" for i in range(10)],
    "input": {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
FEW = {"steps": 20, "scheduler": "dpmsolver++"}
LATE = {"interval": [0.6, 1.0]}  # 8 of 20 steps
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gradient through the denoiser, full VAE, 50 steps", {}, {"gradient_at": "xt"}),
    ("gradient at ẑ0, full VAE, 50 steps", {}, {}),
    ("gradient at ẑ0, full VAE, every 5th of 50", {}, {"every": 5}),
    ("gradient at ẑ0, tiny decoder, 50 steps", {}, {"decoder": "tiny"}),
    ("gradient at ẑ0, fitted decoder, 50 steps", {}, {"decoder": "fitted"}),
    ("fitted decoder, 20 of 20 steps guided", FEW, {"decoder": "fitted"}),
    ("fitted decoder, 8 of 20 steps guided", FEW, {"decoder": "fitted", **LATE}),
    ("tiny decoder, 8 of 20 steps guided", FEW, {"decoder": "tiny", **LATE}),
    (
        "tiny decoder, 8 of 20 steps guided, CFG on half",
        FEW | {"cfg_interval": [0.5, 1.0]},
        {"decoder": "tiny", **LATE},
    ),
]


def write_prior(folder: Path, pipeline: str, parts: dict[str, dict[str, Any]]) -> Path:
    """A pipeline folder of configs alone; text comes with CLIP's encoder and a tokenizer of its length."""
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, config in parts.items():
        index[name] = ["diffusers", config["_class_name"]]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    if "unet" in parts:
        text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        text.save_pretrained(folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
        (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
        CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77).save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def settings(prior: dict[str, Any], guidance: dict[str, Any], **more: Any) -> SynthSettings:
    """A row's settings, where nothing that costs work is left to the defaults."""
    sampled = {"scheduler": "ddim", "steps": 50, "cfg_scale": 3.0, "dtype": "bf16"} | prior
    steered = {"decoder": "full", "interval": [0.0, 1.0], "every": 1} | guidance
    return SynthSettings.model_validate({"prior": sampled, "guidance": steered, "teacher": TEACHER} | more)


def defaults(prior: dict[str, Any]) -> SynthSettings:
    """What a user gets who names a prior and a teacher and nothing else."""
    return SynthSettings.model_validate({"prior": prior, "teacher": TEACHER})


def recipe(name: str, prior: dict[str, Any], tiny: str) -> SynthSettings:
    """A packaged recipe over another copy of its prior, with its own teacher."""
    sets = [f"synth.prior.path={prior['path']}", "synth.prior.variant=null", "synth.teacher.weights=not-read"]
    return resolve(name, sets=[*sets, f"synth.guidance.tiny_decoder={tiny}"], environ={}).synth


def rows(prior: dict[str, Any], tiny: str) -> Iterator[tuple[str, float, float, SynthCost | None]]:
    """(row, FLOPs of a trajectory with its one image, saved bytes, cost by purpose)."""
    free = synth_cost(settings(prior, {}, method="dmkd"))
    through = synth_cost(settings(prior, {"gradient_at": "xt"}))
    yield "unguided, 50 steps", free.flop_per_trajectory, 0, free
    # The published code evaluates the denoiser a second time after every update, which ours does not.
    yield (
        "published: as below, and eps computed twice",
        through.flop_per_trajectory + free.denoiser,
        through.saved_bytes_per_trajectory,
        None,
    )
    for name, sampled, guidance in ROWS:
        chosen = guidance | ({"tiny_decoder": tiny} if guidance.get("decoder") == "tiny" else {})
        cost = synth_cost(settings(prior | sampled, chosen))
        yield name, cost.flop_per_trajectory, cost.saved_bytes_per_trajectory, cost
    chosen = {"default settings": defaults(prior)}
    if "labels" not in prior:
        chosen["recipe diffdfkd-cifar10-fast, its teacher at 32 px"] = recipe("diffdfkd-cifar10-fast", prior, tiny)
    for name, asked in chosen.items():
        cost = synth_cost(asked)
        yield name, cost.flop_per_trajectory, cost.saved_bytes_per_trajectory, cost


def table(title: str, found: list[tuple[str, float, float, SynthCost | None]]) -> None:
    unguided = found[0][1]
    print(f"\n| {title} | TFLOP / image | × unguided | saved activations, GiB / image |")
    print("|---|---|---|---|")
    for name, count, saved, _ in found:
        print(f"| {name} | {count / 1e12:.1f} | {count / unguided:.2f} | {saved / 2**30:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_verbosity_error()  # it takes some of its own configs for unexpected
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        AutoencoderTiny().save_config(folder / "taesd")
        text = write_prior(folder / "sd15", "StableDiffusionPipeline", {"unet": SD15, "vae": VAE})
        classes = write_prior(folder / "dit", "DiTPipeline", {"transformer": DIT, "vae": VAE})
        labels = {name: i for i, name in enumerate(TEACHER["class_names"])}
        tables = {
            "Stable Diffusion 1.5, 512 px": list(rows({"path": str(text)}, str(folder / "taesd"))),
            "DiT-XL/2, 256 px": list(rows({"path": str(classes), "labels": labels}, str(folder / "taesd"))),
        }
    for title, found in tables.items():
        table(title, found)
    if arguments.json:
        keys = ("row", "flop", "saved_bytes")
        dumped = {title: [dict(zip(keys, row[:3], strict=True)) for row in found] for title, found in tables.items()}
        arguments.json.write_text(json.dumps(dumped, indent=1))


if __name__ == "__main__":
    main()
