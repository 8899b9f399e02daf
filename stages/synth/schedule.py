"""ẑ0 and its shift for each prediction type of a variance-preserving schedule, z = α·z0 + σ·eps.

Equation 4 of DiffDFKD for eps-prediction; Salimans & Ho 2022 (appendix D) for v = α·eps − σ·z0.
"""

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def predicted_z0(z: Tensor, output: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """The clean latent that ``output`` stands for; shapes follow ``z``."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * z - sigma * output
    return output


def moved(z: Tensor, output: Tensor, delta: Tensor, alpha: float, sigma: float, kind: str) -> tuple[Tensor, Tensor]:
    """``(z, output)`` after ẑ0 moved by ``delta`` with eps kept: z' = z + α·Δ."""
    if kind == "epsilon":
        return z + alpha * delta, output
    if kind == "v_prediction":
        return z + alpha * delta, output - sigma * delta
    return z + alpha * delta, output + delta
