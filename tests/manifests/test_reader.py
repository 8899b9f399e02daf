import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from manifests import reader as reader_module
from manifests.dataset import DatasetInfo
from manifests.errors import DataError, UsageError
from manifests.merge import merge
from manifests.reader import Manifest, parse_source
from manifests.schema import SCHEMA, write_options
from manifests.shard import ShardWriter
from manifests.storage import Storage
from manifests.where import compile_where
from tests.manifests.samples import FINGERPRINT, INFO, flip, make_dataset, make_image, make_row, write_shard

SHARDS, ROWS = 3, 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A dataset that no test changes; several row groups."""
    storage = Storage(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifests.merge.ROW_GROUP", 4)
        for shard in range(SHARDS):
            write_shard(storage, shard, ROWS)
        merge(storage, INFO)
    return storage


EVERY = [(shard, index) for shard in range(SHARDS) for index in range(ROWS)]


def test_opening_by_file_or_folder(whole: Storage) -> None:
    for url in (whole.url, f"{whole.url}/", whole.path("m.parquet")):
        manifest = Manifest.open(url, verify=True)
        assert manifest.num_rows == manifest.info.rows == 18
        assert manifest.info.class_names == ("zero", "one", "two")
        assert manifest.file.num_groups == 5


def test_the_digest_covers_rows_and_description_but_no_recipe(tmp_path: Path) -> None:
    def digest(name: str, rows: int = ROWS, **changed: Any) -> str:
        storage = Storage(tmp_path / name)
        write_shard(storage, 0, rows)
        merge(storage, replace(INFO, **changed))
        return Manifest.open(storage.url).digest

    base = digest("a")
    assert digest("b", recipe={"distill": {"epochs": 7}}) == base
    assert digest("c", rows=ROWS + 1) != base
    assert digest("d", class_names=("zero", "one", "three")) != base
    table = pq.read_table(tmp_path / "a" / "m.parquet")
    at = table.schema.get_field_index("teacher_label")
    other = table.set_column(at, table.schema.field(at), pa.array([2] * ROWS, table.schema.field(at).type))
    pq.write_table(other, tmp_path / "a" / "m.parquet", **write_options())
    assert Manifest.open(tmp_path / "a").digest != base


def test_a_selection_is_a_filter_of_everything(whole: Storage) -> None:
    manifest = Manifest.open(whole.url)
    everything = manifest.where(include_rejected=True)
    assert everything.column("key") == [f"{shard:06d}-{index:06d}" for shard, index in EVERY]
    chosen = manifest.where("teacher_label == label and cosine >= 0.1", include_rejected=True)
    rows = [everything.row(index) for index in range(len(everything))]
    matching = [
        row
        for row in rows
        if row["teacher_label"] == row["label"] and row["cosine"] is not None and row["cosine"] >= 0.099
    ]
    assert [chosen.row(index) for index in range(len(chosen))] == matching
    assert len(manifest) == sum(row["kept"] for row in rows)
    assert {row["label"] for row in rows} == {0, 1, 2}


CONDITIONS = st.sampled_from(
    ["label == 1", "label >= 1", "cosine >= 0.3", "cosine is None", "kept", "class_name != 'two'", "loss_ce > 2",
     "teacher_label == label", "confidence < 0.5", "reject_reason is not None", "shard in (0, 2)", "trajectory / 2 < 2"]
)  # fmt: skip
EXPRESSIONS = st.recursive(
    CONDITIONS,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
    ),
    max_leaves=3,
)


@settings(max_examples=80, deadline=None)
@given(where=EXPRESSIONS, kept=st.booleans())
def test_a_selection_is_the_filter_of_a_full_read(whole: Storage, where: str, kept: bool) -> None:
    """Row by row through all row groups, against one Arrow filter of the whole table; images included."""
    table = pq.read_table(whole.path("m.parquet"))
    expected = table.filter(compile_where(where, table.schema))["key"].to_pylist()
    if kept:
        good = set(table.filter(table["kept"])["key"].to_pylist())
        expected = [key for key in expected if key in good]
    try:
        chosen = Manifest.open(whole.url).where(where, include_rejected=not kept)
    except DataError:
        assert expected == []
        return
    assert chosen.column("key") == expected
    assert [image for _, image in chosen.scan()] == [make_image(*map(int, key.split("-"))) for key in expected]


def test_rows_come_back_as_they_were_written(whole: Storage) -> None:
    row = Manifest.open(whole.url).where(include_rejected=True).row(7)
    assert row["prompt"] == make_row(1, 1)["prompt"]
    assert row["confidence"] == np.float32(0.1)
    assert row["lca"][0]["lam"] == np.float32(0.3)
    assert row["logits"] == [np.float16(0.1), -2.0, 3.5]
    assert list(row) == SCHEMA.names


def test_columns(whole: Storage) -> None:
    selection = Manifest.open(whole.url).where("label == 1", include_rejected=True)
    labels: Any = selection.column("label")
    assert labels.dtype == np.int32
    assert labels.tolist() == [1] * 6
    assert selection.column("class_name") == ["one"] * 6
    assert np.isnan(selection.column("cosine")).any()
    assert selection.column("kept").dtype == bool  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="unknown column 'color'; there are: key, shard"):
        selection.column("color")


def test_nothing_selected_is_a_data_error(whole: Storage, tmp_path: Path) -> None:
    manifest = Manifest.open(whole.url)
    with pytest.raises(DataError, match=r"m\.parquet: none of its 15 kept rows satisfies 'label == 77'"):
        manifest.where("label == 77")
    with pytest.raises(DataError, match="none of its 18 rows"):
        manifest.where("label == 77", include_rejected=True)
    with pytest.raises(UsageError, match="overflow"):
        manifest.where("seed * 4611686018427387904 == 1")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), gap=st.sampled_from([0, 600, 1 << 20]), run=st.sampled_from([1, 2000, 1 << 20]))
def test_any_order_reads_the_right_images(whole: Storage, data: st.DataObject, gap: int, run: int) -> None:
    order = data.draw(st.lists(st.integers(0, 17), max_size=30))
    selection = Manifest.open(whole.url).where(include_rejected=True)
    expected = [make_image(*EVERY[index]) for index in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "GAP_LOCAL", gap)
        patch.setattr(reader_module, "RUN", run)
        patch.setattr(reader_module, "WINDOW", 7)
        assert selection.read_many(order) == expected
        assert [*selection.scan(order)] == [*zip(order, expected, strict=True)]


def test_dense_reading_is_one_read_a_tar_and_sparse_reading_is_ranged(
    whole: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, int]] = []
    read_range = Storage.read_range

    def counted(storage: Storage, name: str, offset: int, size: int) -> bytes:
        reads.append((name, size))
        return read_range(storage, name, offset, size)

    monkeypatch.setattr(Storage, "read_range", counted)
    selection = Manifest.open(whole.url).where(include_rejected=True)
    reads.clear()
    assert len([*selection.scan()]) == 18
    assert len(reads) == SHARDS
    reads.clear()
    selection.read(3)
    assert [size for _, size in reads] == [len(make_image(0, 3))]


def test_selections_work_in_other_processes(whole: Storage) -> None:
    selection = Manifest.open(whole.url).where(include_rejected=True)
    copy = pickle.loads(pickle.dumps(selection))
    assert copy.read(4) == selection.read(4)
    assert copy.row(4) == selection.row(4)
    child = os.fork()
    if child == 0:
        os._exit(0 if selection.read(9) == make_image(1, 3) and selection.row(9)["shard"] == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def replace_rows(storage: Storage, change: dict[str, list[Any]], info: DatasetInfo | None = None) -> None:
    """Write m.parquet with other values, as a hostile author would."""
    table = pq.read_table(storage.path("m.parquet"))
    for name, column in change.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, SCHEMA.field(name), pa.array(column, SCHEMA.field(name).type))
    metadata = info.to_metadata() if info else table.schema.metadata
    pq.write_table(table.replace_schema_metadata(metadata), storage.path("m.parquet"), **write_options())


class TestBadTars:
    def test_missing_short_and_altered_tars(self, tmp_path: Path) -> None:
        storage = make_dataset(tmp_path)
        name = Manifest.open(tmp_path).info.tars[1].name
        whole = storage.read(name)
        flip(storage, name, 520)
        Manifest.open(tmp_path)
        with pytest.raises(DataError, match=rf"{name}: altered: .*shard 1"):
            Manifest.open(tmp_path, verify=True)
        selection = Manifest.open(tmp_path).where(include_rejected=True)
        with pytest.raises(DataError, match="shard 1, sample '000001-000000' was altered"):
            [*selection.scan()]
        storage.write(name, whole[:-512])
        with pytest.raises(DataError, match=rf"{name}: 19968 bytes, expected 20480 \(shard 1\)"):
            Manifest.open(tmp_path)
        storage.delete(name)
        with pytest.raises(DataError, match=rf"{name}: missing tar of shard 1"):
            Manifest.open(tmp_path)

    def test_bad_samples_can_be_skipped_and_are_counted(self, tmp_path: Path) -> None:
        storage = make_dataset(tmp_path)
        tars = Manifest.open(tmp_path).info.tars
        storage.delete(tars[0].name)
        flip(storage, tars[1].name, 520)
        storage.write(tars[2].name, storage.read(tars[2].name)[:3000])
        manifest = Manifest.open(tmp_path, skip_bad=True)
        assert len(manifest.problems) == 2
        bad: dict[int, str] = {}
        selection = manifest.where(include_rejected=True)
        good = dict(selection.scan(on_bad=lambda index, error: bad.update({index: str(error)})))
        assert sorted([*good, *bad]) == [*range(18)]
        assert {*range(6), 6} <= set(bad)
        assert {7, 8, 9, 10, 11, 12} <= set(good)
        assert all(image == make_image(*EVERY[index]) for index, image in good.items())
        assert "shard 1, sample '000001-000000' was altered" in bad[6]
        assert "no such file" in bad[0]
        with pytest.raises(DataError, match="shard 0, sample '000000-000002' cannot be read"):
            selection.read(2)

    @pytest.mark.parametrize(
        "change",
        [
            {"offset": [0] * 18},
            {"offset": [-512] * 18},
            {"offset": [1 << 40] * 18},
            {"offset": [(1 << 63) - 1] * 18},
            {"size": [2**31 - 1] * 18},
            {"size": [-1] * 18},
            {"size": [0] * 18},
            {"shard": [9] * 18},
            {"shard": [-1] * 18},
        ],
    )
    def test_places_outside_their_tar_are_never_read(self, tmp_path: Path, change: dict[str, list[int]]) -> None:
        storage = make_dataset(tmp_path)
        replace_rows(storage, change)
        selection = Manifest.open(tmp_path).where(include_rejected=True)
        with pytest.raises(DataError, match="lies outside its tar"):
            selection.read(17)
        bad: list[int] = []
        assert [*selection.scan(on_bad=lambda index, _: bad.append(index))] == []
        assert sorted(bad) == [*range(18)]


class TestForeignFiles:
    def refused(self, path: Path, reason: str) -> None:
        with pytest.raises(DataError, match=reason) as caught:
            Manifest.open(path).where(include_rejected=True).read(0)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"x" * 5000, b"\x80\x04pickle."])
    def test_no_parquet(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "m.parquet").write_bytes(data)
        self.refused(tmp_path / "m.parquet", r"m\.parquet: not a readable Parquet file")

    def test_missing(self, tmp_path: Path) -> None:
        self.refused(tmp_path, r"m\.parquet: no such file")
        self.refused(tmp_path / "no/where.parquet", r"where\.parquet: no such file")

    def test_somebody_elses_parquet(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"key": ["a"], "number": [1]}), tmp_path / "m.parquet")
        self.refused(tmp_path, r"not a manifest of this factory: column 2 is 'number', expected 'shard'")
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "m.parquet")
        self.refused(tmp_path, r"not a manifest of this factory: column 1 is 'text', expected 'key'")
        pq.write_table(SCHEMA.empty_table(), tmp_path / "m.parquet")
        self.refused(tmp_path, "metadata lacks factory.format_version")

    @pytest.mark.parametrize(
        ("name", "values", "reason"),
        [
            ("label", pa.array(["1"] * 6), "column 'label' is string, expected int32"),
            ("lca", pa.array([1] * 6), "column 'lca' is int64"),
            ("xxh3", pa.array([b"short"] * 6), "column 'xxh3' is binary"),
            ("label", pa.array([None] * 6, pa.int32()), "column 'label' may be null"),
        ],
    )
    def test_wrong_types(self, tmp_path: Path, name: str, values: pa.Array, reason: str) -> None:
        storage = make_dataset(tmp_path, shards=1)
        table = pq.read_table(storage.path("m.parquet"))
        changed = table.set_column(table.schema.get_field_index(name), name, values)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), storage.path("m.parquet"))
        self.refused(tmp_path, reason)

    def test_other_number_of_rows(self, tmp_path: Path) -> None:
        storage = make_dataset(tmp_path, shards=1)
        table = pq.read_table(storage.path("m.parquet"))
        pq.write_table(table.slice(0, 5), storage.path("m.parquet"))
        self.refused(tmp_path, "5 rows, but its tars hold 6")

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        storage = make_dataset(tmp_path, shards=1)
        table = pq.read_table(storage.path("m.parquet"))
        broken = pa.array([b"\xff\xfe"] * 6).view(pa.string())
        changed = table.set_column(table.schema.get_field_index("prompt"), SCHEMA.field("prompt"), broken)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), storage.path("m.parquet"))
        selection = Manifest.open(tmp_path).where(include_rejected=True)
        for call in (lambda: selection.row(0), lambda: selection.column("prompt")):
            with pytest.raises(DataError):
                call()

    def test_a_flipped_bit_in_a_page_is_an_error_not_a_value(self, tmp_path: Path) -> None:
        storage = make_dataset(tmp_path)
        data = storage.read("m.parquet")
        group = pq.ParquetFile(storage.path("m.parquet")).metadata.row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        column = next(column for column in columns if column.path_in_schema == "confidence")
        flip(storage, "m.parquet", column.data_page_offset + column.total_compressed_size - 3)
        with pytest.raises(DataError, match=r"m\.parquet: not a readable Parquet file"):
            Manifest.open(tmp_path).where(include_rejected=True).column("confidence")
        assert data != storage.read("m.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m.parquet", ("m.parquet", 1.0)),
        ("runs/a/m.parquet@0.3", ("runs/a/m.parquet", 0.3)),
        ("s3://user@host/m.parquet", ("s3://user@host/m.parquet", 1.0)),
        ("s3://user@host/m.parquet@2", ("s3://user@host/m.parquet", 2.0)),
        ("odd@name.parquet", ("odd@name.parquet", 1.0)),
    ],
)
def test_weights_of_sources(text: str, expected: tuple[str, float]) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", ["m.parquet@0", "m.parquet@-1", "m.parquet@nan", "m.parquet@inf", "@0.5"])
def test_impossible_weights_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="must be a positive number"):
        parse_source(text)


def test_threads_may_look_at_rows_at_the_same_time(whole: Storage) -> None:
    manifest, rows = Manifest.open(whole.url).where(include_rejected=True), [*range(0, 18, 4)] * 8
    expected = [manifest.row(row)["key"] for row in rows]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            assert list(pool.map(lambda row: manifest.row(row)["key"], rows)) == expected


def test_selections_compose_in_any_order(whole: Storage) -> None:
    manifest = Manifest.open(whole.url)
    both = manifest.where("label == 0 and shard > 0", include_rejected=True).column("key")
    for selection in (
        manifest.where("label == 0").where("shard > 0", include_rejected=True),
        manifest.where("label == 0", include_rejected=True).where("shard > 0"),
        manifest.where(include_rejected=True).where("shard > 0").where("label == 0"),
    ):
        assert selection.column("key") == both
    kept = manifest.where("label == 0").where("shard > 0")
    assert kept.column("key") == [key for key in both if key[-1] != "4"] != both
    assert len(manifest) == 15 and manifest.num_rows == 18
    with pytest.raises(DataError, match="none of its 15 kept rows satisfies 'label == 0 and label == 2'"):
        manifest.where("label == 0").where("label == 2")
    with pytest.raises(UsageError, match="--where 'label =='"):
        manifest.where("label == 0").where("label ==")


def test_taken_rows_keep_their_order_and_can_be_narrowed(whole: Storage) -> None:
    everything = Manifest.open(whole.url).where(include_rejected=True)
    taken = everything.take([9, 4, 2])
    assert taken.column("key") == ["000001-000003", "000000-000004", "000000-000002"]
    assert taken.take(slice(1, 3)).read_many([1, 0]) == [make_image(0, 2), make_image(0, 4)]
    assert taken.where("shard == 0").column("key") == ["000000-000004", "000000-000002"]
    assert taken.where(include_rejected=False).column("key") == ["000001-000003", "000000-000002"]


def test_a_table_holds_the_selected_rows(whole: Storage) -> None:
    selection = Manifest.open(whole.url).where("label == 2")
    table = selection.to_table()
    assert table.column_names == SCHEMA.names
    assert table.to_pylist() == [selection.row(index) for index in range(len(selection))]


@pytest.fixture
def pictures(tmp_path: Path) -> Manifest:
    """Nine images of one gray level each, 2 × 2 pixels, of which the last is rejected."""
    storage = Storage(tmp_path)
    with ShardWriter(storage, 0, FINGERPRINT) as writer:
        for level in range(9):
            buffer = io.BytesIO()
            Image.new("RGB", (2, 2), (level,) * 3).save(buffer, "PNG")
            writer.add({"label": level % 3, "method": "test", "kept": level < 8}, buffer.getvalue())
        writer.commit()
    names = ("zero", "<script>alert(1)</script>", "zero")
    prior = {"pipeline": "<b>", "sha256": "9" * 64}
    merge(storage, replace(INFO, image_size=2, class_names=names, prior=prior))
    return Manifest.open(tmp_path)


def test_a_dataset_feeds_a_data_loader(pictures: Manifest) -> None:
    dataset = pictures.where("label != 1").dataset()
    image, label = dataset[2]
    assert (image.mode, image.size, image.getpixel((1, 1)), label) == ("RGB", (2, 2), (3, 3, 3), 0)
    assert [image.getpixel((0, 0))[0] for image, _ in dataset] == [0, 2, 3, 5, 6]
    assert dataset[-1][0].getpixel((0, 0)) == (6, 6, 6)
    with pytest.raises(IndexError):
        dataset[5]
    for context in ("fork", "spawn"):
        loader = DataLoader(
            pickle.loads(pickle.dumps(pictures.dataset(first_level))),
            batch_size=3,
            num_workers=1,
            multiprocessing_context=context,
        )
        levels, labels = zip(*loader, strict=True)
        assert [level.tolist() for level in levels] == [[0, 1, 2], [3, 4, 5], [6, 7]]
        assert [label.tolist() for label in labels] == [[0, 1, 2], [0, 1, 2], [0, 1]]


def first_level(image: Any) -> int:
    return int(image.getpixel((0, 0))[0])


def test_pictures_are_evenly_spread(pictures: Manifest) -> None:
    assert [first_level(image) for image in pictures.images(3)] == [0, 4, 7]
    assert len(pictures.images()) == 8


def test_an_image_of_another_size_is_named(pictures: Manifest) -> None:
    merge(pictures.storage, replace(INFO, image_size=3))
    with pytest.raises(DataError, match="sample 000000-000004: not a readable image: 2×2 pixels, expected 3×3"):
        Manifest.open(pictures.url).dataset()[4]


def test_a_notebook_shows_what_a_manifest_holds(pictures: Manifest) -> None:
    chosen = pictures.where("label < 2")
    assert repr(chosen) == f"Manifest({pictures.url!r}, 6 of 9 rows, where 'label < 2')"
    shown = chosen._repr_html_()
    for text in (
        "6 of 9 rows, 2 × 2 pixels",
        "label &lt; 2",
        "3: zero (0) (3), &lt;script&gt;alert(1)&lt;/script&gt; (3)",
        "&lt;b&gt; sha256 999999999999",
        "builtin sha256 cdcdcdcdcdcd",
        FINGERPRINT[:12],
    ):
        assert f"{text}</td>" in shown
    assert "<script>" not in shown and "<b>" not in shown


def test_a_manifest_without_kept_images_can_be_shown(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_shard(storage, 0, rows=0)
    merge(storage, INFO)
    empty = Manifest.open(tmp_path)
    assert "none of 0 rows" in repr(empty) and "none of 0 rows" in empty._repr_html_()


def rewritten(tmp_path: Path, text: str, rows: int = 400, column: str = "prompt", **options: Any) -> str:
    """A manifest of ``rows`` rows with the same ``text`` in all: small in its file."""
    storage = Storage(tmp_path)
    write_shard(storage, 0, rows)
    merge(storage, INFO)
    table = pq.read_table(tmp_path / "m.parquet")
    values = table.set_column(
        table.schema.get_field_index(column), table.schema.field(column), pa.array([text] * rows, pa.string())
    )
    pq.write_table(values, tmp_path / "m.parquet", **{**write_options(), **options})
    assert (tmp_path / "m.parquet").stat().st_size < 1 << 20
    return storage.url


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("x" * 5_000_000, {}, "a text has more than 1048576 bytes"),
        ("x" * 1_000_000, {}, "a row group has more than 268435456 bytes of text"),
        (
            "x" * 1_000_000,
            {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
            "column 'prompt' is delta-encoded",
        ),
    ],
)
def test_repeated_text_is_bounded_before_it_is_spelled_out(
    tmp_path: Path, text: str, options: dict[str, Any], line: str
) -> None:
    url, before = rewritten(tmp_path, text, **options), pa.default_memory_pool().max_memory()
    for look in (lambda m: m.where("prompt == 'a'"), lambda m: m.column("prompt"), lambda m: m.row(0)):
        with pytest.raises(DataError, match=line):
            look(Manifest.open(url))
    assert pa.default_memory_pool().max_memory() - before < 64 << 20


def test_repeated_keys_are_bounded_too(tmp_path: Path) -> None:
    url = rewritten(tmp_path, "0" * 5_000_000, column="key", use_dictionary=["key"])
    with pytest.raises(DataError, match="a text has more than 1048576 bytes"):
        Manifest.open(url).column("key")
