"""What a finished student is: its size and speed, and the model card that goes with it."""

import html
import re
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.models.identity import ModelConfig
from stages.models.schemes import only_named

CARD = """---
library_name: pytorch
tags: [image-classification, knowledge-distillation, data-free, synthetic-data]
---
# {architecture}, distilled without the teacher's data

A student of {parameters:,} parameters, {mflop:.2f} MFLOP per image (two per multiply-add), {kilobytes:.0f} kB of
safetensors, {latency:.2f} ms per image (batch 1, {device}, {threads} thread(s), median, on the training machine).

- **Input**: {input}
- **Classes**: {classes}
- **Teacher**: {teacher}
- **Data**: {images:,} synthetic images ({held_out:,} more held out) of {datasets}; selection: {where}
- **Training**: {epochs} epochs, batch {batch_size}, {optimiser}, {schedule} schedule, peak learning rate {lr},
  seed {seed}; loss: {loss}; weights kept: {keep}
- **Held-out synthetic images**: {held_out_score}
- **Test data** (read once, at the end): {test}

Load it with `stages.distill.saved.load_student({model})` (images `[n, 3, h, w]` in [0, 1] in, logits out); score it
with `factory eval {model} DATA`; write it for other runtimes with `factory export {model} --onnx FILE`.{named}
"""
NAMED = """
No folder may name {architecture}, so MODEL.yaml does: write name, weights (FOLDER/model.safetensors), and
`num_classes`, `class_names`, `input` and `stem` as they are in `config.json` into it.
"""


@torch.no_grad()
def measure(net: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """Parameters, MFLOP per image (two per multiply-add) and median latency in ms of one image, on the net's device."""
    device = next(net.parameters()).device
    x = torch.zeros(1, config.channels, config.input.size, config.input.size, device=device)
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(x)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        net(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "mflop": counter.get_total_flops() / 1e6,
        "latency_ms": 1000 * statistics.median(times),
    }


def model_card(config: ModelConfig, spec: dict[str, Any], facts: dict[str, Any]) -> str:
    """The README.md of a student folder. ``spec`` is the run's, ``facts`` this student's results."""
    settings, wanted = spec["settings"], config.input
    spec = {**spec, "teacher": {key: markdown(value) for key, value in spec["teacher"].items()}}
    weights = {k: v for k, v in settings["loss"].items() if isinstance(v, float) and v and k != "tau"}
    names = [markdown(name) for name in config.class_names[:10]]
    architecture, by_name = markdown(config.architecture), only_named(config.architecture)
    held, test = facts.get("held_out"), facts.get("test")
    return CARD.format(
        architecture=architecture,
        parameters=facts["parameters"],
        mflop=facts["mflop"],
        kilobytes=facts["bytes"] / 1e3,
        latency=facts["latency_ms"],
        device=facts["device"],
        threads=settings["threads"],
        input=f"{wanted.channels}×{wanted.size}×{wanted.size}, mean {_plain(wanted.mean)}, std {_plain(wanted.std)}"
        + ("; first layers changed to keep the resolution of small images" if config.stem == "small" else ""),
        classes=f"{config.num_classes} ({', '.join(names)}{', …' if config.num_classes > len(names) else ''})",
        teacher=f"{spec['teacher']['architecture']}, sha256 {spec['teacher']['sha256']}",
        images=facts["images"],
        held_out=facts["images_held_out"],
        datasets=", ".join(
            f"fingerprint {markdown(m['fingerprint'])} (weight {m['weight']:g})" for m in spec["manifests"]
        ),
        where=markdown(settings["where"] or "") or ("every kept image" if settings["kept"] else "every image"),
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        optimiser=settings["optimiser"]["name"],
        schedule=settings["optimiser"]["schedule"],
        lr=settings["optimiser"]["lr"],
        seed=settings["seed"],
        loss=", ".join(f"{k} {v:g}" for k, v in weights.items()) + f" (τ = {settings['loss']['tau']:g})",
        keep=settings["keep"],
        held_out_score=f"agreement with the teacher {held['agreement']:.1%}" if held else "none",
        test=f"accuracy {test['accuracy']:.1%}, agreement with the teacher {test['agreement']:.1%}; "
        f"{test['images']:,} images, sha256 {test['data']['sha256']}"
        if test
        else "not given",
        model="MODEL.yaml" if by_name else "FOLDER",
        named=NAMED.rstrip("\n").format(architecture=architecture) if by_name else "",
    )


def markdown(text: object) -> str:
    """``text`` as Markdown shows it: no HTML, web links, pictures, code or further lines come out of a class name.

    GitHub makes links of bare ``https://…`` and ``www.…`` as well.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return re.sub(r"(?i)([\\`*\[\]]|:(?=//)|(?<=www)\.)", r"\\\1", html.escape(shown, quote=False))


def _plain(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
