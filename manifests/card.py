"""What other tools read of a dataset folder: ``README.md``, a Hugging Face dataset card, and ``_info.json`` for timm.

Both follow from the dataset's description and its done records alone and are written again at every merge. The card
lists the *committed* tars and the type of every column, so that ``datasets.load_dataset(FOLDER)`` finds every row once:
without it, that library takes JSON files for the data and the first rows for the columns.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml

from manifests.dataset import DatasetInfo, unique_names
from manifests.errors import plain
from manifests.schema import EXTENSIONS, PLACEMENT, SCHEMA
from manifests.storage import Storage

CARD, TIMM_INFO = "README.md", "_info.json"
SPLIT = "train"
CITATIONS = {
    "diffdfkd": "DiffDFKD: Data-free Knowledge Distillation with Diffusion Models (Qi et al.)",
    "dmkd": "DM-KD: Is Synthetic Data From Diffusion Models Ready for Knowledge Distillation? (Li et al. 2023, arXiv "
    "2305.12954)",
    "dda": "DDA: Li et al. 2024",
    "cmi": "CMI: Contrastive Model Inversion for Data-Free Knowledge Distillation (Fang et al. 2021)",
    "deepinversion": "DeepInversion: Dreaming to Distill (Yin et al. 2020)",
}
"""What to cite for a method."""


LIMITS = (
    "Images show what the prior and the classifier know, with their biases; they are made to train a student of "
    "this classifier,",
    "not to look real. Labels are what was asked for, not what a person saw. Their use is bound by the licenses of "
    "the prior and",
    "of the classifier.",
)
LIMITS_OF_IMPORTED = (
    "Images were cut and resized to the classifier's view. Where they came without labels, labels are its answers, not "
    "what a person saw.",
    "Their use is bound by the licenses of their source and of the classifier.",
)


def write_card(storage: Storage, info: DatasetInfo, kept: int) -> None:
    """Write both files into the dataset's folder; ``kept``: rows that no filter of stage 1 rejected."""
    storage.write(CARD, dataset_card(info, kept).encode())
    storage.write(TIMM_INFO, timm_info((tar.name, tar.rows) for tar in info.tars))


def dataset_card(info: DatasetInfo, kept: int) -> str:
    """The card of the run folder that ``info`` describes."""
    synth = info.recipe.get("synth")
    settings: Mapping[str, Any] = synth if isinstance(synth, dict) else {}
    method, images = settings.get("method", "unknown"), settings.get("images")
    extension = images.get("format") if isinstance(images, dict) else None
    features: list[dict[str, Any]] = [
        {"name": extension if extension in EXTENSIONS else "png", "dtype": "image"},
        {"name": "cls", "dtype": class_label(info.class_names)},
        {"name": "json", "struct": [feature(field) for field in SCHEMA if field.name not in PLACEMENT]},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]
    names = [markdown(name) for name in info.class_names[:10]] + (["…"] if len(info.class_names) > 10 else [])
    described = [f"{key} {value}" for key, value in _numbers(settings)]
    cite = CITATIONS.get(method) if isinstance(method, str) else None
    lines = [
        f"# {info.rows:,} imported images for knowledge distillation"
        if method == "import"
        else f"# {info.rows:,} synthetic images for data-free knowledge distillation",
        "",
        "Made by dfkd-factory without the classifier's training data: nothing in it is a photograph of anything."
        if method != "import"
        else "Images from elsewhere, imported by dfkd-factory and scored by a classifier.",
        "",
        f"- **Images**: {info.rows:,} of {info.image_size} × {info.image_size} pixels in {len(info.tars):,} tars; "
        f"{kept:,} are kept. Rejected ones are stored, too: `kept` is a column of `json`, so filter by it",
        f"- **Classes**: {len(info.class_names):,} ({', '.join(names)}); `cls` is the class "
        + ("that came with the image, or the classifier's answer, " if method == "import" else "that was asked for, ")
        + "`json.teacher_label` what the classifier sees",
        f"- **Method**: {markdown(method)}" + (f" ({', '.join(described)})" if described else ""),
        f"- **Classifier (teacher)**: {_named(info.teacher, 'architecture')}",
        f"- **License of the images**: {markdown(info.prior.get('license') or 'not stated')}"
        if method == "import"
        else f"- **Prior**: {_named(info.prior, 'pipeline', 'name')}; "
        f"license {markdown(info.prior.get('license') or 'not stated in its folder')}",
        f"- **Settings**: all of them in `resolved.yaml`; fingerprint {markdown(info.fingerprint)}",
        *([f"- **Source**: {markdown(source)}"] if (source := info.prior.get("source")) else []),
        "",
        "## Use",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("FOLDER", split="{SPLIT}")  # every row once, rejected ones included',
        'kept = rows.filter(lambda row: row["json"]["kept"])',
        "```",
        "",
        "webdataset, timm (`wds/` with this folder as root) and Ray Data read the tars as they are; `m.parquet` holds "
        "every column.",
        "`factory export data FOLDER --parquet OUT` (or `--imagefolder`, `--webdataset`) writes a selection.",
        "",
        "## Limits",
        "",
        *(LIMITS_OF_IMPORTED if method == "import" else LIMITS),
        *(("", "## Citation", "", cite) if cite else ()),
        "",
    ]
    tars = [{"config_name": "default", "data_files": [{"split": SPLIT, "path": [tar.name for tar in info.tars]}]}]
    return front_matter(features, tars) + "\n".join(lines)


