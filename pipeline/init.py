"""``factory init``: a commented recipe for a teacher, which is loaded first, so that the recipe is right about it.

What the teacher's files do not say comes from the command's options, from the person who is asked, or is a guess that
the recipe and a warning call one.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import DataError, UsageError
from manifests.local import temporary_name
from manifests.plain_files import MAX_SETTINGS, read_regular
from pipeline.recipe import resolve
from pipeline.terminal import plain
from stages.models.source import IMAGENET_NETS, ModelSource, split_name, usual_input
from stages.models.source import resolve as resolve_model
from stages.settings import SMALL, InputSettings, ModelSettings

if TYPE_CHECKING:
    from stages.models.checkpoints import Checkpoint

WEIGHTS_FILE = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".tar")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NATURAL, STABLE_DIFFUSION = "priors/natural32", "stable-diffusion-v1-5/stable-diffusion-v1-5"
NATURAL_SIDE = 48
"""Pixels up to which a teacher is shown images of the small prior, which draws 32."""
SMALLER = {"resnet34": "resnet18", "wrn-40-2": "wrn-16-2", "wrn-40-1": "wrn-16-1", "vgg11": "mobilenetv2"}
"""Students of the papers' pairs; others: resnet8 for small images, mobilenetv2 for large ones."""
Ask = Callable[[str, str], str]
"""A question and the proposed answer (shown, and returned where nobody is asked) to the answer."""


@dataclass(frozen=True)
class Facts:
    """What the user said of the teacher; None: not said."""

    weights: str | None = None
    architecture: str | None = None
    classes: str | None = None
    size: int | None = None
    mean: str | None = None
    std: str | None = None
    channels: int | None = None


@dataclass
class Draft:
    """A teacher that was loaded, and what is proposed for it. ``origins``: where each fact came from; ``guesses``:
    those that somebody has to confirm."""

    settings: ModelSettings
    source: ModelSource
    is_black_box: bool
    origins: dict[str, str]
    guesses: list[str] = field(default_factory=list)

    @property
    def input(self) -> InputSettings:
        return self.source.config.input

    @property
    def is_natural(self) -> bool:
        """Whether the small prior of photographs serves it."""
        return self.input.channels == 3 and self.input.size <= NATURAL_SIDE and natural_prior() is not None

    @property
    def student(self) -> str:
        name, side = self.source.config.architecture, self.input.size
        if self.input.channels == 1 and side <= 28:
            return "digits-cnn-small"
        return SMALLER.get(name) or ("resnet8" if side <= SMALL else "mobilenetv2")


def natural_prior() -> str | None:
    """The small prior: in the working directory, or in the clone that this package runs from."""
    here, clone = Path(NATURAL), Path(__file__).resolve().parent.parent / NATURAL
    return str(here) if here.is_dir() else str(clone) if clone.is_dir() else None


def gpu() -> bool:
    """Whether this machine has one."""
    import torch

    return torch.cuda.is_available()


def load_draft(teacher: str, facts: Facts, ask: Ask, confirmed: bool = False) -> Draft:
    """Load ``teacher``, asking for what neither its files nor ``facts`` say. ``confirmed``: a person answers, so that
    nothing is a guess.

    ``teacher``: as ``teacher.name`` of a recipe, ``FILE.py:function``, or a weights file. Raises UsageError and
    DataError as the loading does: a recipe is proposed only for a teacher that answers.
    """
    from stages.models.loading import load_teacher
    from stages.models.teacher import BlackBox

    guesses: list[str] = []
    given = _named(teacher, facts)
    origins: dict[str, str] = {}
    if "weights" in given and given["weights"] == teacher and not facts.architecture:
        origins["architecture"] = f"{given['name']}, recognized by the shapes in {teacher}"
    if facts.classes:
        given |= _classes(facts.classes)
    given |= _input(facts)
    try:
        source = resolve_model(ModelSettings.model_validate(given))
    except UsageError as error:
        if "needs" not in str(error) or "needs weights" in str(error):
            raise
        shapes = _shapes(given)
        if "num_classes" not in given:
            found = str(shapes.classes or "")
            answer = ask("Number of classes, their names (a, b, …), or a file of them", found)
            if not answer:
                raise UsageError(f"{teacher}: how many classes has it? --classes N, NAMES or FILE") from None
            given |= _classes(answer)
            origins["num_classes"] = "the shape of its last layer" if answer == found else "your answer"
        if "input" not in given:
            given["input"] = _asked_input(str(given["name"]), facts, shapes, ask, origins, guesses)
        source = resolve_model(ModelSettings.model_validate(given))
    loaded = load_teacher(source)
    return Draft(
        ModelSettings.model_validate(given),
        source,
        isinstance(loaded, BlackBox),
        source.decisions | origins,
        [] if confirmed else guesses,
    )


