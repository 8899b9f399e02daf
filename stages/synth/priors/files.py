"""Where a prior is (path, hub id, ``embedded:`` name), what kind, and which of its files are read. No torch."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from manifests.errors import DataError, UsageError
from stages.settings import PriorSettings


class NotFetched(DataError):
    """A prior on the hub that is not in the cache and cannot be downloaded now."""


@dataclass(frozen=True)
class Family:
    """A kind of diffusers pipeline: what it is conditioned on, and which of its folders hold the networks."""

    conditioning: str
    network: str
    vae: str | None
    tiny: str | None = None  # hub id of the AutoencoderTiny that was distilled from this VAE
    image_encoder: str | None = None  # what makes it a :class:`~stages.synth.priors.schedule.VariationPrior`


FAMILIES = {
    "StableDiffusionPipeline": Family("text", "unet", "vae", "madebyollin/taesd"),
    "LatentConsistencyModelPipeline": Family("text", "unet", "vae", "madebyollin/taesd"),
    "StableDiffusionXLPipeline": Family("text", "unet", "vae", "madebyollin/taesdxl"),
    "IFPipeline": Family("text", "unet", None),
    "StableUnCLIPImg2ImgPipeline": Family("text", "unet", "vae", "madebyollin/taesd", "image_encoder"),
    "DiTPipeline": Family("class", "transformer", "vae", "madebyollin/taesd"),
    "LDMPipeline": Family("none", "unet", "vqvae"),
    "DDPMPipeline": Family("none", "unet", None),
    "DDIMPipeline": Family("none", "unet", None),
}


@dataclass(frozen=True)
class Geometry:
    """Latents (or pixels) ``[c, h, w]``, image side, and how many classes the prior knows (0: not conditional)."""

    latent: tuple[int, int, int]
    image_size: int
    classes: int


@dataclass(frozen=True)
class ModelFolder:
    """A local folder of weights; ``variant`` names those that are read of it."""

    folder: Path
    variant: str | None

    @cached_property
    def sha256(self) -> str:
        """Over names and contents of the files that decide what the model computes."""
        digest = hashlib.sha256()
        names = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]
        for name in files_read(names, self.variant):
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
    """A prior, found once: what ``model_index.json`` and the configurations in its folder say."""

    name: str  # in the settings
    index: dict[str, Any]
    geometry: Geometry
    loras: tuple[tuple[Path, float], ...] = ()  # files to merge, with their weights

    @property
    def pipeline(self) -> str:
        """The class of diffusers pipeline."""
        return str(self.index["_class_name"])

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline]

    @property
    def identity(self) -> dict[str, Any]:
        """What the manifest records: name, pipeline class, conditioning, image size, sha256 over its files (and the
        number of its classes, and sha256 and weight of merged LoRA files)."""
        return {
            "name": self.name,
            "pipeline": self.pipeline,
            "conditioning": self.family.conditioning,
            "image_size": self.geometry.image_size,
            "sha256": self.sha256,
            **({"classes": self.geometry.classes} if self.geometry.classes else {}),
            **({"lora": [[_file_sha256(file).hex(), weight] for file, weight in self.loras]} if self.loras else {}),
        }


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
    loras = tuple((_lora_file(lora.path), lora.weight) for lora in settings.lora)
    return PriorSource(folder, settings.variant, settings.path, index, geometry(folder, family), loras)


def _lora_file(path: str) -> Path:
    """The LoRA file at ``path``, fetched where that is ``org/name/FILE`` of a hub. Raises DataError where none is."""
    if Path(path).is_file():
        return Path(path)
    what = "expected a safetensors file, or org/name/FILE of a hub repository"
    if path.startswith((".", "/", "~")) or path.count("/") < 2 or not path.endswith(".safetensors"):
        raise DataError(f"LoRA {path}: no such file ({what})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"LoRA {path}: neither a file nor one that can be fetched ({reason}); {what}") from None


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
        NotFetched: a hub id that neither the cache nor the hub gives.
        DataError: no such folder, or a folder that is no diffusers pipeline.
    """
    if path.startswith("embedded:"):
        folder = Path(str(files("stages"))) / "assets" / path.removeprefix("embedded:")
        if not folder.is_dir():
            known = sorted(f.parent.name for f in (folder.parent).glob("*/model_index.json"))
            raise UsageError(f"no embedded prior {path!r}; there is: " + ", ".join(f"embedded:{k}" for k in known))
        return folder
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise DataError(
            f"{what} {path}: no such folder (expected a diffusers folder, org/name on the hub, embedded:NAME)"
        )
    try:
        return _download(path, variant)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFetched(
            f"{what} {path}: neither a local folder nor a hub id that can be fetched ({reason})"
        ) from error


