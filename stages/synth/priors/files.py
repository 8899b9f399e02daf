"""Which files of a diffusers folder are read: of the formats and variants that a hub holds, one for each network."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from manifests.errors import DataError

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
    found = {PurePosixPath(name) for name in names}
    pipeline = PurePosixPath("model_index.json") in found
    read = [file for file in found if file.suffix in CONFIGS]
    for folder in {file.parent for file in found}:
        if not (pipeline and folder == PurePosixPath(".")):
            weights = _chosen([file.name for file in found if file.parent == folder], variant)
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
    for wanted in dict.fromkeys((variant, None)):
        for kind in ("safetensors", "bin"):
            if matches := [match for match in weights if (match["variant"], match["format"]) == (wanted, kind)]:
                return matches
    return []


def _weights(names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := _WEIGHTS.fullmatch(name))]
