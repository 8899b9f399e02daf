"""Does every family of timm load as timm's own ``save_for_hf`` writes it, and answer the same?

    python benchmarks/sweep_timm.py --json FILE [--families resnet,vision_transformer]

One line a family (a module of timm): its smallest member with a classifier of 7 classes and random weights, saved by
timm, loaded as ``timm:FOLDER``. ``equal``: largest difference of a logit on random images at most 1e-5, relative to the
largest logit (or 1). ``pixels``: largest difference of a normalized pixel from ``create_transform`` of timm's own data
config, in 1/255, over pictures of several shapes (None: no rule expresses it, and the input was given).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from manifests.errors import FactoryError, UsageError
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher
from stages.models.teacher import Teacher
from stages.settings import InputSettings, ModelSettings

TOLERANCE = 1e-5
SHAPES = ((301, 467), (467, 302), (224, 224), (90, 640))


def families() -> Iterator[tuple[str, list[str]]]:
    """Modules of timm and the names of their models."""
    for module in timm.list_modules():
        if names := timm.list_models(module=module):
            yield module, names


SMALL = [
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "micro",
    "tiny",
    "_xs",
    "mini",
    "small",
    "18",
    "_s",
    "b0",
    "_t",
]


LARGE = 200_000_000  # parameters, which take a while on two cores


def smallest(names: list[str]) -> str:
    """The name with the fewest parameters, times the area that it looks at, of those that sound small."""
    names = [name for name in names if not name.startswith("test_")] or names
    rank = {name: next((i for i, hint in enumerate(SMALL) if hint in name), len(SMALL)) for name in names}
    counts, sizes = dict[str, int](), dict[str, int]()
    for name in sorted(names, key=lambda name: (rank[name], len(name)))[:4]:
        try:
            with torch.device("meta"):
                net = timm.create_model(name, num_classes=7)
        except Exception:  # what cannot be built so is not the smallest
            continue
        side = (getattr(net, "pretrained_cfg", {}).get("input_size") or (3, 224, 224))[-1]
        sizes[name] = sum(p.numel() for p in net.parameters())
        counts[name] = sizes[name] * side**2
    name = min(counts, key=lambda name: counts[name]) if counts else names[0]
    if sizes.get(name, 0) > LARGE:
        raise ValueError(f"{name} has {sizes[name]:,} parameters")
    return name


def compare(name: str, **arguments: Any) -> dict[str, Any]:
    """Save the random network ``name`` as timm does, load the folder, and compare logits and pixels."""
    torch.manual_seed(0)
    net = timm.create_model(name, **({"num_classes": 7} | arguments)).eval()
    if net.num_classes != 7:
        raise ValueError("no classifier")
    line: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in net.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(net, folder, safe_serialization=True)
        pretrained = json.loads((Path(folder) / "config.json").read_text())["pretrained_cfg"]
        settings, transform = ModelSettings(name=f"timm:{folder}"), resolve_data_config(pretrained_cfg=pretrained)
        try:
            try:
                teacher = load_teacher(settings)
            except UsageError as error:  # an input that no rule expresses
                line["why"], size = str(error).replace(folder, "FOLDER")[:300], transform["input_size"][1]
                rule = InputSettings(size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
                teacher, transform = load_teacher(settings.model_copy(update={"input": rule})), None
        except FactoryError as error:
            return line | {"equal": False, "why": str(error).replace(folder, "FOLDER")[:300]}
    with torch.no_grad():
        x = torch.randn(2, teacher.input.channels, teacher.input.size, teacher.input.size)
        theirs, ours = net(x), teacher.net(x)
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)).item()
    pixels = pixel_difference(teacher, create_transform(**transform)) if transform else None
    return line | {"equal": difference <= TOLERANCE, "difference": difference, "pixels": pixels}


def pixel_difference(teacher: Teacher, transform: Any) -> float:
    """Largest difference from ``transform`` in 1/255, over random pictures."""
    rng, worst = np.random.default_rng(0), 0.0
    std = torch.tensor(teacher.input.settings.std).view(-1, 1, 1)
    for height, width in SHAPES:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        x = to_unit(torch.from_numpy(np.array(picture))[None])
        ours = teacher.input(teacher.input.view(x))[0]
        if teacher.input.channels == 1:
            picture = picture.convert("L")
        worst = max(worst, ((ours - transform(picture)) * std * 255).abs().max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--families", help="comma-separated modules; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.families.split(",") if arguments.families else None
    lines: list[dict[str, Any]] = []
    for family, names in families():
        if chosen is not None and family not in chosen:
            continue
        name = "?"
        try:
            name = smallest(names)
            line = compare(name)
        except Exception as error:  # of timm itself: its own building, saving or answering
            line = {"model": name, "equal": None, "why": f"timm: {type(error).__name__} {str(error)[:200]}"}
        lines.append({"family": family} | line)
        print(json.dumps(lines[-1]), flush=True)
        counted = [entry for entry in lines if entry["equal"] is not None]
        totals = {"families": len(counted), "equal": sum(entry["equal"] for entry in counted)}
        versions = {"timm": timm.__version__, "torch": str(torch.__version__)}
        arguments.json.write_text(json.dumps({**totals, **versions, "lines": lines}, indent=1))
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
