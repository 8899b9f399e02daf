"""Where a prior is (path, hub id, ``embedded:`` name), what kind, and which of its files are read. No torch."""

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from manifests.checked_json import load_tree
from manifests.errors import DataError, UsageError, one_line, plain, suggest
from manifests.plain_files import load_yaml, read_regular
from stages.hub import inside, snapshot
from stages.settings import PriorSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """A kind of diffusers pipeline: what it is conditioned on, and which of its folders hold the networks.

    ``side``: of what the network denoises, where its configuration has none. ``mended``: the pipeline corrects
    configurations of before diffusers 0.9 when it is loaded.
    """

    conditioning: str
    network: str
    vae: str | None
    tiny: str | None = None  # hub id of the AutoencoderTiny that was distilled from this VAE
    image_encoder: str | None = None  # what makes it a :class:`~stages.synth.priors.schedule.VariationPrior`
    side: int | None = None
    mended: bool = False


FAMILIES = {
    "StableDiffusionPipeline": Family("text", "unet", "vae", "madebyollin/taesd", side=64, mended=True),
    "LatentConsistencyModelPipeline": Family("text", "unet", "vae", "madebyollin/taesd", side=64),
    "StableDiffusionXLPipeline": Family("text", "unet", "vae", "madebyollin/taesdxl", side=128),
    "IFPipeline": Family("text", "unet", None),
    "StableUnCLIPImg2ImgPipeline": Family("text", "unet", "vae", "madebyollin/taesd", "image_encoder"),
    "StableDiffusionImageVariationPipeline": Family("image", "unet", "vae", "madebyollin/taesd", "image_encoder"),
    "DiTPipeline": Family("class", "transformer", "vae", "madebyollin/taesd"),
    "LDMPipeline": Family("none", "unet", "vqvae"),
    "DDPMPipeline": Family("none", "unet", None),
    "DDIMPipeline": Family("none", "unet", None),
}


@dataclass(frozen=True)
class Geometry:
    """Latents (or pixels) ``[c, h, w]``, image side, and how many classes the prior knows (0: not conditional).

    ``note``: how the side was settled where the configuration alone does not do so. ``scale_input``: the network was
    distilled with the scale of classifier-free guidance as an input.
    """

    latent: tuple[int, int, int]
    image_size: int
    classes: int
    note: str = ""
    scale_input: bool = False


@dataclass(frozen=True)
class ModelFolder:
    """A local folder of weights; ``variant`` names those that are read of it."""

    folder: Path
    variant: str | None

    @cached_property
    def names(self) -> list[str]:
        """Of its files those that decide what the model computes, relative to the folder."""
        found = (file for pattern in ("*", "*/*") for file in self.folder.glob(pattern) if file.is_file())
        return files_read([file.relative_to(self.folder).as_posix() for file in found], self.variant)

    @cached_property
    def sha256(self) -> str:
        """Over names and contents of the files that decide what the model computes."""
        digest = hashlib.sha256()
        for name in self.names:
            file = self.folder / name
            digest.update(name.encode() + b"\0" + _file_sha256(file))
        return digest.hexdigest()


