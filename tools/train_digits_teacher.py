"""Train the embedded digits teacher on scikit-learn's digits and save it as a model folder.

    python tools/train_digits_teacher.py --out stages/assets/digits-teacher

Trains on the train split with small random shifts, turns and scalings; weights are averaged (EMA) and the BatchNorm
statistics recomputed for the average. Validation accuracy is for tuning; the test split is read once, with ``--test``.
Takes about two minutes on one CPU core.
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import digits
from stages.distill.export import measure
from stages.models import nets
from stages.models.folders import WEIGHTS
from stages.models.loading import save_model
from stages.models.source import ModelConfig
from stages.settings import InputSettings

ARCHITECTURE = "digits-cnn"
EMA_DECAY = 0.995
CARD = """---
license: apache-2.0
library_name: pytorch
tags: [image-classification, handwritten-digits]
---
# Digits teacher (`embedded:digits`)

A BatchNorm ConvNet (`{architecture}`) for 8×8 handwritten digits: the private teacher of the embedded example.
{parameters:,} parameters, {mflop:.1f} MFLOP per image (two per multiply-add), {kilobytes:.0f} kB of safetensors.

- **Input**: one channel (luminance), 8×8, [0, 1], normalized with mean {mean} and std {std}.
- **Data**: `sklearn.datasets.load_digits` (1,797 images, UCI "Optical Recognition of Handwritten Digits", CC BY 4.0),
  split by label into 598 training, 300 validation and 899 test images (`stages/digits.py`).
- **Training**: `python tools/train_digits_teacher.py --out stages/assets/digits-teacher --test`: {epochs} epochs,
  shifts, rotations and scalings, averaged weights.
- **Accuracy**: validation {validation:.1f} % (used for tuning), test {test} (read once).
- **Limits**: made for the example; 8×8 scans of one form by 43 writers, and writers are not kept apart by the split.
"""


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 15°, scaled by up to 12 % and shifted by up to 0.8 pixels; black comes in."""
    n, side = len(x), x.shape[-1]
    draw = torch.rand(4, n, generator=generator) * 2 - 1
    turn, scale, shift = draw[0] * math.radians(15), 1 + 0.12 * draw[1], draw[2:] * 0.8 * 2 / side
    cos, sin = turn.cos() * scale, turn.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def tensors(split: digits.Split) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` in [0, 1] and labels ``[n]``."""
    images, labels = digits.load_split(split)
    return torch.from_numpy(images.astype(np.float32) / 16)[:, None], torch.from_numpy(labels).long()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return 100 * float((net.eval()(x).argmax(1) == labels).float().mean())


def train(x: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """One-cycle SGD; returns the averaged network. ``x`` is normalized where black is ``x.min()``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, black, batch = nets.build(ARCHITECTURE, 10, 1), x.min(), 64
    average = copy.deepcopy(net).requires_grad_(False)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        net.train()
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) < batch:
                continue
            logits = net(augmented(x[rows] - black, generator) + black)
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for mean, value in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(value, 1 - EMA_DECAY)
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1}/{epochs} loss {loss.item():.4f}", flush=True)
    views = torch.cat([augmented(x - black, generator) + black for _ in range(20)])
    torch.optim.swa_utils.update_bn(views.split(500), average)
    return average.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="read the test split too, once, for the model card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    x, labels = tensors("train")
    mean, std = round(x.mean().item(), 4), round(x.std().item(), 4)
    net = train((x - mean) / std, labels, args.epochs, args.seed)
    x_val, labels_val = tensors("validation")
    validation = accuracy(net, (x_val - mean) / std, labels_val)
    print(f"validation {validation:.2f} %", flush=True)
    test = "not read"
    if args.test:
        x_test, labels_test = tensors("test")
        test = f"{accuracy(net, (x_test - mean) / std, labels_test):.1f} %"
        print(f"test {test}")
    config = ModelConfig(
        architecture=ARCHITECTURE, num_classes=10, channels=1, class_names=digits.CLASS_NAMES,
        input=InputSettings(size=8, channels=1, mean=(mean,), std=(std,)),
    )  # fmt: skip
    save_model(args.out, net, config)
    (args.out / "README.md").write_text(CARD.format(
        architecture=ARCHITECTURE, parameters=sum(p.numel() for p in net.parameters()), epochs=args.epochs,
        mflop=measure(net, config).mflop, kilobytes=(args.out / WEIGHTS).stat().st_size / 1e3,
        mean=mean, std=std, validation=validation, test=test,
    ))  # fmt: skip
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
