"""The recipe: every setting of both stages, resolved from layers into one frozen object.

Used by every ``factory run …`` and ``demo``. Precedence, low to high: the settings classes' defaults,
the recipe file (packaged by name, or a YAML path), ``FACTORY_SYNTH__…`` and the like, ``--set``, flags.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from manifests.errors import UsageError, suggest
from manifests.plain_files import MAX_SETTINGS, read_regular
from pipeline.layers import EMPTY, Layer, env_layer, flag_layer, mapping_layer, set_layer, validate, yaml_layer
from stages.models.source import is_self_contained
from stages.settings import MAX_WEIGHT, DistillSettings, Settings, SynthSettings

DEFAULT = "demo"
SECTIONS = ("synth", "distill", "rounds")
PROMPTS_FILE = ("synth", "prompts", "file")
MODELS = ("synth.teacher.name", "synth.adversary.name")
"""Keys that name a classifier; their siblings say what cannot be known from it."""


class RoundsSettings(Settings):
    """How ``factory run rounds`` alternates the stages."""

    count: int = Field(2, gt=0, le=999, description="rounds in total; growing it later only adds")
    adversarial: float = Field(
        1.0, gt=0, le=MAX_WEIGHT, description="guidance.adversarial of every round but the first"
    )


class Recipe(Settings):
    """Both stages' settings; stored whole in the plan, in ``resolved.yaml`` and in the manifest's metadata."""

    name: str = "unnamed"
    description: str = ""
    synth: SynthSettings = SynthSettings()
    distill: DistillSettings = DistillSettings()
    rounds: RoundsSettings = RoundsSettings()

    @classmethod
    def load(cls, source: str | Path = DEFAULT, *settings: str) -> "Recipe":
        """A packaged recipe by name, or a YAML file by path, with ``settings`` (``synth.guidance.step_size=0.2``) over
        it. The environment plays no part. Raises UsageError in one line naming key, place and near matches."""
        return recipe_of(with_prompts(set_layer(settings, cls, label="")).over(read(str(source))))

    def changed(self, *settings: str) -> "Recipe":
        """This recipe with ``settings`` (``synth.shards=8``) in place of its own. Errors as :meth:`load`."""
        mine = mapping_layer(self.model_dump(mode="json"), f"recipe {self.name}")
        return recipe_of(with_prompts(set_layer(settings, Recipe, label="")).over(mine))


def recipe_of(layer: Layer) -> Recipe:
    """The recipe of all layers together. Of ``distill.steps`` and ``distill.epochs`` the one that was set at the
    higher place counts, steps where one place sets both. Errors as :func:`pipeline.layers.validate`."""
    steps, epochs = ("distill", "steps"), ("distill", "epochs")
    last = {path: at for at, (path, _, _) in enumerate(layer.entries)}
    if last.get(epochs, -1) > last.get(steps, len(layer.entries)):
        places = {layer.entries[last[path]][2].rsplit(":", 1)[0] for path in (steps, epochs)}
        layer = layer.without(steps) if len(places) > 1 else layer
    return validate(Recipe, layer)


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    entries = (resources.files("pipeline") / "recipes").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def packaged_text(name: str) -> str:
    """The YAML of a packaged recipe, comments and all."""
    return (resources.files("pipeline") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def read(source: str, seen: tuple[str, ...] = ()) -> Layer:
    """The layer of a packaged recipe's name or of a YAML file's path, over what it ``extends``."""
    if source in packaged():
        return _extended(yaml_layer(packaged_text(source), f"recipe {source}"), Path(), (*seen, source))
    path = Path(source)
    if not path.suffix and not path.exists() and path.name == source:
        raise UsageError(
            f"no recipe {source!r}; {suggest(source, packaged())}; a file is given by its path, ending in .yaml"
        )
    try:
        text = read_regular(path, MAX_SETTINGS)
    except OSError as error:
        raise UsageError(f"{source}: cannot read this recipe: {error.strerror}") from None
    return _extended(
        yaml_layer(text, source).over(mapping_layer({"name": path.stem}, source)), path.parent, (*seen, source)
    )


def _extended(layer: Layer, folder: Path, seen: tuple[str, ...]) -> Layer:
    """``layer`` over the recipe that its key ``extends`` names: a packaged one, or a file beside it."""
    layer = with_prompts(layer, folder)
    base, where = layer.value(("extends",)), layer.origin(("extends",))
    if base is None:
        return layer
    if not isinstance(base, str):
        raise UsageError(f"{where}: extends: name a packaged recipe or a YAML file")
    source = base if base in packaged() else os.path.normpath(folder / base)
    if source in seen:
        raise UsageError(f"{where}: extends: goes round in a circle")
    return layer.without(("extends",)).over(read(source, seen))


def with_prompts(layer: Layer, folder: Path = Path()) -> Layer:
    """``layer`` with the keys of ``prompts`` in the YAML file that its ``synth.prompts.file`` names (in ``folder``),
    below those that it sets itself.

    ``file`` is no setting: a recipe carries what the file held, and one that is stored in a dataset can name none.
    """
    name = layer.value(PROMPTS_FILE)
    if name is None:
        return layer
    where, section = layer.origin(PROMPTS_FILE), PROMPTS_FILE[:-1]
    if not isinstance(name, str):
        raise UsageError(f"{where}: synth.prompts.file: name a YAML file with keys of prompts (subjects, classes …)")
    path = folder / name
    try:
        text = read_regular(path, MAX_SETTINGS)
    except OSError as error:
        raise UsageError(f"{where}: synth.prompts.file: cannot read {path}: {error.strerror}") from None
    entries = yaml_layer(text, str(path)).entries
    inside = Layer(tuple((section + key, value, place) for key, value, place in entries))
    return layer.without(PROMPTS_FILE).over(inside)


def resolve(
    source: str | None = DEFAULT,
    *,
    section: str | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    base: Layer = EMPTY,
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe of a command: ``base`` under what the user says (:func:`given`).

    Raises UsageError in one line naming key, place and near matches.
    """
    return recipe_of(given(source, section, sets, flags or {}, environ).over(base))


def given(
    source: str | None,
    section: str | None,
    sets: Iterable[str],
    flags: Mapping[str, tuple[str, Any]],
    environ: Mapping[str, str] | None = None,
) -> Layer:
    """What the user says: ``source`` < environment < ``--set`` < flags.

    ``section`` is the command's own, None where it runs both stages: the environment reaches it alone, and keys of
    ``--set`` may leave it out. Stage 2 reads no other; a dataset carries the settings of all. Where a flag names
    another classifier than the file, one whose own files tell all of it, nothing that the file says of its classifier
    stays. Errors as :func:`resolve`.
    """
    layer = EMPTY if source is None else read(source)
    for key, (_, value) in flags.items():
        path = tuple(key.split("."))
        if key in MODELS and value is not None and is_self_contained(value) and layer.value(path) != value:
            layer = layer.without(path[:-1])
    own = (section,) if section else SECTIONS
    layer = with_prompts(env_layer(os.environ if environ is None else environ, Recipe, own)).over(layer)
    layer = with_prompts(set_layer(sets, Recipe, section, own if section == "distill" else None)).over(layer)
    return flag_layer(flags).over(layer)


def to_yaml(recipe: Recipe, keys: Sequence[str] = tuple(Recipe.model_fields)) -> bytes:
    """What ``resolved.yaml`` holds: every setting of ``keys`` spelled out; usable as ``-c`` again."""
    values = recipe.model_dump(mode="json", include=set(keys))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100).encode()