def _file_sha256(file: Path) -> bytes:
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(4096)
def _sha256(file: Path, size: int, mtime: int, inode: int) -> bytes:
    """Of a file's contents; as long as size, time and inode stay, it is read once in a process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@dataclass(frozen=True)
class PriorSource(ModelFolder):
    """A prior, found once: what ``model_index.json`` and the configurations in its folder say.

    ``scheduler``: ``scheduler_config.json``, its ``_class_name`` that of ``model_index.json``.
    """

    name: str  # in the settings
    index: dict[str, Any]
    geometry: Geometry
    scheduler: dict[str, Any] = field(compare=False)
    loras: tuple[tuple[Path, float], ...] = ()  # files to merge, with their weights

    @cached_property
    def sha256(self) -> str:
        """Over the folder's files, as of every :class:`ModelFolder`, and the LoRA files with their weights."""
        folder = ModelFolder(self.folder, self.variant).sha256
        merged = "".join(f" {_file_sha256(file).hex()} {weight!r}" for file, weight in self.loras)
        return hashlib.sha256(f"{folder}{merged}".encode()).hexdigest() if merged else folder

    @property
    def pipeline(self) -> str:
        """The class of diffusers pipeline."""
        return str(self.index["_class_name"])

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline]

    def part(self, name: str) -> Path:
        """The folder of part ``name``; raises DataError where ``model_index.json`` has no such part."""
        if class_of(self.index, name) is None:
            raise DataError(f"prior {self.folder}: model_index.json has no {name}, which {self.pipeline} needs")
        return part_folder(self.folder, name)

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of part ``name``, read before diffusers reads it, which takes a text for a hub id and
        builds as many layers as a number says. Raises DataError for an integer that no network has."""
        what = f"prior {self.folder}: {name}"
        config = read_json(self.part(name), file, what)
        for key, value in config.items():
            most = MAX_LAYERS if "layers" in key else MAX_INTEGER
            if any(isinstance(number, int) and abs(number) > most for number in _listed(value)):
                raise DataError(f"{what}: {key} in {file} is {str(value)[:80]}, above {most}")
        return config

    @property
    def weights(self) -> dict[str | None, list[str]]:
        """The parts of which each variant is read (None: no variant)."""
        found: dict[str | None, list[str]] = {}
        for file in map(PurePosixPath, self.names):
            if match := _WEIGHTS.fullmatch(file.name):
                parts, part = found.setdefault(_variant(match), []), file.parent.name or "the folder itself"
                parts += [part] if part not in parts else []
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What the manifest records: name, pipeline class, conditioning, image size, sha256 over its files (and its
        license, the number of its classes, and names and weights of merged LoRA files)."""
        return {
            "name": self.name,
            "pipeline": self.pipeline,
            "conditioning": self.family.conditioning,
            "image_size": self.geometry.image_size,
            "sha256": self.sha256,
            **({"license": license} if (license := license_in(self.folder)) else {}),
            **({"classes": self.geometry.classes} if self.geometry.classes else {}),
            **({"cfg_scale_input": True} if self.geometry.scale_input else {}),
            **({"lora": [[lora.name, weight] for lora, weight in self.loras]} if self.loras else {}),
        }

    @property
    def decisions(self) -> dict[str, str]:
        """What was settled and from what, for people."""
        config, shape = self.scheduler, "×".join(map(str, self.geometry.latent))
        weights = [f"{variant or 'no'} variant of {', '.join(parts)}" for variant, parts in self.weights.items()]
        return {
            "weights": "; ".join(weights),
            "noise schedule": f"of its {config['_class_name']}, predicts {config.get('prediction_type', 'epsilon')}",
            "size": f"{shape} for {self.geometry.image_size} px" + (self.geometry.note and f" ({self.geometry.note})"),
        }


MAX_CARD = 1 << 20


def license_in(folder: Path) -> str | None:
    """The license that the model card in ``folder`` states (its name, where that is ``other``), for people."""
    try:
        head = read_regular(folder / "README.md", MAX_CARD).removeprefix(b"---").partition(b"\n---")[0]
        values, _ = load_yaml(head, "README.md")
    except (OSError, UsageError):  # no card, or none that is one
        return None
    found = values.get("license") if isinstance(values, dict) else None
    if found == "other":
        found = values.get("license_name") or found
    return plain(found)[:100] if isinstance(found, str) and found else None


MAX_LAYERS, MAX_INTEGER = 1024, 2**24


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def part_folder(folder: Path, name: str) -> Path:
    """Where diffusers reads part ``name`` of a pipeline: its own folder, or, as early repositories have it, the
    pipeline's."""
    return folder / name if (folder / name).is_dir() else folder


def class_of(index: dict[str, Any], name: str) -> str | None:
    """The class that ``model_index.json`` gives part ``name``."""
    entry = index.get(name)
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return kind if isinstance(kind, str) else None


def locate_prior(settings: PriorSettings) -> PriorSource:
    """The prior that ``settings`` name. Errors as :func:`locate`; DataError where the folder holds no supported
    pipeline, UsageError where CFG is asked of an unconditional one (the default scale just does not apply to it)."""
    folder = locate(settings.path, variant=settings.variant)
    index = read_index(folder)
    family = FAMILIES[index["_class_name"]]
    if family.conditioning == "none" and settings.cfg_scale not in (1, PriorSettings().cfg_scale):
        raise UsageError(
            f"prior {folder} is unconditional, so prior.cfg_scale={settings.cfg_scale:g} does nothing: leave it out"
        )
    shape, scheduler = geometry(folder, family), read_scheduler(folder, index)
    loras = tuple((_lora_file(lora.path), lora.weight) for lora in settings.lora)
    source = PriorSource(folder, settings.variant, settings.path, index, shape, scheduler, loras)
    if settings.variant and settings.variant not in source.weights:
        log.warning("prior %s has no weights of the variant %r: its plain ones are read", folder, settings.variant)
    return source


