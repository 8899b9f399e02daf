"""The card and timm's index of a dataset folder, read by the tools that they are for."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from manifests.card import dataset_card, label_names, markdown
from manifests.merge import merge
from manifests.shard import ShardWriter
from manifests.storage import Storage
from tests.manifests.samples import INFO, make_row

HOSTILE = ("a<b>\n---\nx", "- 'q': [y] ![](https://evil)", "two")


def picture(shard: int, index: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shard * 20, index * 20, 5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 8 images, of which the first has no latent CutMix in any row; an uncommitted tar beside them."""
    folder = tmp_path_factory.mktemp("run")
    storage = Storage(folder)
    for shard in range(2):
        with ShardWriter(storage, shard, INFO.fingerprint) as writer:
            for index in range(8):
                image = io.BytesIO()
                picture(shard, index).save(image, "PNG")
                writer.add(make_row(shard, index) | ({} if shard else {"lca": []}), image.getvalue())
            writer.commit()
    merge(storage, replace(INFO, class_names=HOSTILE))
    (folder / "shards/000009-aaaaaaaaaaaa.tar").write_bytes(b"of a killed attempt")
    return folder


def check_rows(rows: list[dict[str, Any]]) -> None:
    assert sorted(row["__key__"] for row in rows) == [f"{s:06d}-{i:06d}" for s in range(2) for i in range(8)]
    for row in rows:
        shard, index = map(int, row["__key__"].split("-"))
        made = make_row(shard, index)
        assert np.array_equal(np.asarray(row["png"]), np.asarray(picture(shard, index)))
        assert row["cls"] == row["json"]["label"] == made["label"]
        assert (row["json"]["kept"], row["json"]["prompt"]) == (made["kept"], made["prompt"])
        assert len(row["json"]["lca"]) == (shard and index % 2)


def test_datasets_loads_every_row_once(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    loaded = datasets.load_dataset(str(run), cache_dir=str(tmp_path), split="train")
    check_rows([*loaded])
    assert loaded.features["cls"].names == [*label_names(HOSTILE)]
    check_rows([*datasets.load_dataset(str(run), split="train", streaming=True)])


def test_timm_reads_a_folder_as_it_is(run: Path) -> None:
    from timm.data import create_dataset

    samples = [*create_dataset("wds/", root=str(run), split="train", input_key="jpg;png")]
    assert sorted(label for _, label in samples) == sorted(make_row(s, i)["label"] for s in range(2) for i in range(8))
    split = json.loads((run / "_info.json").read_text())["splits"]["train"]
    assert split["num_samples"] == sum(split["shard_lengths"]) == 16


def test_a_card_cannot_be_written_by_a_class_name(run: Path) -> None:
    head, _, body = (run / "README.md").read_text()[4:].partition("\n---\n")
    described = yaml.safe_load(head)
    assert [*described] == ["task_categories", "tags", "configs", "dataset_info"]
    assert len(described["configs"][0]["data_files"][0]["path"]) == 2  # the committed ones
    assert "a&lt;b&gt;" in body and r"!\[\](https\://evil)" in body and "14 are kept" in body
    assert "https://" not in body and "\n---\n" not in body


def test_label_names_are_unique_and_printable() -> None:
    assert label_names(["crane", "dog", "crane"]) == ("crane (0)", "dog", "crane (2)")
    names = label_names(["crane", "crane (0)", "crane", "", "\x1b[31m"])
    assert len(set(names)) == 5 and all(name.isprintable() for name in names)


def test_the_card_says_what_the_dataset_says() -> None:
    info = replace(
        INFO,
        recipe={"synth": {"method": "dmkd", "images": {"format": "webp"}, "prior": {"steps": 25}}},
        prior={"name": "p", "license": "research-only", "sha256": "ef" * 32},
    )
    card = dataset_card(info, 0)
    assert "license research-only" in card and "prior.steps 25" in card and "DM-KD" in card and "name: webp" in card


def test_markdown_takes_the_meaning_out_of_a_name() -> None:
    assert markdown("<b>`x`\n[l](http://e.x)") == r"&lt;b&gt;\`x\`\\n\[l\](http\://e.x)"
