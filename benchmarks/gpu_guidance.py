"""Guided against unguided sampling on a GPU, with networks of the true shapes of Stable Diffusion 1.5 and DiT-XL/2.

    python benchmarks/gpu_guidance.py --json gpu.json                # eight minutes; the same again continues
    python benchmarks/gpu_guidance.py --json gpu.json --checksums    # two runs of the same groups, compared by checksum
    python benchmarks/gpu_guidance.py --tiny --device cpu            # the same code on small networks, without a GPU

Weights are random (they do not matter for time), saved to a temporary folder and loaded like any prior, so this runs
what a user runs: bf16, CFG in one batch, the default guidance, deterministic kernels. Prints images a second from the
first latent to the final image, peak memory, the share of the GPU's dense bf16 peak (``--peak``, TFLOP/s; work as
counted by ``--dry-run``), and how often a group makes the host wait for the GPU, the loading of its noise and this
script's own look at its images included. "Of unguided" is beside unguided sampling in 50 steps with as many images at
once, where that was measured. ``--json`` is written after every row, and rows in it are passed over; figures of another
GPU or version of PyTorch are refused. No row begins after ``--minutes``.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from counted_work import DISTILLED, DIT, SD15, TEACHER, VAE, settings, write_prior
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, UNet2DConditionModel
from guidance_cost import published
from transformers import CLIPTextConfig, CLIPTextModel

from stages.cost import synth_cost
from stages.memory import Repeatable, free_memory, out_of_memory
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
DEFAULTS = "guided, 20 steps (the defaults)"
FEW_STEPS = "distilled, 4 steps, guided"
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    # settings of the prior, of guidance (None: unguided), decoder of stored images; "fitted" unless guidance says so
    BASE: ({}, None, "full"),
    PUBLISHED: ({}, {"decoder": "full", "gradient_at": "xt", "normalize": "none", "step_size": 1e-3}, "full"),
    "guided, 50 steps": ({}, {}, "full"),
    DEFAULTS: (FEW, {}, "full"),
    FEW_STEPS: (DISTILLED, {}, "full"),
    "distilled, 4 steps, guided, stored by a tiny decoder": (DISTILLED, {}, "tiny"),
    "unguided, 20 steps": (FEW, None, "full"),
    "guided by the full VAE, 50 steps": ({}, {"decoder": "full"}, "full"),
    "guided by a tiny decoder, 50 steps": ({}, {"decoder": "tiny"}, "full"),
    "guided, 8 of 20 steps": (FEW, LATE, "full"),
    "guided, 8 of 20 steps, CFG on half": (FEW | {"cfg_interval": [0.5, 1.0]}, LATE, "full"),
}
SHORT = list(ROWS)[:6]
REPEATED = [DEFAULTS, "guided by the full VAE, 50 steps", FEW_STEPS]  # what --checksums compares


class Case(NamedTuple):
    """A row of one shape with so many images at once."""

    shape: str
    row: str
    batch: int
    compile: bool

    @property
    def label(self) -> str:
        return f"{self.row}, {self.batch} at once{', compiled' * self.compile}"


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


def timed(chosen: SynthSettings, rounds: int, peak: float, as_published: bool) -> dict[str, Any]:
    """Images a second of the fastest of ``rounds`` groups, after one that warms up."""
    started = time.perf_counter()
    repeatable, gpu = Repeatable(chosen.device), chosen.device.startswith("cuda")
    models = repeatable(lambda: load_models(chosen))
    loading = time.perf_counter() - started
    method = dmkd if chosen.method == "dmkd" else diffdfkd

    def sample(index: int) -> float:
        return repeatable(lambda: sampled(index))

    def sampled(index: int) -> float:
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
        "batch": chosen.group_size,
        "images_per_s": rate,
        "tflop_per_image": work / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "share_of_peak": rate * work / (peak * 1e12) if gpu else None,
        "waits": waits(sample) if gpu and not as_published else None,
        "deterministic": repeatable.strict,
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


def checksums(chosen: SynthSettings) -> dict[str, Any]:
    """A group made twice, by models loaded anew: the sha256 of its images each time."""
    repeatable, found = Repeatable(chosen.device), []
    for _ in range(2):
        models = repeatable(lambda: load_models(chosen))
        group = make_group(chosen, 0, models.teacher.class_names)
        *_, frame = repeatable(lambda: list(diffdfkd(models, group, chosen, Counters())))  # noqa: B023
        found.append(hashlib.sha256(frame.images.float().cpu().numpy().tobytes()).hexdigest())
    return {"sha256": found, "equal": found[0] == found[1], "deterministic": repeatable.strict}


def measured(path: Path | None, machine: dict[str, str]) -> dict[str, Any]:
    """What ``path`` holds already. Ends the script where that was measured elsewhere."""
    if path is None or not path.exists():
        return {"machine": machine, "rows": {}, "checksums": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["machine"] != machine:
        sys.exit(f"{path} was measured on {found['machine']}, this is {machine}: use another --json")
    return found


def line(made: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The cells of a table's row beside its name."""
    if "out_of_memory" in made:
        return "| out of memory | – | – | – | – |"
    beside = made["images_per_s"] / base["images_per_s"] if base and "images_per_s" in base else None
    shown = [("{:.2f}", made["images_per_s"]), ("{:.2f}", beside), ("{:.1f}", made["peak_gib"])]
    shown += [("{:.1%}", made["share_of_peak"]), ("{}", made["waits"])]
    return "".join("| – " if value is None else f"| {form.format(value)} " for form, value in shown) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["sd15", "dit"], default=["sd15"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=SHORT)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="trajectories of a group")
    parser.add_argument("--compile", choices=["off", "on", "both"], default="both")
    parser.add_argument("--checksums", action="store_true", help="compare two runs in place of measuring")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="in every row, to try the script itself")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the GPU; an H100's and H200's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started, gpu = time.monotonic(), args.device.startswith("cuda")
    name = torch.cuda.get_device_name() if gpu else "cpu"
    found = measured(args.json, {"device": name, "torch": torch.__version__})
    vae, sd15, dit = ({**c, **(SMALL[n] if args.tiny else {})} for n, c in (("VAE", VAE), ("SD15", SD15), ("DIT", DIT)))
    kinds = {"sd15": ("StableDiffusionPipeline", {"unet": sd15}), "dit": ("DiTPipeline", {"transformer": dit})}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        AutoencoderTiny().to(torch.bfloat16).save_pretrained(folder / "taesd")
        teacher = {"name": str(save_teacher(folder / "teacher"))}
        priors: dict[str, dict[str, Any]] = {}
        for shape in args.shapes:
            pipeline, parts = kinds[shape]
            priors[shape] = {"path": str(save_random(folder / shape, pipeline, parts | {"vae": vae}))}
        if "dit" in priors:
            priors["dit"]["labels"] = {name: i for i, name in enumerate(TEACHER["class_names"])}

        def settings_of(case: Case) -> SynthSettings:
            prior, guidance, stored = ROWS[case.row]
            steered = {"decoder": "fitted"} | (guidance or {})
            images = {"decoder": stored}
            if "tiny" in (steered["decoder"], stored):
                steered["tiny_decoder"] = str(folder / "taesd")
            more = {"device": args.device, "group_size": case.batch, "teacher": teacher, "images": images}
            more |= {"method": "dmkd"} if guidance is None else {}
            sampled = {"scheduler": "ddim", "compile": case.compile} | priors[case.shape] | prior
            return settings(sampled | ({"steps": args.steps} if args.steps else {}), steered, **more)

        def keep(kind: str, case: Case, made: dict[str, Any]) -> None:
            found[kind].setdefault(case.shape, {})[case.label] = made
            if args.json:
                aside = args.json.with_suffix(".part")
                aside.write_text(json.dumps(found, indent=1))
                aside.replace(args.json)

        for case in cases(args):
            kind = "checksums" if args.checksums else "rows"
            if case.label in found[kind].get(case.shape, {}):
                continue
            if time.monotonic() - started > 60 * args.minutes:
                print(f"{args.minutes:g} minutes are over: the same command measures what is left", file=sys.stderr)
                break
            try:
                if args.checksums:
                    made = checksums(settings_of(case))
                else:
                    made = timed(settings_of(case), args.rounds, args.peak, case.row == PUBLISHED)
            except RuntimeError as error:
                if args.checksums or not out_of_memory(error):
                    raise
                made = {"batch": case.batch, "out_of_memory": True}
            free_memory()
            keep(kind, case, made)
            print(f"{case.shape}: {case.label}: {made}", file=sys.stderr, flush=True)
    for shape, made in found["checksums"].items():
        for label, pair in made.items():
            print(f"{shape}, {label}: {'equal' if pair['equal'] else 'NOT EQUAL'} ({pair['sha256'][0][:12]} …)")
    for shape, rows in found["rows"].items():
        print(f"\n| {shape}, torch {torch.__version__} | images / s | of unguided | peak GiB | of peak | waits |")
        print("|---|---|---|---|---|---|")
        for label, made in rows.items():
            base = rows.get(Case(shape, BASE, made["batch"], False).label)
            print(f"| {label} {line(made, base)}")


def cases(args: argparse.Namespace) -> list[Case]:
    """What is asked for, the rows that others are compared with first."""
    compiled = {"off": [False], "on": [True], "both": [False, True]}[args.compile]
    if args.checksums:
        return [Case(shape, row, args.batch[0], False) for shape in args.shapes for row in REPEATED]
    asked = [Case(*each) for each in product(args.shapes, args.rows, args.batch, compiled)]
    once = [case for case in asked if case.row != PUBLISHED or (case.batch == args.batch[0] and not case.compile)]
    return sorted(once, key=lambda case: (case.compile, args.batch.index(case.batch), case.row != BASE))


if __name__ == "__main__":
    main()
