"""Settings that name a classifier: the teacher, or a frozen student used as adversary. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSettings(Settings):
    """What a classifier expects: ``channels × size × size``, values in [0, 1] normalised by ``mean`` and ``std``."""

    size: int = Field(gt=0)
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
    """A classifier: a model folder, or an architecture with a weights file.

    ``name`` is a folder holding ``config.json`` + ``model.safetensors`` (what distillation writes),
    ``embedded:digits``, or a built-in architecture (see :mod:`stages.models.registry`). ``weights``, ``input``,
    ``num_classes`` and ``class_names`` are needed only where ``name`` does not know them.
    """

    name: str = "embedded:digits"
    weights: str | None = None
    input: InputSettings | None = None
    num_classes: int | None = Field(None, gt=1)
    class_names: tuple[str, ...] | None = None