def _named(teacher: str, facts: Facts) -> dict[str, object]:
    """``name`` and ``weights`` of the settings."""
    name, weights = teacher, facts.weights
    if teacher.lower().endswith(WEIGHTS_FILE) and ":" not in teacher:
        if weights:
            raise UsageError(f"{teacher} holds weights, and --weights names others: say the architecture with --arch")
        name, weights = facts.architecture or "", teacher
    elif facts.architecture:
        raise UsageError(f"--arch says what the weights file TEACHER fills; {teacher} is no weights file")
    if found := re.fullmatch(r"(.+)\.py:(\w+)", name):
        name = f"{'.'.join(Path(found[1]).parts)}:{found[2]}"
    given: dict[str, object] = {"name": name}
    if weights:
        given["weights"] = weights
    return given if name else given | _recognized(Path(teacher))


def _recognized(weights: Path) -> dict[str, object]:
    """The built-in architecture that ``weights`` fill. Raises UsageError where none or several do."""
    import torch

    from manifests.errors import FactoryError
    from stages.models.build import build_net
    from stages.models.loading import filled
    from stages.models.nets import ARCHITECTURES
    from stages.models.source import ModelConfig

    checkpoint, shapes = _checkpoint(weights), _shapes({"weights": str(weights)})
    fits: dict[str, dict[str, object]] = {}
    spec = {"size": 32, "mean": (0.5,) * shapes.channels, "std": (0.5,) * shapes.channels, "channels": shapes.channels}
    for name in ARCHITECTURES if shapes.classes else ():
        for stem in ("small", "native") if name in IMAGENET_NETS else ("native",):
            config = ModelConfig(
                architecture=name,
                num_classes=shapes.classes,
                channels=shapes.channels,
                input=InputSettings.model_validate(spec),
                class_names=tuple(map(str, range(shapes.classes or 0))),
                stem=stem,
            )
            try:
                with torch.device("meta"):
                    filled(build_net(config), config, checkpoint)
            except FactoryError:
                continue
            fits.setdefault(name, {"stem": stem} if name in IMAGENET_NETS else {})
    if len(fits) != 1:
        several = f"fits {' and '.join(fits)}" if fits else "fits no built-in architecture"
        raise UsageError(f"{weights} {several}: say what it fills, e.g. --arch resnet20, timm:NAME or FILE.py:function")
    only, its_stem = fits.popitem()
    return {"name": only} | its_stem


@dataclass(frozen=True)
class Shapes:
    """What the shapes in a weights file tell, as far as they do."""

    classes: int | None = None
    channels: int = 3
    first_kernel: int | None = None


def _shapes(given: dict[str, object]) -> Shapes:
    """Of the last matrix and the first convolution of the weights in ``given``, or of an ONNX model's inputs."""
    from stages.models.matching import largest_table

    weights = given.get("weights")
    if weights is None:
        return Shapes()
    table = largest_table(_checkpoint(Path(str(weights)))).values()
    heads = [len(value) for value in table if value.ndim == 2]
    kernels = [value for value in table if value.ndim == 4]
    channels = kernels[0].shape[1] if kernels and kernels[0].shape[1] in (1, 3) else 3
    return Shapes(heads[-1] if heads and heads[-1] > 1 else None, channels, kernels[0].shape[-1] if kernels else None)


def _checkpoint(weights: Path) -> "Checkpoint":
    from stages.models.checkpoints import read_checkpoint
    from stages.models.folders import read_weights, shards, weights_in

    file = weights_in(weights) if weights.is_dir() else weights
    files = {path.name: read_weights(path) for path in shards(file)} or {str(file): read_weights(file)}
    return read_checkpoint(files, str(file))


