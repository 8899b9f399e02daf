from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from manifests.curate import Selection, parse_best, read_keys
from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from tests.manifests.samples import make_dataset, make_row

KEYS = ["000001-000002", "000000-000003", "000000-000000"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.open(make_dataset(tmp_path_factory.mktemp("data"), shards=2, rows=10).url)


def written(folder: Path, suffix: str, keys: list[str] = KEYS) -> str:
    path = folder / f"keys{suffix}"
    table = pa.table({"score": [0.5] * len(keys), "key": keys})
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        path.write_text("\n".join(keys) + "\n\n")
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".txt"])
def test_keys_of_any_file_are_taken_or_left_out(suffix: str, tmp_path: Path, manifest: Manifest) -> None:
    file = written(tmp_path, suffix)
    assert read_keys(file).to_pylist() == KEYS
    assert Selection(keys=file).of(manifest).column("key") == sorted(KEYS)
    others = Selection(exclude_keys=file).of(manifest).column("key")
    assert len(others) == len(manifest) - 3 and not {*KEYS} & {*others}


def test_keys_of_rejected_images_are_left_out_with_a_warning(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path, ".txt", ["000000-000004", "000000-000000"])  # the first was rejected
    assert Selection(keys=file).of(manifest).column("key") == ["000000-000000"]
    assert "1 of its 2 keys are left out" in caplog.text
    assert len(Selection(keys=file, include_rejected=True).of(manifest)) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["000000-000000", "000007-000000"], "1 of its 2 keys are none of .*: 000007-000000"),
        (["cat.png"], "'cat.png' is no key of an image"),
        ([], "no keys in it"),
    ],
)
def test_keys_of_another_dataset(keys: list[str], message: str, tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(DataError, match=message):
        Selection(keys=written(tmp_path, ".txt", keys)).of(manifest)


def test_files_that_hold_no_keys(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    (tmp_path / "numbers.csv").write_text("key2\n12\n")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff")
    for name, message in (
        ("x.parquet", "not a readable Parquet file"),
        ("two.csv", "no column key; its columns: a, b"),
        ("numbers.csv", "of type int64, expected text"),
        ("image.txt", "no text"),
        ("absent.txt", "cannot read the keys"),
    ):
        with pytest.raises(DataError, match=message):
            read_keys(str(tmp_path / name))


def test_the_best_of_each_class(manifest: Manifest) -> None:
    rows = [make_row(shard, index) | {"at": (shard, index)} for shard in range(2) for index in range(10)]
    kept = [row for row in rows if row["kept"]]
    for text, sign in (("2:confidence", -1), ("2:-confidence", 1)):
        expected = set()
        for label in range(3):
            ranked = sorted((row for row in kept if row["label"] == label), key=lambda row: sign * row["confidence"])
            expected |= {row["at"] for row in ranked[:2]}
        chosen = Selection(best=text).of(manifest)
        assert {tuple(map(int, key.split("-"))) for key in chosen.column("key")} == expected
        assert chosen.column("key") == sorted(chosen.column("key"))
    assert len(Selection(best="1:cosine", where="label == 0").of(manifest)) == 1  # rows without a cosine are none


@pytest.mark.parametrize("text", ["confidence", "0:confidence", "3:prompt", "3:nothing", "-3:confidence"])
def test_a_wrong_best(text: str) -> None:
    with pytest.raises(UsageError, match="best"):
        parse_best(text)


def test_a_best_that_nothing_has(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="none of its .* selected rows has a loss_adv"):
        Selection(best="3:loss_adv").of(manifest)