def _lora_file(path: str) -> Path:
    """The LoRA file at ``path``, fetched where that is ``org/name/FILE`` of a hub. Raises DataError where none is."""
    if Path(path).is_file():
        return Path(path)
    what = "expected a safetensors file, or org/name/FILE of a hub repository"
    if path.startswith((".", "/", "~")) or path.count("/") < 2 or not path.endswith(".safetensors"):
        raise DataError(f"LoRA {path}: no such file ({what})")
    owner, name, file = path.split("/", 2)
    found = snapshot(f"{owner}/{name}", "LoRA", lambda names: [name for name in names if name == file]) / file
    if not found.is_file():
        raise DataError(f"LoRA {path}: the repository has no such file")
    return found


def locate_tiny_decoder(name: str | None, prior: PriorSource) -> ModelFolder:
    """The AutoencoderTiny called ``name``, by default the one made for the kind of VAE of ``prior``.

    Raises UsageError where there is none to default to, DataError where it cannot be found.
    """
    name = name or prior.family.tiny
    if name is None:
        raise UsageError(
            f"no AutoencoderTiny is known for {prior.pipeline}: name one with guidance.tiny_decoder, or use full"
        )
    return ModelFolder(locate(name, "tiny decoder"), None)


def locate(path: str, what: str = "prior", variant: str | None = None) -> Path:
    """The local folder of a prior; of a hub id the files that are read are downloaded, or found in the cache.
    ``what`` names the thing in errors.

    Raises:
        UsageError: unknown ``embedded:`` name.
        DataError: a single file, links out of the folder, or as :func:`~stages.hub.snapshot`.
    """
    if path.startswith("embedded:"):
        folder = Path(str(files("stages"))) / "assets" / path.removeprefix("embedded:")
        if not folder.is_dir():
            known = sorted(f.parent.name for f in (folder.parent).glob("*/model_index.json"))
            raise UsageError(f"no embedded prior {path!r}; {suggest(path, [f'embedded:{k}' for k in known])}")
        return folder
    if Path(path).is_file() or path.endswith(SINGLE_FILES):
        raise DataError(f"{what} {path}: no folder as diffusers saves it{_convert(path)}")
    folder = snapshot(path, what, lambda names: files_read(names, variant))
    for name in ModelFolder(folder, variant).names:
        inside(folder, name)
    return folder


SINGLE_FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _convert(file: str) -> str:
    """How to make a folder of the single-file checkpoint ``file``."""
    return (
        "; convert a single-file checkpoint once, in Python: diffusers.StableDiffusionPipeline (or …XLPipeline)"
        f'.from_single_file("{file}").save_pretrained("FOLDER")'
    )


