"""Labeled data as people have them: what is read, what is left out and counted, and what is refused in one line."""

import bz2
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifests.errors import DataError
from stages.distill.eval_data import labeled_images
from tests.distill.drawn import NAMES, square, write_dataset

COUNTED = ("class 0", "class 1", "class 2")
IMAGES = [square(i % 3, np.random.default_rng(i)) for i in range(6)]
LABELS = [i % 3 for i in range(6)]


def read(data, class_names=NAMES):
    """The class numbers in order, and the line on what was read."""
    images = labeled_images(str(data) if isinstance(data, Path) else data, class_names)
    return [label for _, _, label in images], images.line


def refused(data, class_names=NAMES) -> str:
    with pytest.raises(DataError) as caught:
        read(data, class_names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder(path, suffix=".png", below=lambda i: ""):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        place = path / NAMES[label] / below(i)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}{suffix}").write_bytes(image)
    return path


def tar_bytes(*members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(image="png", label="cls", chosen=slice(None), text=lambda c: b"%d" % c):
    pairs = [*zip(IMAGES, LABELS, strict=True)][chosen]
    return [m for i, (d, c) in enumerate(pairs) for m in ((f"{i}.{image}", d), (f"{i}.{label}", text(c)))]


def tar(path, *members):
    path.write_bytes(tar_bytes(*members))
    return path


def table(path, chosen=slice(None), image="image", label="label", names=None, **more):
    values = {image: [{"bytes": d, "path": None} for d in IMAGES[chosen]], label: LABELS[chosen]}
    made = pa.table(values | {name: [value] * len(values[label]) for name, value in more.items()})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path)
    return path


class TestFolders:
    def test_images_at_any_depth(self, tmp_path):
        expected = sorted(LABELS)
        assert read(folder(tmp_path / "flat")) == (expected, "6 in 3 folders")
        assert read(folder(tmp_path / "half", below=lambda i: "" if i < 3 else "part2")) == (expected, "6 in 3 folders")
        assert read(folder(tmp_path / "deep", below=lambda i: "a/b/c.png/d")) == (expected, "6 in 3 folders")

    @pytest.mark.parametrize("suffix", [".PNG", ".tif", ".TIFF", ".ppm", ".pgm", ".jfif", ".gif", ".JPEG", ".webp"])
    def test_extensions(self, tmp_path, suffix):
        assert read(folder(tmp_path, suffix))[1] == "6 in 3 folders"

    def test_what_is_left_out_is_counted(self, tmp_path):
        folder(tmp_path)
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "a.xml", "b.xml", "c.heic", "LICENSE"):
            (tmp_path / "left" / name).write_bytes(b"x")
        (tmp_path / "README.md").write_bytes(b"x")
        (tmp_path / "extra.png").write_bytes(IMAGES[0])
        for name in (".git", "__MACOSX"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.png").write_bytes(IMAGES[0])
        left = (
            "2 hidden folders, 2 hidden files, 2 *.xml, 1 README.md, 1 image beside the folders (extra.png), "
            "1 LICENSE, 2 other files"
        )
        assert read(tmp_path) == (sorted(LABELS), f"6 in 3 folders; left out: {left}")

    def test_folders_without_an_image_are_named(self, tmp_path):
        folder(tmp_path / "a")
        (tmp_path / "a/top").rename(tmp_path / "b")
        (tmp_path / "a/top").mkdir()
        assert read(tmp_path / "a")[1] == "4 in 2 folders (1 without an image: top)"

    def test_links_to_folders_end(self, tmp_path):
        folder(tmp_path / "a")
        (tmp_path / "a/left/again").symlink_to(tmp_path / "a/left")
        (tmp_path / "a/left/up").symlink_to(tmp_path / "a")  # left, right and top once more, and no end of it
        labels, line = read(tmp_path / "a")
        assert labels == [0] * 6 + [1, 1, 2, 2] and line == "10 in 3 folders; left out: 2 folders linked again"

    def test_splits_and_wrappers(self, tmp_path):
        folder(tmp_path / "one/data/test")
        assert read(tmp_path / "one") == (sorted(LABELS), "6 in 3 folders")  # the only one
        folder(tmp_path / "two/train")
        folder(tmp_path / "two/val")
        assert f"{tmp_path}/two holds splits (train, val): name one of them" in refused(tmp_path / "two")
        assert "holds splits" in refused(tmp_path / "two", ("class 0", "class 1"))
        assert read(tmp_path / "two/val")[0] == sorted(LABELS)
        (tmp_path / "c/train").mkdir(parents=True)
        (tmp_path / "c/train/a.png").write_bytes(IMAGES[0])
        assert read(tmp_path / "c", ("bus", "train"))[0] == [1]  # a class of this model

    def test_a_tar_beside_class_folders(self, tmp_path):
        tar(folder(tmp_path) / "backup.tar", *samples())
        assert "holds backup.tar and folders of images (left): name one or the other" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ((), "it is empty"),
            (("a.png", "b.png"), "holds 2 images but no sub-folders, one for each class, named like it"),
            (("a.png", "metadata.csv"), r"\(metadata.csv is not read\)"),
            (("data_batch_1", "batches.meta", "test_batch"), "CIFAR's pickles are never loaded"),
            (("a.npy", "b.npy"), r"no labeled image \(2 \*.npy\)"),
            (("state.json", "dataset_info.json", "data-00000-of-00001.arrow"), r"load_from_disk\('.*'\).to_parquet"),
            (("dataset_dict.json",), r"load_from_disk\('.*'\)\[\"test\"\].to_parquet"),
        ],
    )
    def test_folders_that_hold_something_else(self, tmp_path, files, message):
        for name in files:
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=message):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("a.zip", "unpack it"), ("a.npz", "NumPy arrays are not read"), ("a.pkl", "pickles are never loaded")],
    )
    def test_files_of_other_formats(self, tmp_path, name, message):
        assert f"{name}: no such file or folder" in refused(tmp_path / name)
        (tmp_path / name).write_bytes(b"x")
        assert message in refused(tmp_path / name)

    def test_large_and_special_files(self, tmp_path):
        folder(tmp_path)
        bad = tmp_path / "left/z.png"
        os.mkfifo(bad)
        assert refused(tmp_path) == f"cannot read {bad}: it is no regular file"
        bad.unlink()
        bad.symlink_to("/dev/zero")
        assert refused(tmp_path) == f"cannot read {bad}: it is no regular file"
        bad.unlink()
        with bad.open("wb") as file:
            file.truncate(3 << 30)
        assert f"{bad} has {3 << 30} bytes" in refused(tmp_path)