def _classes(text: str) -> dict[str, object]:
    """``10``, ``cat, dog``, or a file: a JSON list or object by label, or a name in each line."""
    if text.strip().isdigit():
        return {"num_classes": int(text)}
    names: object = [part.strip() for part in text.split(",")]
    if Path(text).is_file():
        content = read_regular(Path(text), MAX_SETTINGS).decode("utf-8", "replace")
        try:
            names = json.loads(content)
        except ValueError:
            names = [line.strip() for line in content.splitlines() if line.strip()]
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=lambda key: int(key) if key.isdigit() else 0)]
    if not isinstance(names, list) or len(names) < 2:
        raise UsageError(f"--classes {text}: expected a number, names with commas, or a file of them")
    return {"num_classes": len(names), "class_names": tuple(map(str, names))}


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in re.split(r"[,\s]+", text.strip(" []()")))
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers, e.g. 0.485,0.456,0.406") from None


def _input(facts: Facts) -> dict[str, object]:
    """``input`` where the user said all of it."""
    if facts.size and facts.mean and facts.std:
        mean, std = _numbers(facts.mean, "--mean"), _numbers(facts.std, "--std")
        return {"input": InputSettings(size=facts.size, channels=len(mean), mean=mean, std=std)}
    return {}


def _asked_input(
    name: str, facts: Facts, shapes: Shapes, ask: Ask, origins: dict[str, str], guesses: list[str]
) -> InputSettings:
    """The input rule, from the library's own, the options, and questions."""
    usual = usual_input(name)
    small = name not in IMAGENET_NETS or (shapes.first_kernel or 7) < 7
    known_size = usual.size if usual else None if split_name(name)[0] == "code" else 32 if small else 224
    size = facts.size or ask("Side of its input in pixels", str(known_size or ""))
    if not size:
        raise UsageError(f"{name}: what is the side of its input? --size PIXELS")
    channels = facts.channels or shapes.channels
    mean, std = (usual.mean, usual.std) if usual else IMAGENET if channels == 3 else ((0.5,), (0.5,))
    texts = [facts.mean, facts.std]
    for at, (what, values) in enumerate((("Mean", mean), ("Standard deviation", std))):
        if texts[at] is None:
            texts[at] = ask(f"{what} of the images it was trained on, in [0, 1]", " ".join(map(str, values)))
    said = facts.mean and facts.std
    spec = {"size": size, "channels": channels, "mean": _numbers(str(texts[0]), "--mean")}
    spec |= {"std": _numbers(str(texts[1]), "--std")}
    if usual and not facts.size:
        spec |= usual.model_dump(include={"resize", "resize_size"})
    origins["input"] = "the options" if said else "what the library's own weights take" if usual else "the answers"
    if not said and not usual:
        guesses.append("mean and std")
    if not facts.size and not usual:
        guesses.append("size")
    return InputSettings.model_validate(spec)


def recipe_text(draft: Draft, images: int | None, file: str) -> str:
    """The recipe, a comment at every line."""
    return "\n".join(
        (*_head(draft, file), *_prior(draft), *_teacher(draft), *_sizes(draft, images), *_students(draft), "")
    )


def _head(draft: Draft, file: str) -> Iterator[str]:
    config = draft.source.config
    yield f"# Made by factory init for {config.architecture}: {config.num_classes} classes, {draft.input.size} px."
    yield "#"
    yield f"#     factory eval {file} DATA             # first: is the accuracy what you know it to be?"
    yield f"#     factory run all -c {file} --dry-run  # images, FLOPs, memory, disk"
    yield f"#     factory run all -c {file}            # images, students, report; the same command resumes"
    yield "#"
    yield "# All settings: factory run all --dry-run shows them with their values; a line left out has its default."
    if draft.input.channels == 3:
        yield "extends: photos # what was best for teachers of photographs; factory recipes photos prints it"
    else:
        yield "extends: demo # pen strokes as the prior, for digits and signs; factory recipes demo prints it"
    yield "synth:"