MAX_CONFIG = 16 * 2**20


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """The JSON object ``name`` in ``folder``; raises DataError, beginning with ``what``, where there is none."""
    file = folder / name
    if not file.is_file():
        raise DataError(f"{what}: {name} is missing")
    try:
        content = load_tree(read_regular(file, MAX_CONFIG), finite=False)  # solvers have infinite numbers
    except (OSError, ValueError) as error:
        raise DataError(f"{what}: {name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{what}: {name} holds no JSON object")
    return content


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's ``model_index.json``; raises :class:`DataError` where it is absent, damaged or unsupported."""
    what = f"prior {folder}"
    if not (folder / "model_index.json").exists():
        single = sorted(f.name for f in folder.iterdir() if f.suffix in SINGLE_FILES and not _WEIGHTS.fullmatch(f.name))
        raise DataError(
            f"{what}: no model_index.json, so this is no diffusers pipeline folder"
            + (_convert(str(folder / single[0])) if single else "")
        )
    content = read_json(folder, "model_index.json", what)
    name = content.get("_class_name")
    if isinstance(name, list):  # [file in the repository, class]
        raise DataError(
            f"{what}: its pipeline {name!r} is code of its own, which is not run; if the parts are those of one of "
            f"{', '.join(FAMILIES)}, write that name into model_index.json as _class_name"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise DataError(f"{what}: pipeline {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return content


def read_scheduler(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """``scheduler_config.json`` with the class that ``model_index.json`` names, if it does."""
    try:
        config = read_json(part_folder(folder, "scheduler"), "scheduler_config.json", f"prior {folder}: scheduler")
    except DataError as error:
        raise DataError(
            f"{error}; sampling needs the noise schedule that the network was trained with: save that scheduler there"
        ) from error
    return config | {"_class_name": class_of(index, "scheduler") or config.get("_class_name")}


def geometry(folder: Path, family: Family) -> Geometry:
    """Sizes from the configs alone; raises :class:`DataError` where the parts do not fit each other."""
    what = f"prior {folder}"

    def config(name: str) -> dict[str, Any]:
        return read_json(part_folder(folder, name), "config.json", f"{what}: {name}")

    network, vae = config(family.network), config(family.vae) if family.vae else {}
    if family.image_encoder:
        config(family.image_encoder)
    side, note = _side(network, family, f"{what}: {family.network}/config.json")
    names = " or ".join(f"{name}/config.json" for name in (family.network, family.vae) if name)
    try:
        channels = int(network["in_channels"])
        widths = "decoder_block_out_channels" if "decoder_block_out_channels" in vae else "block_out_channels"
        pixels = side * 2 ** (min(len(vae[widths]), 32) - 1) if vae else side
        classes = int(network["num_embeds_ada_norm"]) if family.conditioning == "class" else 0
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{what}: damaged {names} ({type(error).__name__}: {error})") from error
    if not (0 < channels <= MAX_CHANNELS and 0 < pixels <= MAX_SIDE):
        raise DataError(f"{what}: {names} make {channels} channels and {pixels} pixels, which no prior has")
    takes = f"{what}: {family.network} takes {channels} channels"
    if vae and channels != vae.get("latent_channels"):  # an inpainting model, or parts of two models
        raise DataError(f"{takes}, but {family.vae} makes {vae.get('latent_channels')}: they do not belong together")
    if not vae and channels not in (1, 3):
        raise DataError(f"{takes}, but images have 1 or 3")
    out = network.get("out_channels")
    if out is not None and out not in (channels, 2 * channels):
        raise DataError(f"{takes} and returns {out}: expected {channels}, or {2 * channels} with a learned sigma")
    return Geometry((channels, side, side), pixels, classes, note, bool(network.get("time_cond_proj_dim")))


MAX_CHANNELS, MAX_SIDE = 1024, 8192


def _side(network: dict[str, Any], family: Family, what: str) -> tuple[int, str]:
    """The side of what a network denoises, and how it was settled; as the pipelines of diffusers settle it."""
    given = network.get("sample_size")
    if given is None:
        if family.side is None:
            raise DataError(f"{what} has no sample_size: write the side of what it denoises there")
        return family.side, f"its configuration has no sample_size: {family.side} is the pipeline's"
    side = given[0] if isinstance(given, list) and len(given) == 2 and given[0] == given[1] else given
    if not isinstance(side, int) or isinstance(side, bool) or side <= 0:
        raise DataError(
            f"{what} has sample_size {str(given)[:80]!r}: only squares are sampled, so it must be one number > 0"
        )
    if family.mended and side < 64 and isinstance(given, int) and _before_0_9(network, what):
        return 64, f"of before diffusers 0.9, whose sample_size {side} diffusers corrects to 64"
    return side, ""


def _before_0_9(config: dict[str, Any], what: str) -> bool:
    from packaging.version import InvalidVersion, Version

    written = config.get("_diffusers_version", "0.9")
    try:
        return Version(Version(written).base_version) < Version("0.9.0.dev0")
    except (InvalidVersion, TypeError):
        raise DataError(f"{what} has _diffusers_version {written!r}, which is no version") from None


def check_labels(settings: PriorSettings, source: str, classes: int, names: Sequence[str]) -> None:
    """Every class of the teacher needs a label that the prior knows and a name of its own; raises :class:`UsageError`
    listing the rest."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"prior {source} is class-conditional and labels go by name, but two of the teacher's classes are called "
            f"{twice[0]}: give them different names in teacher.class_names"
        )
    if settings.labels_by_index:
        if len(names) != classes:
            raise UsageError(
                f"prior {source} knows {classes} classes, the teacher knows {len(names)}: prior.labels_by_index cannot "
                "pair them"
            )
        return
    missing = [name for name in names if name not in settings.labels]
    if missing:
        raise UsageError(
            f"prior {source} is class-conditional: prior.labels gives no label for {len(missing)} classes of the "
            f"teacher: {', '.join(missing)}; map each to a label from 0 to {classes - 1}"
        )
    outside = [f"{name}: {label}" for name, label in settings.labels.items() if not 0 <= label < classes]
    if outside:
        raise UsageError(f"prior {source} has labels 0 to {classes - 1}; prior.labels maps {', '.join(outside)}")


# Which files of a folder are read.

CONFIGS = (".json", ".txt", ".model")
UNREAD = ("safety_checker", "watermarker")  # parts of a pipeline that no prior here has
NETWORKS = {family.network for family in FAMILIES.values()}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5}(?:\.(?P<legacy>[^.]+))?)?\.(?P<format>safetensors|bin)"
)

_INDEX = re.compile(r".+\.(?:safetensors|bin)(?:\.[^.]+)?\.index(?:\.[^.]+)?\.json")


def files_read(names: Iterable[str], variant: str | None) -> list[str]:
    """Of the files ``names`` of a pipeline (relative, with ``/``) those that decide what it computes, sorted.

    Configurations, and for each part one format and variant of its weights; in the folder itself only where it holds a
    network: alone, or of a pipeline as early repositories have it, without a folder for its network.

    >>> files_read(["model_index.json", "v1-5.safetensors", "unet/config.json", "unet/model.fp16.safetensors",
    ...             "unet/model.safetensors", "unet/model.non_ema.safetensors", "unet/model.bin"], None)
    ['model_index.json', 'unet/config.json', 'unet/model.safetensors']
    """
    files = {file for name in names if len((file := PurePosixPath(name)).parts) <= 2}
    folders = {file.parent for file in files} - {PurePosixPath(part) for part in UNREAD}
    read = [file for file in files if file.suffix in CONFIGS and file.parent in folders]
    for folder in folders:
        if folder != PurePosixPath(".") or not any(str(other) in NETWORKS for other in folders):
            weights = _chosen([file.name for file in files if file.parent == folder], variant)
            read += [folder / match.string for match in weights]
    return sorted(map(str, read))


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files in ``folder`` that hold its network, as :func:`files_read` chooses them.

    Raises DataError where an index of shards lists others, or where git has left pointers for them.
    """
    names = sorted(file.name for file in folder.glob("*") if file.is_file())
    chosen = [match.string for match in _chosen(names, variant)]
    for index in (name for name in names if _INDEX.fullmatch(name)):
        shards = read_json(folder, index, str(folder)).get("weight_map")
        listed = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        if listed & set(chosen) and (others := sorted(listed - set(chosen))):
            raise DataError(f"{folder}: {index} lists {others[0]!r}, which is absent or none of the files read")
    for name in chosen:
        with (folder / name).open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise DataError(f"{folder / name} is a pointer of git-lfs, not weights: run `git lfs pull` there")
    return [folder / name for name in chosen]


LFS = b"version https://git-lfs"


def loading(folder: Path, variant: str | None) -> dict[str, Any]:
    """``variant`` and ``use_safetensors`` of ``from_pretrained`` for the network in ``folder``.

    Raises DataError where there are weights, but only of variants that ``prior.variant`` does not name.
    """
    names = [file.name for file in folder.glob("*") if file.is_file()]
    if weights := _chosen(names, variant):
        return {"variant": _variant(weights[0]), "use_safetensors": weights[0]["format"] == "safetensors"}
    if others := sorted({_variant(match) or "" for match in _weights(names)}):
        raise DataError(f"{folder} holds only weights of the variant {' or '.join(others)}: name it, prior.variant")
    raise DataError(f"{folder} holds no weights (expected .safetensors or .bin, as diffusers names them)")


def _chosen(names: Iterable[str], variant: str | None) -> list[re.Match[str]]:
    """Of one folder's files those that hold the network: ``variant`` where there is such a file, else the plain one,
    in safetensors where there are such, else as ``.bin`` (which torch reads with ``weights_only``)."""
    weights = _weights(names)
    for choice in dict.fromkeys((variant, None)):
        for kind in ("safetensors", "bin"):
            if matches := [match for match in weights if (_variant(match), match["format"]) == (choice, kind)]:
                return matches
    return []


def _variant(match: re.Match[str]) -> str | None:
    return match["variant"] or match["legacy"]


def _weights(names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := _WEIGHTS.fullmatch(name))]
