"""The box of latent CutMix (LCA): DiffDFKD equation 11, between two trajectories of one class and group.

A box of area 1 − λ is cut from the partner's latent; the prior heals the seams in the steps that remain.
"""

import math


def draw_box(lam: float, cy: float, cx: float, height: int, width: int) -> tuple[int, int, int, int]:
    """CutMix's box (Yun et al. 2019): sides √(1−λ) of the latent's, centre (cy, cx) in [0, 1), clipped to the latent.

    >>> draw_box(0.75, 0.5, 0.5, 8, 8), draw_box(0.75, 0.0, 0.0, 8, 8)
    ((2, 2, 4, 4), (0, 0, 2, 2))
    """
    share = math.sqrt(1 - lam)
    h, w = round(height * share), round(width * share)
    top, left = math.floor(cy * height) - h // 2, math.floor(cx * width) - w // 2
    y, x = max(top, 0), max(left, 0)
    return y, x, min(top + h, height) - y, min(left + w, width) - x