class TestTars:
    def test_several(self, tmp_path):
        for number in (0, 1):
            tar(tmp_path / f"t-00000{number}.tar", *samples(chosen=slice(number, None, 2)))
        expected = LABELS[::2] + LABELS[1::2], "6 in 2 tars (labels: .cls)"
        both = [str(tmp_path / f"t-00000{number}.tar") for number in (0, 1)]
        for data in (both, f"{tmp_path}/t-{{000000..000001}}.tar", f"{tmp_path}/t-*.tar", tmp_path):
            assert read(data) == expected
        assert "t-000002.tar: no such file" in refused(f"{tmp_path}/t-{{000000..000002}}.tar")
        assert "u-*.tar: no such file" in refused(f"{tmp_path}/u-*.tar")
        table(tmp_path / "a.parquet")
        assert "holds tars and Parquet files" in refused(tmp_path)

    def test_in_an_object_store(self, tmp_path):
        import fsspec

        with fsspec.open("memory://bucket/test/a-0.tar", "wb") as file:
            file.write(tar_bytes(*samples()))
        for data in ("memory://bucket/test", "memory://bucket/test/a-*.tar", "memory://bucket/test/a-{0..0}.tar"):
            assert read(data) == (LABELS, "6 in 1 tar (labels: .cls)")

    def test_compressed_whatever_the_name(self, tmp_path):
        whole = tar_bytes(*samples())
        for name, data in {
            "a.tar.gz": gzip.compress(whole),
            "b.tgz": gzip.compress(whole[:5000]) + gzip.compress(whole[5000:]),  # as pigz and bgzip write
            "c.tar": gzip.compress(whole),
            "d.tar.bz2": bz2.compress(whole),
        }.items():
            (tmp_path / name).write_bytes(data)
            assert read(tmp_path / name) == (LABELS, "6 in 1 tar (labels: .cls)")
        (tmp_path / "e.tar.gz").write_bytes(gzip.compress(whole)[:-100])
        assert "e.tar.gz is damaged or no tar" in refused(tmp_path / "e.tar.gz")
        (tmp_path / "f.tar").write_bytes(b"\xfd7zXZ\0" + bytes(100))
        assert "compress it with gzip" in refused(tmp_path / "f.tar")

    def test_members_that_are_no_samples(self, tmp_path):
        more = [
            ("LICENSE", b"x"),
            ("README.md", b"x"),
            ("._0.png", b"x"),
            ("__meta__.json", b"{}"),
            ("a/b/n.txt", b"x"),
        ]
        left = "3 samples without an image, 1 LICENSE, 1 hidden file ._0.png"
        labels, line = read(tar(tmp_path / "a.tar", *more, *samples()))
        assert labels == LABELS and line == f"6 in 1 tar (labels: .cls); left out: {left}"

    @pytest.mark.parametrize(
        ("image", "label"),
        [("input.png", "output.cls"), ("seg.png", "cls"), ("png", "target.txt"), ("jpeg", "label"), ("tif", "class")],
    )
    def test_names_of_fields(self, tmp_path, image, label):
        line = f"6 in 1 tar (labels: .{label})"
        assert read(tar(tmp_path / "a.tar", *samples(image, label))) == (LABELS, line)

    @pytest.mark.parametrize("key", ["label", "cls", "class", "target", "category", "labels"])
    def test_keys_of_json(self, tmp_path, key):
        def text(label):
            return json.dumps({"caption": "a square", key: label}).encode()

        assert read(tar(tmp_path / "a.tar", *samples("png", "json", text=text)))[0] == LABELS

    def test_metadata_in_json_is_no_label(self, tmp_path):
        members = samples()
        members.insert(1, ("0.json", b'{"width": 8}'))
        members.insert(2, ("0.npy", b"\x93NUMPY"))
        assert read(tar(tmp_path / "a.tar", *members))[0] == LABELS
        assert "sample '0' has no label" in refused(
            tar(tmp_path / "b.tar", *samples("png", "json", text=lambda c: b"{}"))
        )

    def test_a_choice_is_left_to_the_user(self, tmp_path):
        both = [("a.png", IMAGES[1]), ("a.jpg", b"x"), ("a.cls", b"1")]
        path = tar(tmp_path / "a.tar", *both)
        assert "sample 'a' has 2 files that may be its image or its label (png, jpg)" in refused(path)
        assert read(f"{path}@image=png")[0] == [1]
        path = tar(tmp_path / "b.tar", ("a.png", IMAGES[0]), ("a.json", b'{"label": 0, "coarse": 2}'))
        assert read(path)[0] == [0]
        assert read(f"{path}@label=coarse")[0] == [2]
        (tmp_path / "c.tar@label=x").write_bytes(path.read_bytes())
        assert "is no .tar" in refused(tmp_path / "c.tar@label=x")  # a file that is called so

    def test_numbers_of_samples_are_no_labels(self, tmp_path):
        members = [m for i in range(3) for m in ((f"{i}.png", IMAGES[i]), (f"{i}.index", b"%d" % i))]
        path = tar(tmp_path / "a.tar", *members)
        assert "KEY.index is another number in every sample, so it may count them" in refused(path)
        assert read(f"{path}@label=index")[0] == [0, 1, 2]
        assert read(tar(tmp_path / "b.tar", *samples("png", "index")))[0] == LABELS

    def test_damage_that_tarfile_does_not_notice(self, tmp_path):
        whole = tar_bytes(*samples())
        (tmp_path / "joined.tar").write_bytes(whole + whole)
        assert "joined.tar goes on after its end mark" in refused(tmp_path / "joined.tar")
        (tmp_path / "cut.tar").write_bytes(whole[: 8 * 512])
        assert "cut.tar is damaged or no tar: it has no end mark" in refused(tmp_path / "cut.tar")
        twice = tar(tmp_path / "twice.tar", ("a.png", IMAGES[0]), ("a.png", IMAGES[1]), ("a.cls", b"0"))
        assert "duplicate file name" in refused(twice)
        apart = tar(tmp_path / "apart.tar", *sorted(samples(), key=lambda member: member[0][::-1]))
        assert "has no label" in refused(apart) and "must be neighbors" in refused(apart)

    def test_headers_of_any_size(self, tmp_path):
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 1 << 40
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert "a header of" in refused(tmp_path / "a.tar")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
        (tmp_path / "b.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 3000)
        assert "b.tar is damaged or no tar" in refused(tmp_path / "b.tar")

    def test_samples_of_any_size(self, tmp_path):
        hidden = [(f"._{i}.png", b"") for i in range(2000)]
        assert read(tar(tmp_path / "c.tar", *hidden, *samples()))[0] == LABELS
        whole = tar_bytes(*((f"a.{i}.png", bytes(50 << 20)) for i in range(5)))
        (tmp_path / "a.tar").write_bytes(gzip.compress(whole, 1))
        assert "sample 'a' has over 1000 files or" in refused(tmp_path / "a.tar")
        assert "sample 'a' has over 1000 files or" in refused(
            tar(tmp_path / "b.tar", *((f"a.{i}.npy", b"") for i in range(2000)))
        )

    def test_nothing_is_run_because_a_path_says_so(self, tmp_path):
        assert "no such file" in refused(f"pipe:touch {tmp_path}/ran.tar")
        assert not (tmp_path / "ran.tar").exists()


class TestParquet:
    def test_several(self, tmp_path):
        for number in (0, 1):
            table(tmp_path / f"test-0000{number}-of-00002.parquet", slice(number, None, 2))
        expected = LABELS[::2] + LABELS[1::2], "6 in 2 Parquet files (image: image, label: label)"
        for data in (tmp_path, f"{tmp_path}/test-*.parquet", f"{tmp_path}/test-0000{{0..1}}-of-00002.parquet"):
            assert read(data) == expected
        assert read(tmp_path / "test-00000-of-00002.parquet")[1].startswith("3 in 1 of 2 Parquet files")
        table(tmp_path / "train-00000-of-00001.parquet")
        assert f"holds splits (test, train): name the files of one, '{tmp_path}/*train*" in refused(tmp_path)

    def test_a_repository_as_the_hub_has_it(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / ".git").mkdir()
        (tmp_path / "README.md").write_text("x")
        table(tmp_path / "data/test-00000-of-00001.parquet", names=NAMES)
        assert read(tmp_path)[0] == LABELS

    def test_names_of_columns(self, tmp_path):
        for label in ("target", "class", "category", "labels", "fine_label"):
            path = table(tmp_path / "a.parquet", label=label)
            assert read(path) == (LABELS, f"6 in 1 Parquet file (image: image, label: {label})")
        assert (
            read(table(tmp_path / "b.parquet", image="pixels", label="y", names=NAMES))[0] == LABELS
        )  # by their types
        path = table(tmp_path / "c.parquet", image="pixels", label="y")
        assert "it has pixels, y: name them with c.parquet@image=COLUMN,label=COLUMN" in refused(path)
        assert read(f"{path}@image=pixels,label=y")[0] == LABELS
        path = table(tmp_path / "d.parquet", coarse=2)
        assert read(f"{path}@label=coarse")[0] == [2] * 6

    def test_files_that_name_classes_differently(self, tmp_path):
        table(tmp_path / "a.parquet", names=NAMES)
        table(tmp_path / "b.parquet", names=NAMES[::-1])
        assert "name their classes differently" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (pa.array([{"bytes": None, "path": "/x/a.png"}]), "row 0 holds a path ('/x/a.png'), not an image"),
            (["http://x/a.png"], "row 0 holds a path ('http://x/a.png'), not an image"),
            ([[1, 2]], "row 0 holds list, expected an encoded image"),
            (pa.array([None], pa.binary()), "row 0 holds nothing"),
        ],
    )
    def test_what_is_no_image(self, tmp_path, cells, message):
        pq.write_table(pa.table({"image": cells, "label": [0]}), tmp_path / "a.parquet")
        assert f"a.parquet: {message}" in refused(tmp_path / "a.parquet")

    def test_no_rows(self, tmp_path):
        assert "holds no labeled image" in refused(table(tmp_path / "a.parquet", slice(0)))


def test_a_dataset_of_this_program(tmp_path):
    data = write_dataset(tmp_path / "d", 12, kept=lambda i: i < 9)
    for path in (data, tmp_path / "d"):
        assert read(path)[1] == "9 in a manifest; left out: 3 images that stage 1 rejected"
    assert "has no columns to name" in refused(f"{data}@label=teacher_label")
    assert "has no columns to name" in refused(f"{folder(tmp_path / 'f')}@label=x")


def test_formats_of_images_are_decoded(tmp_path):
    from stages.distill.evaluate import check_data

    picture = Image.open(io.BytesIO(IMAGES[0]))
    (tmp_path / "left").mkdir()
    for kind in ("tiff", "ppm", "gif", "bmp", "webp", "jpeg"):
        picture.save(tmp_path / f"left/a.{kind}")
    assert check_data(str(tmp_path), NAMES)["images"] == "6 in 1 folder"
    (tmp_path / "left/z.jpg").write_bytes(b"\0\5\26\7")
    with pytest.raises(DataError, match=r"sample 'left/z.jpg' is no image: not a readable image: unknown content"):
        check_data(str(tmp_path), NAMES)
