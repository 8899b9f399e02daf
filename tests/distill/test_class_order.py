"""Which of the model's classes a label means, in every container that labels come in."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.errors import DataError
from stages.distill.class_order import BY_NAME, BY_NUMBER, NAMED_BY_NUMBER, class_order
from stages.distill.eval_data import labeled_images
from tests.distill.drawn import NAMES, square, write_dataset

ANIMALS = ("cat", "dog", "red fox")
COUNTED = tuple(f"class {i}" for i in range(11))
IMAGE = square(0, np.random.default_rng(0))


def folder(path, names):
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "a.png").write_bytes(IMAGE)
    return str(path)


def parquet(path, labels, names=None):
    """``names``: of a ClassLabel, as Hugging Face datasets store it."""
    table = pa.table({"image": [IMAGE] * len(labels), "label": labels})
    if names is not None:
        feature = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path / "a.parquet")
    return str(path / "a.parquet")


def tar(path, labels, extension="cls"):
    with tarfile.open(path / "a.tar", "w") as file:
        for i, label in enumerate(labels):
            for name, data in ((f"{i}.png", IMAGE), (f"{i}.{extension}", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return str(path / "a.tar")


def read(path, class_names):
    """By key (a folder's without its file) the class numbers, and the line."""
    images = labeled_images(path, class_names)
    return {key.split("/")[0]: number for key, _, number in images}, images.class_order


def numbers(path, class_names):
    found, _ = read(path, class_names)
    return list(found.values())


class TestFolders:
    def test_names_in_any_spelling(self, tmp_path):
        found, line = read(folder(tmp_path / "a", ["Dog", "red_fox", "CAT"]), ANIMALS)
        assert found == {"CAT": 0, "Dog": 1, "red_fox": 2}
        assert line == BY_NAME

    def test_fewer_classes_than_the_model_has(self, tmp_path):
        assert read(folder(tmp_path / "a", ["red fox"]), ANIMALS)[0] == {"red fox": 2}

    def test_numbers_are_numbers_not_text(self, tmp_path):
        path = folder(tmp_path / "a", map(str, range(11)))
        for class_names in (COUNTED, tuple("abcdefghijk")):
            found, line = read(path, class_names)
            assert found == {str(i): i for i in range(11)}
            assert line.startswith(f"{NAMED_BY_NUMBER} (0 = {class_names[0]}, ")

    def test_numbers_with_leading_zeros(self, tmp_path):
        assert read(folder(tmp_path / "a", ["00", "07", "10"]), COUNTED)[0] == {"00": 0, "07": 7, "10": 10}

    def test_numbers_that_are_the_models_names(self, tmp_path):
        path = folder(tmp_path / "a", ["1", "2", "10"])
        assert read(path, ("10", "1", "2")) == ({"1": 1, "10": 0, "2": 2}, BY_NAME)
        with pytest.raises(
            DataError, match=r"name no class of the model: 10 \(sub-folder 10\); the model knows 1, 2, 3"
        ):
            read(path, ("1", "2", "3"))

    def test_numbers_that_no_class_has(self, tmp_path):
        with pytest.raises(
            DataError, match=r"sub-folder 3 has label 3, but the model has classes 0…2; to name .*class_n"
        ):
            read(folder(tmp_path / "a", "123"), ANIMALS)
        with pytest.raises(DataError, match="several of 01, 1 are the same number"):
            read(folder(tmp_path / "b", ["01", "1"]), ANIMALS)

    def test_sorted_order_for_a_model_without_names_alone(self, tmp_path):
        path = folder(tmp_path / "a", ["dog", "cat", "red fox"])
        found, line = read(path, COUNTED[:3])
        assert found == {"cat": 0, "dog": 1, "red fox": 2}
        assert "folders in sorted order (0 = cat, 1 = dog, 2 = red fox)" in line
        assert read(path, ("LABEL_0", "LABEL_1", "LABEL_2"))[0] == found
        with pytest.raises(
            DataError, match=r"3 name no class of the model: .* has 4 classes without names; .*class_names"
        ):
            read(path, COUNTED[:4])
        with pytest.raises(
            DataError, match=r"3 name no class of the model: cat, dog, red fox .*knows left, right, top"
        ):
            read(path, NAMES)

    def test_ids_of_wordnet(self, tmp_path):
        path = folder(tmp_path / "a", ["n01440764", "n01443537"])
        with pytest.raises(DataError, match=r"name no class of the model: n01440764, .*class_names: .* WordNet ids"):
            read(path, ("tench", "goldfish"))
        assert numbers(path, ("class 0", "class 1")) == [0, 1]
        assert numbers(path, ("n01443537", "n01440764")) == [1, 0]

    def test_one_unknown_name(self, tmp_path):
        with pytest.raises(DataError, match=r"3 sub-folders, of which 1 name no class of the model: wolf"):
            read(folder(tmp_path / "a", ["cat", "dog", "wolf"]), ANIMALS)


class TestParquet:
    @pytest.mark.parametrize(
        "labels",
        [
            ["dog", "Cat", "red_fox"],
            pa.array(["dog", "cat", "red fox"]).dictionary_encode(),
            [b"dog", b"cat", b"red fox"],
        ],
    )
    def test_names(self, tmp_path, labels):
        assert read(parquet(tmp_path, labels), ANIMALS) == ({"0": 1, "1": 0, "2": 2}, BY_NAME)

    def test_names_need_names(self, tmp_path):
        with pytest.raises(
            DataError, match=r"name no class of the model: dog, cat .* classes without names; .*class_names"
        ):
            read(parquet(tmp_path, ["dog", "cat"]), COUNTED[:2])

    def test_numbers(self, tmp_path):
        assert numbers(parquet(tmp_path, [2, 0]), ANIMALS) == [2, 0]
        assert numbers(parquet(tmp_path, [2.0, 0.0]), ANIMALS) == [2, 0]
        assert numbers(parquet(tmp_path, ["2", "0"]), ANIMALS) == [2, 0]
        assert read(parquet(tmp_path, [2, 0]), ANIMALS)[1].startswith(f"{BY_NUMBER} (0 = cat, ")

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0.0, float("nan")], "row 1: label nan is neither a whole number nor a class name"),
            ([0.0, float("inf")], "row 1: label inf is neither"),
            ([1.5], "row 0: label 1.5 is neither"),
            ([0, None], "row 1: label None is neither"),
            ([{"label": 1}], r"row 0: label \{'label': 1\} is neither"),
            ([[1]], r"row 0: label \[1\] is neither"),
            ([""], "row 0: label '' is neither"),
            ([True, False], "row 0: label True is neither"),
            ([b"\xff"], "row 0: .*utf-8"),
            ([0, -1], "row 1 has label -1, but the model has classes 0…2"),
            ([0, 0, 3], "row 2 has label 3, but the model has classes 0…2"),
            (["cat", "cat", "wolf"], r"labels of which 1 name no class of the model: wolf \(row 2\)"),
            (["cat", "1"], r"1 name no class of the model: 1 \(row 1\)"),
        ],
    )
    def test_what_means_no_class(self, tmp_path, labels, message):
        with pytest.raises(DataError, match=f"a.parquet.*{message}"):
            labeled_images(parquet(tmp_path, labels), ANIMALS)  # before any image is scored

    def test_class_label_in_another_order(self, tmp_path):
        path = parquet(tmp_path, [0, 1, 2], ["red_fox", "Cat", "dog"])
        assert read(path, ANIMALS) == ({"0": 2, "1": 0, "2": 1}, BY_NAME)

    def test_class_label_with_other_names(self, tmp_path):
        path = parquet(tmp_path, [0, 2], ["ship", "cat", "truck"])
        with pytest.raises(
            DataError, match=r"2 name no class of the model: ship, truck .* knows cat, dog, .*class_names"
        ):
            read(path, ANIMALS)
        assert numbers(parquet(tmp_path, [1], ["ship", "cat", "truck"]), ANIMALS) == [0]  # no row is a ship

    def test_class_label_and_a_model_without_names(self, tmp_path):
        path = parquet(tmp_path, [0, 2], ["ship", "cat", "truck"])
        found, line = read(path, COUNTED[:3])
        assert found == {"0": 0, "1": 2}
        assert "the model's classes have no names" in line and "(0 = ship, 1 = cat, 2 = truck)" in line
        with pytest.raises(DataError, match=r"has 3 classes \(ship, cat, truck\), the model 11 .* have no names"):
            read(path, COUNTED)

    def test_class_label_of_numbers_in_the_order_of_text(self, tmp_path):
        path = parquet(tmp_path, [2, 3], sorted(map(str, range(11))))  # 0, 1, 10, 2, …
        assert numbers(path, COUNTED) == [10, 2]
        with pytest.raises(DataError, match="its list of classes has label 11, but the model has classes 0…10"):
            read(parquet(tmp_path, [0], [str(i + 1) for i in range(11)]), COUNTED)

    def test_class_label_of_unlabeled_rows(self, tmp_path):
        with pytest.raises(DataError, match="row 1 has label -1, but the data names classes 0…2"):
            read(parquet(tmp_path, [0, -1], ANIMALS), ANIMALS)

    @pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": {"label": {"names": [0, 1]}}}}'])
    def test_metadata_without_names(self, tmp_path, metadata):
        table = pa.table({"image": [IMAGE], "label": [2]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / "a.parquet")
        assert numbers(str(tmp_path / "a.parquet"), ANIMALS) == [2]


class TestTars:
    @pytest.mark.parametrize(
        ("extension", "labels", "expected"),
        [
            ("cls", [b"2\n", b"0", b"1.0"], [2, 0, 1]),
            ("cls", [b"red fox", b"CAT", b"dog\n"], [2, 0, 1]),
            ("txt", [b"red fox", b"CAT", b"dog\n"], [2, 0, 1]),
            ("json", [b'{"label": "dog"}', b'{"label": "cat"}'], [1, 0]),
            ("json", [b'{"label": 1.0}', b'{"label": 0}'], [1, 0]),
            ("json", [b'{"label": "1"}', b'{"label": "0"}'], [1, 0]),
            ("json", [b'{"label": 0, "class_name": "dog"}', b'{"label": 2, "class_name": "red fox"}'], [1, 2]),
            ("json", [b'{"label": 1, "class_name": "class 1"}'], [1]),
        ],
    )
    def test_labels(self, tmp_path, extension, labels, expected):
        assert numbers(tar(tmp_path, labels, extension), ANIMALS) == expected

    @pytest.mark.parametrize(
        ("extension", "labels", "message"),
        [
            ("cls", [b"0", b"nan"], r"sample '1' has no label: .*\(label nan is neither"),
            ("cls", [b"-1"], "sample '0' has label -1, but the model has classes 0…2"),
            ("cls", [b"0", b"1_0"], "1 name no class of the model: 1_0"),
            ("cls", [b"wolf"], r"1 name no class of the model: wolf \(sample '0'\)"),
            ("cls", [b"\xff"], "sample '0' has no label"),
            ("cls", [b"0", b"cat"], r"mixes labels that are numbers and labels that are names \(sample '1'\)"),
            ("json", [b'{"label": {"label": 3}}'], r"sample '0' has no label: .*\(label \{'label': 3\} is neither"),
            ("json", [b'{"label": 1, "class_name": "wolf"}'], "1 name no class of the model: wolf"),
        ],
    )
    def test_what_means_no_class(self, tmp_path, extension, labels, message):
        with pytest.raises(DataError, match=message):
            read(tar(tmp_path, labels, extension), ANIMALS)

    def test_names_need_names(self, tmp_path):
        with pytest.raises(DataError, match="classes without names"):
            read(tar(tmp_path, [b"cat"]), COUNTED)


class TestManifests:
    def test_by_name(self, tmp_path):
        path = write_dataset(tmp_path / "d", 12)  # labels 0, 1, 2: left, right, top
        turned = ("top", "left", "right")
        expected = [(i % 3 + 1) % 3 for i in range(12)]
        assert sorted(numbers(path, turned)) == sorted(expected)
        by_key = {key: number for key, _, number in labeled_images(path, NAMES)}
        assert {(by_key[key], number) for key, _, number in labeled_images(path, turned)} == {(0, 1), (1, 2), (2, 0)}
        shards = sorted((tmp_path / "d/shards").glob("*.tar"))
        assert {(by_key[k], n) for k, _, n in labeled_images(str(shards[0]), turned)} == {(0, 1), (1, 2), (2, 0)}
        with pytest.raises(DataError, match="name no class of the model: left, right, top"):
            read(path, ANIMALS)


class TestRule:
    def test_a_name_of_several_classes(self):
        birds = ("crane", "heron", "crane")
        assert class_order({0: "", 2: ""}, birds, "x", listed=birds).index == {0: 0, 2: 2}  # the same list
        assert class_order({"heron": ""}, birds, "x").index == {"heron": 1}
        with pytest.raises(DataError, match="x: crane may be several of the model's classes"):
            class_order({"crane": ""}, birds, "x")
        with pytest.raises(DataError, match="x has several classes called crane, in another order than the model's"):
            class_order({0: "", 1: ""}, ("heron", "crane", "owl"), "x", listed=("crane", "crane"))

    def test_spelling_counts_where_it_tells_classes_apart(self):
        names = ("polish", "Polish")
        assert class_order({"Polish": ""}, names, "x").index == {"Polish": 1}
        with pytest.raises(DataError, match="may be several"):
            class_order({"POLISH": ""}, names, "x")

    def test_a_sign_is_no_hyphen(self):
        assert class_order({"-1": ""}, ("1", "-1"), "x").index == {"-1": 1}
        with pytest.raises(DataError, match="name no class"):
            class_order({"-1": ""}, ("0", "1"), "x")

    def test_numbers_and_names(self):
        with pytest.raises(DataError, match=r"x mixes labels that are numbers \(3, row 0\) .* \('cat', row 4\)"):
            class_order({3: "row 0", "cat": "row 4"}, ANIMALS, "x")

    def test_long_names_are_cut(self):
        with pytest.raises(DataError) as error:
            class_order({"x" * 10_000: "row 0"}, ANIMALS, "x")
        assert len(str(error.value)) < 500
        with pytest.raises(DataError, match="has label 1000"):
            class_order({"9" * 10_000: "row 0"}, ANIMALS, "x")
