"""``factory export data``: each format read again by the libraries that it is for."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifests.curate import Selection
from manifests.errors import DataError, UsageError
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import ShardWriter
from manifests.storage import Storage
from pipeline.export_data import FORMATS, STATE, export_data, folder_names
from tests.manifests.samples import INFO, make_row

NAMES = ("zebra", "apple/pie", "two")  # not in the order of their names, one no name of a folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    storage = Storage(tmp_path_factory.mktemp("run"))
    for shard in range(2):
        with ShardWriter(storage, shard, INFO.fingerprint) as writer:
            for index in range(9):
                image = io.BytesIO()
                Image.fromarray(np.full((32, 32, 3), shard * 100 + index, np.uint8)).save(image, "PNG")
                writer.add(make_row(shard, index), image.getvalue())
            writer.commit()
    merge(storage, replace(INFO, class_names=NAMES))
    return Manifest.open(storage.url)


def images_of(run: Manifest) -> dict[str, tuple[bytes, int]]:
    return {key: (run.read(i), int(run.labels[i])) for i, key in enumerate(run.column("key"))}


def test_parquet(run: Manifest, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    result = export_data(run.url, "parquet", str(tmp_path / "out"), quiet=True)
    assert (result.images, result.classes, result.files, result.written) == (len(run), 3, 1, 1)
    rows = pq.read_table(tmp_path / "out").to_pylist()  # as pandas does: every file of the folder
    assert {row["key"]: (row["image"]["bytes"], row["label"]) for row in rows} == images_of(run)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == [*NAMES] and len(loaded) == len(run)
    assert loaded[3]["image"].getpixel((0, 0)) == Image.open(io.BytesIO(run.read(3))).getpixel((0, 0))
    alone = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/*.parquet"), cache_dir=str(tmp_path / "c"))
    assert alone["train"].features["label"].names == [*NAMES]


def test_imagefolder(run: Manifest, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    export_data(run.url, "imagefolder", str(tmp_path / "out"), quiet=True)
    read = ImageFolder(str(tmp_path / "out"))
    assert read.classes == ["0-zebra", "1-apple-pie", "2-two"]
    found = {Path(path).stem: (Path(path).read_bytes(), label) for path, label in read.samples}
    assert found == images_of(run)


def test_webdataset(run: Manifest, tmp_path: Path) -> None:
    import webdataset

    result = export_data(run.url, "webdataset", str(tmp_path / "out"), part_mb=1, quiet=True)
    url = result.use.split('"')[1]
    samples = [*webdataset.WebDataset(url, shardshuffle=False)]
    assert {s["__key__"]: (s["png"], int(s["cls"])) for s in samples} == images_of(run)
    assert all(json.loads(sample["json"])["kept"] for sample in samples)
    from timm.data import create_dataset

    assert len([*create_dataset("wds/", root=str(tmp_path / "out"), split="train", input_key="png;jpg")]) == len(run)


def test_datasets_read_exported_tars(run: Manifest, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    export_data(run.url, "webdataset", str(tmp_path / "out"), Selection("label == 0"), quiet=True)
    rows = [*datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)]
    assert len(rows) == (run.labels == 0).sum() and {row["cls"] for row in rows} == {0}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export_data._cuts", lambda sizes, limit: [4, 8, 12])


@pytest.mark.parametrize("form", [*FORMATS])
@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_export_goes_on_to_the_same_bytes(
    form: str, run: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(folder: str) -> dict[str, bytes]:
        paths = (path for path in (tmp_path / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in paths}

    export_data(run.url, form, str(tmp_path / "whole"), quiet=True)
    whole = files("whole")

    def broken(read: Callable[..., list[bytes]]) -> Callable[..., list[bytes]]:
        def read_many(self: Manifest, indices: np.ndarray) -> list[bytes]:
            if 9 in indices:
                raise DataError("sample 9 was altered")
            return read(self, indices)

        return read_many

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "read_many", broken(Manifest.read_many))
        with pytest.raises(DataError, match="sample 9"):
            export_data(run.url, form, str(tmp_path / "out"), quiet=True)
    left = files("out")
    assert {name: whole[name] for name in left} == left and STATE in left and "README.md" not in left
    export_data(run.url, form, str(tmp_path / "out"), quiet=True)
    assert files("out") == whole and not (tmp_path / "out/tmp").exists()
    assert export_data(run.url, form, str(tmp_path / "out"), quiet=True).written == 0


def test_folders_that_are_not_taken(run: Manifest, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"not empty \(it holds notes.txt\)"):
        export_data(run.url, "parquet", str(tmp_path / "mine"), quiet=True)
    with pytest.raises(UsageError, match="would be inside the dataset"):
        export_data(run.url, "parquet", f"{run.storage.url}/out", quiet=True)
    export_data(run.url, "webdataset", str(tmp_path / "out"), Selection("label == 0"), quiet=True)
    with pytest.raises(DataError, match=r"holds another export \(its selection differs\)"):
        export_data(run.url, "webdataset", str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "mine" / STATE).exists()


def test_a_class_without_images_is_said(run: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_data(run.url, "imagefolder", str(tmp_path / "out"), Selection("label != 1"), quiet=True)
    assert "1 of 3 classes have no image: apple/pie: a reader that numbers the folders" in capsys.readouterr().err


def test_folders_sort_as_the_labels_do() -> None:
    assert folder_names(["cat", "dog"]) == ("cat", "dog")
    for names in (["b", "a"], ["..", "a"], ["a/b", "c"], ["a", "a"], ["", "b"], [f"c{i}" for i in range(12)]):
        folders = folder_names(names)
        assert [*folders] == sorted({*folders}) and not any("/" in name or name.startswith(".") for name in folders)
