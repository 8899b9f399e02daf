"""Find a prior by path, hub id or ``embedded:`` name; load the class that fits its pipeline. Finding needs no torch."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import DataError, UsageError
from stages.synth.settings import PriorSettings

if TYPE_CHECKING:
    from stages.synth.prior import Prior

WEIGHTS = (".safetensors", ".json", ".txt", ".model")  # what decides a prior's output; pickled weights are never read
SUPPORTED = {"StableDiffusionPipeline": "text"}


def locate(path: str) -> Path:
    """The local folder of a prior; a hub id is downloaded (safetensors and configs only) or found in the cache.

    Raises:
        UsageError: unknown ``embedded:`` name.
        DataError: no such folder or hub id, or a folder that is no diffusers pipeline.
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
            f"prior {path}: no such folder (expected a diffusers folder, org/name on the hub, embedded:NAME)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=[f"*{suffix}" for suffix in WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"prior {path}: neither a local folder nor a hub id that can be fetched ({reason})") from error


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
    if name not in SUPPORTED:
        raise DataError(f"prior {folder}: pipeline {name!r} is not supported; supported: {', '.join(SUPPORTED)}")
    return content


def prior_identity(settings: PriorSettings) -> dict[str, Any]:
    """What the manifest records of a prior: name, pipeline class, sha256 over its files, conditioning, image size."""
    folder = locate(settings.path)
    index = read_index(folder)
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in WEIGHTS):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
        size = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"prior {folder}: damaged or missing unet/config.json or vae/config.json ({error})") from error
    return {
        "name": settings.path,
        "pipeline": index["_class_name"],
        "conditioning": SUPPORTED[index["_class_name"]],
        "image_size": size,
        "sha256": digest.hexdigest(),
    }


def load_prior(settings: PriorSettings, device: str) -> "Prior":
    """The prior on ``device``, frozen and in eval mode."""
    folder = locate(settings.path)
    read_index(folder)
    from stages.synth.text_prior import TextPrior

    return TextPrior(folder, settings, device)
