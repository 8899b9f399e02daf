"""Settings of the methods that invert the teacher: ``deepinversion``, ``cmi`` and ``dda``. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from stages.models.settings import Settings

LONGEST = 32767  # iterations: the manifest's ``step`` holds 16 bits


class DeepInversionSettings(Settings):
    """Optimisation of pixels (Yin et al. 2020). The competition term's weight is ``guidance.adversarial``."""

    steps: int = Field(2000, gt=0, le=LONGEST)
    lr: float = Field(0.05, gt=0, description="of Adam, in units of the pixel range [-1, 1]")
    ce: float = Field(1.0, ge=0, description="class prior weight")
    bn: float = Field(10.0, ge=0, description="feature-statistics weight (normalised: a mean over layers)")
    first_bn: float = Field(10.0, ge=0, description="factor of the first BatchNorm layer")
    tv: float = Field(2.5e-5, ge=0, description="total-variation weight")
    l2: float = Field(1e-5, ge=0, description="weight of the image's norm")
    jitter: float = Field(0.0625, ge=0, lt=0.5, description="random shift before the teacher, a share of the side")
    flip: bool = Field(False, description="show half of the steps mirrored; wrong for digits and text")


class CmiSettings(Settings):
    """Contrastive model inversion (Fang et al. 2021): a generator for each batch, and one contrastive head a group.

    CMI's weight of 1 for BN is of a sum of norms over layers; of our mean over layers it would be too weak beside the
    contrastive term (benchmarks/RESULTS.md). The adversarial term's weight is ``guidance.adversarial`` (CMI: 0.5).
    """

    batches: int = Field(2, gt=0, description="batches a group is made in; the bank holds the earlier ones")
    steps: int = Field(500, gt=0, le=LONGEST, description="for each batch")
    lr: float = Field(1e-3, gt=0, description="of Adam, for generator, latents and head")
    latent: int = Field(256, gt=0, description="numbers that an image is generated from")
    width: int = Field(64, gt=0, description="channels of the generator's last layer; the others have twice as many")
    ce: float = Field(0.5, ge=0, description="class prior weight")
    bn: float = Field(10.0, ge=0, description="feature-statistics weight (normalised: a mean over layers)")
    cr: float = Field(0.8, ge=0, description="contrastive weight")
    temperature: float = Field(0.1, gt=0, description="of the contrastive term")
    crop: tuple[float, float] = Field((0.25, 1.0), description="least and greatest area of the local view")
    shift: float = Field(0.125, ge=0, lt=0.5, description="random shift of the global view, a share of the side")
    flip: bool = Field(False, description="mirror half of the views; wrong for digits and text")

    @model_validator(mode="after")
    def _crop(self) -> "CmiSettings":
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop must satisfy 0 < least <= greatest <= 1, got {low}, {high}")
        return self


class DdaSettings(Settings):
    """Diffusion augmentation of inverted images (Li et al. 2024); ``cmi`` says how these are made.

    The paper's guidance of 0.5 is ``prior.cfg``. A prior with an image encoder varies images as the paper does, from
    pure noise; with any other prior image-to-image stands in, for which the paper names no strength.
    """

    variants: int = Field(3, gt=0, description="images made from each inverted one")
    strength: float = Field(
        0.5, gt=0, le=1, description="share of the steps, 1: only the prompt is left; not for image variation"
    )
    noise_level: int = Field(0, ge=0, lt=1000, description="image variation: noise on the image's features")
    cosine: float = Field(0.75, ge=-1, le=1, description="keep variants whose cosine with their source is above")
    space: Literal["teacher", "contrastive"] = Field("teacher", description="where cosines are taken")
    guided: bool = Field(False, description="the teacher steers the variants too, as guidance says")

    def first_step(self, steps: int, varies: bool) -> int:
        """The denoising step that augmentation starts at, of ``steps``: 0 for strength 1, and where the prior
        ``varies`` images by itself."""
        return 0 if varies else steps - round(self.strength * steps)