def front_matter(features: list[dict[str, Any]], configs: list[dict[str, Any]]) -> str:
    """The head of a card: how Hugging Face's ``datasets`` shall read the folder."""
    head = {
        "task_categories": ["image-classification"],
        "tags": ["synthetic-data", "knowledge-distillation", "data-free"],
        "configs": configs,
        "dataset_info": {"features": features},
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1 << 20)}---\n"


def class_label(names: Sequence[str]) -> dict[str, Any]:
    """The type of a label in a card, as ``datasets`` takes it: names are unique."""
    return {"class_label": {"names": {str(number): name for number, name in enumerate(label_names(names))}}}


def label_names(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` printable, not empty and each once, as class labels of other tools have to be."""
    shown = unique_names([plain(name) or "(no name)" for name in names])
    if len(set(shown)) < len(shown):  # "crane (2)" may be a class of its own
        shown = tuple(f"{label}: {name}" for label, name in enumerate(shown))
    return shown


def feature(field: pa.Field) -> dict[str, Any]:
    """A column in a card. Lists of structs and of plain values are written so that every version reads them."""
    kind = field.type
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        return {"name": field.name, "list": [feature(each) for each in kind.value_type]}
    if pa.types.is_list(kind):
        return {"name": field.name, "sequence": _dtype(kind.value_type)}
    return {"name": field.name, "dtype": _dtype(kind)}


def _dtype(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_binary(kind):  # the checksum, in hexadecimal digits
        return "string"
    return {pa.float16(): "float16", pa.float32(): "float32"}.get(kind, str(kind))


def timm_info(tars: Iterable[tuple[str, int]]) -> bytes:
    """``_info.json`` as timm's reader of WebDataset takes it; ``tars``: names and their samples."""
    listed = [*tars]
    split = {
        "name": SPLIT,
        "num_samples": sum(rows for _, rows in listed),
        "filenames": [name for name, _ in listed],
        "shard_lengths": [rows for _, rows in listed],
    }
    return (json.dumps({"splits": {SPLIT: split}}, indent=1) + "\n").encode()


_SHOWN = (("prior", "steps"), ("prior", "cfg_scale"), ("guidance", "step_size"), (None, "seed"), (None, "group_size"))


def _numbers(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The settings that say most, by their dotted keys."""
    for section, key in _SHOWN:
        within = settings.get(section) if section else settings
        value = within.get(key) if isinstance(within, dict) else None
        if isinstance(value, int | float):
            yield f"{section}.{key}" if section else key, f"{value:g}"


def _named(facts: Mapping[str, Any], *names: str) -> str:
    words = [markdown(facts[name]) for name in names if facts.get(name)]
    sha256 = facts.get("sha256")
    return ", ".join([*(words or ["none"]), *([f"sha256 {markdown(sha256)}"] if sha256 else [])])


def markdown(text: object) -> str:
    """``text`` as Markdown shows it: no HTML, web links, pictures, code or further lines come out of a class name.

    GitHub makes links of bare ``https://…`` and ``www.…`` as well.
    """
    return re.sub(r"(?i)([\\`*\[\]]|:(?=//)|(?<=www)\.)", r"\\\1", html.escape(plain(text), quote=False))
