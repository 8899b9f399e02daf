"""Every torchvision classifier, saved by ``torch.save(net.state_dict())`` and loaded as a teacher, answers equally.

    python benchmarks/sweep_torchvision.py [NAME …] [--out sweep.json]

Weights and BatchNorm statistics are random, so that an error in any shows. One line and one JSON row a builder; exit
code 1 where one differs.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manifests.errors import FactoryError
from stages.models.loading import load_model
from stages.models.source import resolve
from stages.settings import InputSettings, ModelSettings

CLASSES = 7
TOLERANCE = 1e-5  # of the largest logit


def side(name: str) -> int:
    """A small side that the network takes: MaxViT and patches of ViT (14, 16, 32) divide 224 px."""
    return 224 if name.startswith(("maxvit", "vit_")) else 112


@torch.no_grad()
def reference(name: str, size: int) -> nn.Module:
    """The network of the builder ``name``, with auxiliary heads where it has such, in eval mode."""
    arguments: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        arguments = {"aux_logits": True, "init_weights": False, "transform_input": False}
    net = models.get_model(name, weights=None, num_classes=CLASSES, **arguments)
    generator = torch.Generator().manual_seed(0)
    for path, value in net.state_dict().items():
        if path.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():  # some layers begin with zeros
            value += torch.empty_like(value).normal_(0, 0.02, generator=generator)
    return net.eval()


@torch.no_grad()
def compare(name: str, folder: Path) -> dict[str, Any]:
    """The row of the builder ``name``: parameters in millions, the largest difference of a logit relative to the
    largest logit, seconds, what was decided on the weights; ``error`` in place of these."""
    size, start = side(name), time.perf_counter()
    net, path = reference(name, size), folder / "w.pth"
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    logits = net(images)
    row = {"builder": name, "parameters": round(sum(p.numel() for p in net.parameters()) / 1e6, 1), "size": size}
    torch.save(net.state_dict(), path)
    del net
    spec = InputSettings(size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = resolve(
        ModelSettings(name=f"torchvision:{name}", weights=str(path), input=spec, num_classes=CLASSES, stem="native")
    )
    try:
        loaded, _ = load_model(source)
    except FactoryError as error:
        return row | {"error": str(error)}
    difference = float((loaded(images) - logits).abs().max() / logits.abs().max())
    seconds = round(time.perf_counter() - start, 1)
    return row | {"difference": difference, "seconds": seconds, "weights": source.decisions.get("weights", "")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="builders (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or models.list_models(module=models):
            row = compare(name, Path(folder))
            rows.append(row)
            gc.collect()
            outcome = row.get("error") or f"{row['difference']:.0e} {row['seconds']:7.1f} s  {row['weights']}"
            print(f"{name:22} {row['parameters']:7.1f} M  {outcome}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return int(any(not row.get("difference", 1) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