def _prior(draft: Draft) -> Iterator[str]:
    if draft.is_black_box:
        yield "  method: dmkd # unguided: this teacher gives no gradients; it selects the images"
        yield "  min_confidence: 0.1 # images whose class it gives less are left out"
    if draft.input.channels == 1:
        return
    if draft.is_natural:
        yield f"  prior: {{path: {json.dumps(natural_prior())}}} # what draws the images: photographs of 32 px"
    else:
        yield "  prior: # what draws the images: 512 px, 4 GB from the hub at the first run, wants a GPU"
        yield f"    path: {STABLE_DIFFUSION} # or a folder of another one: docs/priors.md"
        yield "    cfg_scale: 3.0 # how closely the prompt is followed"
        yield f"    dtype: {'fp16 # half the memory; fp32 where there is no GPU' if gpu() else 'fp32 # fp16 on a GPU'}"
        yield "  guidance: {decoder: fitted} # a small copy of the prior's decoder makes guidance cheap"
    yield "  # prompts are random things, from photos: they teach more than the classes' names (docs/guidance.md)"


def _teacher(draft: Draft) -> Iterator[str]:
    settings, config = draft.settings, draft.source.config
    origins = {what: plain(origin) for what, origin in draft.origins.items()}
    yield f"  teacher: # {origins['architecture']}"
    yield f"    name: {json.dumps(settings.name)}"
    if settings.weights:
        yield f"    weights: {json.dumps(settings.weights)} # {origins.get('weights', 'read as it is')}"
    if settings.stem:
        yield f"    stem: {settings.stem} # small: the first layers keep the resolution"
    if settings.num_classes:
        yield f"    num_classes: {settings.num_classes} # {origins.get('num_classes', 'as you said')}"
    if settings.class_names:
        names = [json.dumps(name, ensure_ascii=not name.isprintable()) for name in config.class_names]
        yield "    class_names: [ # in the order of its outputs"
        for start in range(0, len(names), 8):
            yield f"      {', '.join(names[start : start + 8])},"
        yield "    ]"
    elif settings.num_classes:
        yield "    # class_names: [first, second, …] # in the order of its outputs; reports and scores name them"
    if settings.input:
        guess = f"GUESSED: {', '.join(draft.guesses)}; what was it trained with?"
        origin = guess if draft.guesses else f"from {origins['input'].rpartition('; from ')[2]}"
        yield f"    input: {settings.input.yaml()} # {origin}"


def _sizes(draft: Draft, images: int | None) -> Iterator[str]:
    group = 250 if draft.is_natural else 50
    usual = 400 if draft.input.channels == 1 else 1500 if draft.is_natural else 3000
    shards = -(-(images or max(usual, 20 * draft.source.config.num_classes)) // group)
    if draft.input.channels == 3:
        yield f"  images: {{size: {draft.input.size}}} # stored side in pixels: what the teacher takes"
    yield f"  group_size: {group} # images guided together; the teacher's statistics are compared over a group"
    yield "  groups_per_shard: 1 # a shard is made whole, and is what an interruption can lose"
    yield f"  shards: {shards} # {shards} × {group} = {shards * group} images; more later only adds (--images N)"
    yield "  seed: 0 # another one makes other images"


def _students(draft: Draft) -> Iterator[str]:
    yield "distill:"
    yield f"  students: [{draft.student}] # several are trained in one pass; timm:NAME and torchvision:NAME, too"
    epochs, batch = (200, 128) if draft.input.channels == 3 else (80, 64)
    yield f"  epochs: {epochs} # how often each image is seen, always changed a little; or steps: N"
    yield f"  batch_size: {batch} # images in a step"
    if draft.input.channels == 3:
        yield "  augment: {crop: 0.125, flip: true} # shifts and mirror images; flip: false where left and right matter"


def write_recipe(text: str, file: Path, force: bool = False) -> None:
    """Write ``text`` after a check that it is a recipe. Raises UsageError for a file that exists, unless ``force``."""
    if file.exists() and not force:
        raise UsageError(f"{file} is there already: --force replaces it, -o names another file")
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file}: a recipe's name ends in .yaml")
    part = file.with_name(f"{temporary_name('init')}.yaml")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        resolve(str(part), environ={})
        part.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
