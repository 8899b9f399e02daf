"""Settings that name a classifier: the teacher, or a frozen student used as adversary. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSettings(Settings):
    """What a classifier expects: ``channels × size × size``, values in [0, 1] normalised by ``mean`` and ``std``."""

    size: int = Field(gt=0)
    channels: int = Field(3, ge=1, le=4)
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ModelSettings(Settings):
    """A classifier: a model folder, or an architecture with a weights file.

    ``name`` is a folder holding ``config.json`` + ``model.safetensors`` (what distillation writes), ``embedded:digits``,
    a built-in architecture, or an external scheme such as ``timm:NAME`` (see :mod:`stages.models.registry`).
    ``weights``, ``input``, ``num_classes`` and ``class_names`` are needed only where ``name`` does not know them.
    """

    name: str = "embedded:digits"
    weights: str | None = None
    input: InputSettings | None = None
    num_classes: int | None = Field(None, gt=1)
    class_names: tuple[str, ...] | None = None
