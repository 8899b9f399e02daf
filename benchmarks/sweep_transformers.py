"""Does every image classifier of transformers load as ``save_pretrained`` writes it, and answer the same?

    python benchmarks/sweep_transformers.py --json FILE [--types vit,deit]

One line a class: a tiny config of 7 classes with random weights, saved with the processor of its type (its defaults at
the network's size), loaded as ``hf:FOLDER``. ``equal``: as in :mod:`sweep_timm`. ``pixels``: largest difference of a
normalized pixel from the processor, in 1/255, over random pictures of several shapes (None: the processor does what no
input rule does, and the input was given). ``same``: share of the pictures with the same predicted class.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from manifests.errors import FactoryError, UsageError
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher
from stages.models.processors import quiet_transformers
from stages.settings import InputSettings, ModelSettings

TOLERANCE = 1e-5
SIDE = 64
SHAPES = ((97, 151), (151, 98), (64, 64), (50, 200))
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": SIDE,
    "patch_size": 16, "embed_dim": 8, "depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32],
}  # fmt: skip
"""Fields that make a config tiny, where it has them."""
SWIN = {"num_attention_heads": [1] * 4, "num_heads": [1] * 4, "window_size": 2, "patch_size": 4}
SIZES: dict[str, dict[str, Any]] = {
    "convnext": {"patch_size": 4, "num_hidden_layers": 4}, "convnextv2": {"patch_size": 4, "num_hidden_layers": 4},
    "textnet": {"hidden_sizes": [64, 8, 16, 16, 32]},
    "cvt": {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4], "drop_path_rate": [0.0] * 3},
    "levit": {"hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [1] * 3},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "num_groups": 4},
    "swin": SWIN, "swinv2": SWIN, "donut-swin": SWIN,
    "focalnet": {"hidden_sizes": [8, 16, 32, 64], "patch_size": 4},
    "hiera": {"image_size": [SIDE, SIDE], "num_heads": [1] * 4, "patch_size": [7, 7]},
    "regnet": {"embedding_size": 8, "groups_width": 8},
    "resnet": {"embedding_size": 8},
    "poolformer": {"patch_size": 7},
    "pvt": {"num_attention_heads": [1, 2, 2, 4]},
    "pvt_v2": {"num_attention_heads": [1, 2, 2, 4]},
    "segformer": {"num_attention_heads": [1, 2, 2, 4]},
    "swiftformer": {"embed_dims": [8, 16, 16, 32]},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "patch_size": 2},
    "mobilevitv2": {"patch_size": 2, "width_multiplier": 0.25},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1, "image_size": SIDE,
        "num_self_attention_heads": 1, "num_cross_attention_heads": 1,
    },
    "hgnet_v2": {"stem_channels": [3, 8, 16], "stage_in_channels": [16, 32, 64, 64], "stage_mid_channels": [8] * 4,
                 "stage_out_channels": [32, 64, 64, 64], "stage_num_blocks": [1] * 4, "hidden_sizes": [32, 64, 64, 64]},
}  # fmt: skip
LARGE = ("ShieldGemma2ForImageClassification",)  # a language model of billions of weights
WITHOUT_PROCESSOR = {"dinov2_with_registers": "BitImageProcessor", "hgnet_v2": "ConvNextImageProcessor"}


def tiny_config(kind: Any, model_type: str) -> Any:
    """A config of the class ``kind`` with few weights."""
    usual = kind.config_class()
    fields = TINY | SIZES.get(model_type, {})
    given: dict[str, Any] = {key: value for key, value in fields.items() if hasattr(usual, key)}
    if hasattr(usual, "vision_config"):
        given["vision_config"] = {k: v for k, v in fields.items() if hasattr(usual.vision_config, k)}
    return kind.config_class(**given, num_labels=7)


def compare(name: str, model_type: str) -> dict[str, Any]:
    """Save a tiny random network of the class ``name`` and its processor, load the folder, compare."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    with quiet_transformers():
        net = kind(tiny_config(kind, model_type)).eval()
    for parameter in net.parameters():  # many start at zero, or so small that all images get the same answer
        torch.nn.init.normal_(parameter, std=0.2)
    line: dict[str, Any] = {"parameters": sum(p.numel() for p in net.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        processor = saved_processor(model_type, folder)
        settings = ModelSettings(name=f"hf:{folder}")
        try:
            teacher = load_teacher(settings)
        except UsageError as error:
            line["why"] = str(error).replace(folder, "FOLDER")[:400]
            rule = InputSettings(size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
            try:
                teacher = load_teacher(settings.model_copy(update={"input": rule}))
            except FactoryError as again:
                return line | {"equal": False, "why": str(again).replace(folder, "FOLDER")[:400]}
            processor = None
        except FactoryError as error:
            return line | {"equal": False, "why": str(error).replace(folder, "FOLDER")[:400]}
    with torch.no_grad():
        x = torch.randn(2, 3, teacher.input.size, teacher.input.size)
        theirs, ours = _logits(net, x), teacher.net(x)
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)).item()
    line |= {"equal": difference <= TOLERANCE, "difference": difference, "pixels": None, "same": None}
    return line if processor is None else line | pictures(net, teacher, processor)


def _logits(net: Any, x: Any) -> Any:
    out = net(x)
    return out.logits if "logits" in out else out.last_hidden_state  # PP-LCNet


def saved_processor(model_type: str, folder: str) -> Any:
    """The processor of the type with its defaults, but for the network's size; None where it has none."""
    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = WITHOUT_PROCESSOR.get(model_type) or entry.get("torchvision")
    if not name:
        return None
    kind = getattr(transformers, name)
    size: dict[str, Any] = dict(getattr(kind, "size", None) or {})
    fields: dict[str, Any] = {"size": {"shortest_edge": SIDE + 8}} if "shortest_edge" in size else {}
    fields = fields or {"size": {"height": SIDE, "width": SIDE}}
    if name in ("ConvNextImageProcessor", "LevitImageProcessor", "PoolFormerImageProcessor"):
        fields["size"] = {"shortest_edge": SIDE}
    if getattr(kind, "do_center_crop", False):
        fields["crop_size"] = {"height": SIDE, "width": SIDE}
    try:
        processor = kind(**fields)
        processor.save_pretrained(folder)
    except Exception:  # one that needs more than its defaults
        return None
    return processor


def pictures(net: Any, teacher: Any, processor: Any) -> dict[str, Any]:
    """Largest difference of a pixel in 1/255, and share of equal predictions, over random pictures."""
    rng, worst, same = np.random.default_rng(0), 0.0, []
    std = torch.tensor(teacher.input.settings.std).view(-1, 1, 1)
    for height, width in SHAPES * 5:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        theirs = processor(picture, return_tensors="pt")["pixel_values"].float()
        ours = teacher.input(teacher.input.view(to_unit(torch.from_numpy(np.array(picture))[None])))
        worst = max(worst, ((ours - theirs)[0] * std * 255).abs().max().item())
        with torch.no_grad():
            same.append(_logits(net, theirs).argmax(1).item() == teacher.net(ours).argmax(1).item())
    return {"pixels": worst, "same": sum(same) / len(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--types", help="comma-separated model types; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    chosen = arguments.types.split(",") if arguments.types else None
    lines: list[dict[str, Any]] = []
    for model_type, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            if name in LARGE or (chosen is not None and model_type not in chosen):
                continue
            try:
                line = compare(name, model_type)
            except Exception as error:  # of transformers itself: its own building, saving or answering
                line = {"equal": None, "why": f"transformers: {(str(error).splitlines() or ['?'])[0][:200]}"}
            lines.append({"class": name} | line)
            print(json.dumps(lines[-1]), flush=True)
            counted = [entry for entry in lines if entry["equal"] is not None]
            totals = {"classes": len(counted), "equal": sum(entry["equal"] for entry in counted)}
            versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
            arguments.json.write_text(json.dumps({**totals, **versions, "lines": lines}, indent=1))
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
