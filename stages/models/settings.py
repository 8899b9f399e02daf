"""Settings that name a classifier: the teacher, or a frozen student used as adversary. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Stem = Literal["native", "small"]
SMALL = 64  # pixels; up to this size the stem of an ImageNet network would throw most of the image away


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputSettings(Settings):
    """What a classifier expects: ``channels × size × size``, values in [0, 1] normalised by ``mean`` and ``std``."""

    size: int = Field(gt=0, le=4096)
    channels: Literal[1, 3] = Field(3, description="1 means luminance")
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["bilinear", "bicubic", "area"] = Field("bilinear", description="always antialiased")

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "InputSettings":
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise ValueError(f"mean and std (> 0) must have {self.channels} values, one per channel")
        return self


class ModelSettings(Settings):
    """A classifier, and what cannot be known from it.

    ``name`` is one of

    - a folder holding ``config.json`` + ``model.safetensors`` (what distillation writes), or ``embedded:digits``;
    - a built-in architecture (:mod:`stages.models.registry`), ``timm:NAME`` or ``torchvision:NAME``, with ``weights``,
      ``input`` and ``num_classes``;
    - ``timm:FOLDER``, ``timm:NAME.TAG`` (the hub's weights), ``hf:FOLDER`` or ``hf:ORG/NAME``: these know their own;
    - ``module.path:function`` of your own code, with ``input``, ``num_classes`` and, if it loads none, ``weights``;
    - ``FILE.onnx`` with ``input`` and ``num_classes``: a black box, used for scores only;
    - ``FILE.yaml`` holding these very settings.
    """

    name: str = "embedded:digits"
    weights: str | None = Field(None, description="safetensors, or a checkpoint that holds tensors only")
    input: InputSettings | None = None
    num_classes: int | None = Field(None, gt=1)
    class_names: tuple[str, ...] | None = None
    stem: Stem | None = Field(
        None, description="small: the first layers keep the resolution; default: small for built-ins up to 64 px"
    )
