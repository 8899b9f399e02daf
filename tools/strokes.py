"""Procedurally drawn pen strokes with captions: the only data the embedded prior ever sees.

Used by ``tools/train_strokes_prior.py``. An image is one to three strokes (lines, arcs, curves, loops, waves, corners)
in white ink on black. The caption says how it was drawn, so that prompts matter. Nothing here knows of letters or
digits: every shape parameter is random.
"""

import numpy as np
import torch

SIZE = 32
POINTS = 24  # polyline points per stroke
KINDS = ("line", "arc", "curve", "loop", "wave", "corner")
PENS = {"thin": (0.9, 1.3), "medium": (1.3, 1.9), "thick": (1.9, 2.7)}  # half width in pixels
COUNTS = ("one", "two", "three")


def stroke(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One stroke as a polyline ``[POINTS, 2]`` (x, y), roughly within the unit square around 0."""
    t = np.linspace(0.0, 1.0, POINTS)[:, None]
    if kind == "line":
        return (1 - t) * rng.uniform(-1, 1, 2) + t * rng.uniform(-1, 1, 2)
    if kind in ("arc", "loop"):
        span = 2 * np.pi if kind == "loop" else rng.uniform(0.5, 1.7) * np.pi
        angle = rng.uniform(0, 2 * np.pi) + span * t[:, 0] * rng.choice([-1, 1])
        radii = rng.uniform(0.35, 0.8) * np.array([1.0, rng.uniform(0.4, 1.0)])
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * radii
        turn = rng.uniform(0, np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        return points @ rotation.T + rng.uniform(-0.4, 0.4, 2)
    if kind == "corner":
        a, b, c = rng.uniform(-1, 1, (3, 2))
        return np.where(t < 0.5, a + (b - a) * 2 * t, b + (c - b) * (2 * t - 1))
    if kind == "curve":
        a, b, c = rng.uniform(-1, 1, (3, 2))
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    a, d = rng.uniform(-1, 1, (2, 2))  # wave: a cubic whose control points lie on opposite sides of the chord
    normal = np.array([a[1] - d[1], d[0] - a[0]])
    bend = rng.uniform(0.6, 1.6)
    b, c = a + (d - a) * 0.33 + bend * normal, a + (d - a) * 0.67 - bend * normal
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def drawing(rng: np.random.Generator) -> tuple[np.ndarray, float, str]:
    """One drawing: strokes ``[3, POINTS, 2]`` in pixels (missing strokes repeat the first), half width, caption."""
    count = int(rng.choice(3, p=[0.3, 0.4, 0.3])) + 1
    kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=count)]
    connected = bool(rng.random() < 0.7)
    strokes = [stroke(kinds[0], rng)]
    for kind in kinds[1:]:
        new = stroke(kind, rng)
        if connected:  # the pen goes on from an end, or from anywhere along what is already there
            anchor = strokes[-1][-1] if rng.random() < 0.6 else strokes[-1][rng.integers(POINTS)]
            new = new - new[0] + anchor
        strokes.append(new)
    points = np.concatenate(strokes)
    low, high = points.min(0), points.max(0)
    pen = list(PENS)[rng.integers(len(PENS))]
    half = float(rng.uniform(*PENS[pen]))
    height = rng.uniform(18, 30) - 2 * half  # fit into a box: most drawings fill the canvas
    scale = height / max(high[1] - low[1], 0.7 * (high[0] - low[0]), 0.2)
    offset = SIZE / 2 + rng.normal(0, 1.0, 2)
    points = (points - (low + high) / 2) * min(scale, (SIZE - 2 - 2 * half) / max(high[0] - low[0], 0.1)) + offset
    shaped = points.reshape(count, POINTS, 2)
    shaped = np.concatenate([shaped, np.repeat(shaped[:1], 3 - count, 0)])
    names = " and ".join(("an " if k == "arc" else "a ") + k for k in kinds)
    joined = "" if count == 1 else (" connected" if connected else " separate")
    return shaped, half, f"{COUNTS[count - 1]} {pen}{joined} stroke{'s' if count > 1 else ''}, {names}"


def render(strokes: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Antialiased ink in [0, 1]: ``strokes [n, 3, POINTS, 2]`` and half widths ``[n]`` to ``[n, SIZE, SIZE]``.

    Ink = clamp(half width + ½ − distance to the nearest polyline segment).
    """
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 1, 2)
    start = strokes[:, :, :-1].reshape(len(strokes), 1, -1, 2)
    along = strokes[:, :, 1:].reshape(len(strokes), 1, -1, 2) - start
    t = (((pixels - start) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)).clamp(0, 1)
    distance = (pixels - start - t[..., None] * along).square().sum(-1).amin(-1).sqrt()
    return (half[:, None] + 0.5 - distance).clamp(0, 1).reshape(-1, SIZE, SIZE)


def draw(count: int, seed: int, batch: int = 64) -> tuple[torch.Tensor, list[str]]:
    """``count`` drawings: uint8 ``[count, SIZE, SIZE]`` and their captions; a pure function of ``(count, seed)``."""
    rng = np.random.default_rng(seed)
    images, captions = torch.empty(count, SIZE, SIZE, dtype=torch.uint8), []
    for first in range(0, count, batch):
        made = [drawing(rng) for _ in range(min(batch, count - first))]
        ink = render(torch.from_numpy(np.stack([m[0] for m in made])).float(), torch.tensor([m[1] for m in made]))
        images[first : first + len(made)] = (ink * 255).round().to(torch.uint8)
        captions += [m[2] for m in made]
    return images, captions