def _download(name: str, variant: str | None) -> Path:
    """What is read of hub repository ``name``, in the hub's cache; as cached where the hub gives no answer."""
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        files = [file.rfilename for file in model_info(name).siblings or ()]
    except Exception as error:  # no such repository, no access, or any error of the HTTP library that the hub uses
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            raise OSError(str(error) or type(error).__name__) from error
    return Path(snapshot_download(name, allow_patterns=files_read(files, variant)))


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's ``model_index.json``; raises :class:`DataError` where it is absent, damaged or unsupported."""
    index = folder / "model_index.json"
    try:
        content = json.loads(index.read_text())
    except FileNotFoundError:
        raise DataError(f"prior {folder}: no model_index.json, so this is no diffusers pipeline folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"prior {folder}: model_index.json cannot be read: {error}") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if name not in FAMILIES:
        raise DataError(f"prior {folder}: pipeline {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return content


def geometry(folder: Path, family: Family) -> Geometry:
    """Sizes from the configs alone; raises :class:`DataError` where the parts do not fit each other."""

    def config(name: str) -> dict[str, Any]:
        return json.loads((folder / name / "config.json").read_text())

    names = " or ".join(f"{name}/config.json" for name in (family.network, family.vae, family.image_encoder) if name)
    try:
        network, vae = config(family.network), config(family.vae) if family.vae else {}
        if family.image_encoder:
            config(family.image_encoder)
        channels, side = int(network["in_channels"]), int(network["sample_size"])
        widths = "decoder_block_out_channels" if "decoder_block_out_channels" in vae else "block_out_channels"
        pixels = side * 2 ** (len(vae[widths]) - 1) if vae else side
        classes = int(network["num_embeds_ada_norm"]) if family.conditioning == "class" else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"prior {folder}: damaged or missing {names} ({error})") from error
    what = f"prior {folder}: {family.network} takes {channels} channels"
    if vae and channels != vae.get("latent_channels"):  # an inpainting model, or parts of two models
        raise DataError(f"{what}, but {family.vae} makes {vae.get('latent_channels')}: they do not belong together")
    if not vae and channels not in (1, 3):
        raise DataError(f"{what}, but images have 1 or 3")
    out = network.get("out_channels")
    if out is not None and out not in (channels, 2 * channels):
        raise DataError(f"{what} and returns {out}: expected {channels}, or {2 * channels} with a learned sigma")
    return Geometry((channels, side, side), pixels, classes)


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
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)"
)


def files_read(names: Iterable[str], variant: str | None) -> list[str]:
    """Of the files ``names`` of a pipeline (relative, with ``/``) those that decide what it computes, sorted.

    Configurations, and for each sub-folder one format and variant of its weights; in the folder itself only where it
    holds a network and no pipeline.

    >>> files_read(["model_index.json", "v1-5.safetensors", "unet/config.json", "unet/model.fp16.safetensors",
    ...             "unet/model.safetensors", "unet/model.non_ema.safetensors", "unet/model.bin"], None)
    ['model_index.json', 'unet/config.json', 'unet/model.safetensors']
    """
    files = {PurePosixPath(name) for name in names}
    pipeline = PurePosixPath("model_index.json") in files
    read = [file for file in files if file.suffix in CONFIGS]
    for folder in {file.parent for file in files}:
        if not (pipeline and folder == PurePosixPath(".")):
            weights = _chosen([file.name for file in files if file.parent == folder], variant)
            read += [folder / match.string for match in weights]
    return sorted(str(file) for file in read if file.parts[0] not in UNREAD)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files in ``folder`` that hold its network, as :func:`files_read` chooses them."""
    names = sorted(file.name for file in folder.glob("*") if file.is_file())
    return [folder / match.string for match in _chosen(names, variant)]


def loading(folder: Path, variant: str | None) -> dict[str, Any]:
    """``variant`` and ``use_safetensors`` of ``from_pretrained`` for the network in ``folder``.

    Raises DataError where there are weights, but only of variants that ``prior.variant`` does not name.
    """
    names = [file.name for file in folder.glob("*") if file.is_file()]
    if weights := _chosen(names, variant):
        return {"variant": weights[0]["variant"], "use_safetensors": weights[0]["format"] == "safetensors"}
    if others := sorted({match["variant"] for match in _weights(names)}):
        raise DataError(f"{folder} holds only weights of the variant {' or '.join(others)}: name it, prior.variant")
    return {"variant": variant, "use_safetensors": True}  # the error of a folder without weights


def _chosen(names: Iterable[str], variant: str | None) -> list[re.Match[str]]:
    """Of one folder's files those that hold the network: ``variant`` where there is such a file, else the plain one,
    in safetensors where there are such, else as ``.bin`` (which torch reads with ``weights_only``)."""
    weights = _weights(names)
    for choice in dict.fromkeys((variant, None)):
        for kind in ("safetensors", "bin"):
            if matches := [match for match in weights if (match["variant"], match["format"]) == (choice, kind)]:
                return matches
    return []


def _weights(names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := _WEIGHTS.fullmatch(name))]
