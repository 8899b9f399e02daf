"""``factory rescore``: a second judgement beside the first, on which every other command works."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manifests.errors import DataError, FactoryError, UsageError
from manifests.integrity import verify
from manifests.reader import Manifest
from manifests.shard import done_name, done_records
from manifests.storage import Storage
from pipeline.distill import run_distill
from pipeline.inspect import summarize
from pipeline.lease import Lease
from pipeline.recipe import resolve
from pipeline.rescore import rescore
from stages.models import nets
from stages.models.loading import save_model
from tests.distill.drawn import TEACHER, write_dataset


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "d", trajectory=lambda i: i)


@pytest.fixture
def other(tmp_path):
    """Another teacher of the same classes."""
    torch.manual_seed(3)
    save_model(tmp_path / "other", nets.build("digits-cnn-small", 3, 1), TEACHER)
    return str(tmp_path / "other")


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "lease" not in p.parts}


def test_columns_come_from_the_dataset_teacher_and_nothing_else_changes(tmp_path, manifest):
    before = files(tmp_path / "d")
    result = rescore(manifest, threshold=0.3, quiet=True)
    after = files(tmp_path / "d")
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"rescored.parquet"}
    rows = pq.read_table(result.manifest).to_pylist()
    assert all(row["kept"] == (row["reject_reason"] is None) and row["confidence"] > 1 / 3 for row in rows)
    assert result.kept == sum(row["kept"] for row in rows) < result.kept_before == 48
    assert Manifest.open(manifest).info.tars == Manifest.open(result.manifest).info.tars
    assert all(line.isprintable() for line in result.lines())


def test_verify_inspect_and_distill_work_on_it(tmp_path, manifest, other):
    result = rescore(manifest, other, 0.2, "b.parquet", quiet=True)
    assert verify(result.manifest) == verify(manifest) == []
    assert summarize(Manifest.open(result.manifest)).scores["confidence"] is not None
    recipe = resolve("demo", section="distill", sets=["epochs=1", "augment.cutmix=0", "augment.mixup=0"], environ={})
    done = run_distill(recipe, [(result.manifest, 1.0)], str(tmp_path / "s"), quiet=True)
    assert done.teacher_check.recorded_agreement == 1
    assert done.images + done.val_images == result.kept


def test_a_second_teacher_lies_beside_the_first(tmp_path, manifest, other):
    info = Manifest.open(rescore(manifest, other, quiet=True).manifest).info
    assert info.teacher["path"].startswith("teacher-")
    assert (tmp_path / "d" / info.teacher["path"]).read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    assert info.rescored["from_teacher"] == Manifest.open(manifest).info.teacher["sha256"] != info.teacher["sha256"]
    assert info.rescored["from_manifest"] == Manifest.open(manifest).digest
    assert info.fingerprint == Manifest.open(manifest).info.fingerprint


def test_again_it_gives_the_same_rows_and_its_threshold_is_inherited(tmp_path, manifest, other):
    first = rescore(manifest, other, 0.4, "b.parquet", quiet=True)
    back = rescore(first.manifest, str(tmp_path / "d/teacher"), out="c.parquet", quiet=True)
    again = rescore(manifest, threshold=0.4, out=str(tmp_path / "d/e.parquet"), quiet=True)
    assert back.threshold == 0.4
    assert pq.read_table(back.manifest).equals(pq.read_table(again.manifest))


def test_a_published_rescored_manifest_needs_only_the_tars_and_its_rows_are_checked(tmp_path, manifest, other):
    made = rescore(manifest, other, quiet=True).manifest
    storage = Storage(tmp_path / "d")
    table = pq.read_table(made)
    wrong = table.set_column(
        table.schema.get_field_index("label"), table.schema.field("label"), pa.array([2] * 48, pa.int32())
    )
    pq.write_table(wrong, tmp_path / "d/wrong.parquet")
    assert any("column 'label'" in str(problem) for problem in verify(tmp_path / "d/wrong.parquet"))
    for record in done_records(storage).values():
        storage.delete(done_name(record.shard))
        storage.delete(record.table)
    assert verify(made) == []
    assert any("its label in the tar is b'0', in its row 2" in str(p) for p in verify(tmp_path / "d/wrong.parquet"))


def test_refusals_write_nothing(tmp_path, manifest, other):
    torch.manual_seed(0)
    config = TEACHER.model_copy(update={"num_classes": 4, "class_names": ("a", "b", "c", "d")})
    save_model(tmp_path / "four", nets.build("digits-cnn-small", 4, 1), config)
    turned = TEACHER.model_copy(update={"class_names": TEACHER.class_names[::-1]})
    save_model(tmp_path / "turned", nets.build("digits-cnn-small", 3, 1), turned)
    before = files(tmp_path / "d")
    for error, says, arguments in (
        (UsageError, "--teacher, --threshold or both", {}),
        (UsageError, "0 to 1", {"threshold": 1.5}),
        (UsageError, "0 to 1", {"threshold": float("nan")}),
        (UsageError, "beside its tars", {"threshold": 0.5, "out": str(tmp_path / "x.parquet")}),
        (UsageError, "not m.parquet", {"threshold": 0.5, "out": "m.parquet"}),
        (UsageError, "device 'foo' cannot be used", {"threshold": 0.5, "device": "foo"}),
        (UsageError, "ends in .parquet", {"threshold": 0.5, "out": "plan.json"}),
        (DataError, "has 3 classes, the teacher 4", {"teacher": str(tmp_path / "four")}),
        (DataError, "in another order", {"teacher": str(tmp_path / "turned")}),
    ):
        with pytest.raises(error, match=says):
            rescore(manifest, quiet=True, **arguments)
    assert files(tmp_path / "d") == before
    rescore(manifest, threshold=0.5, device="auto", quiet=True)
    with pytest.raises(DataError, match="exists already"):
        rescore(manifest, threshold=0.6, quiet=True)
    with Lease(Storage(tmp_path / "d")), pytest.raises(FactoryError, match="in use"):
        rescore(manifest, threshold=0.6, out="b.parquet", quiet=True)


def test_a_damaged_image_is_named_and_leaves_no_manifest(tmp_path, manifest):
    tar = Manifest.open(manifest).info.tars[1]
    path = tmp_path / "d" / tar.name
    path.write_bytes(path.read_bytes()[:520] + b"??" + path.read_bytes()[522:])
    with pytest.raises(DataError, match="shard 1, sample '000001-000000' was altered"):
        rescore(manifest, threshold=0.5, quiet=True)
    assert not (tmp_path / "d/rescored.parquet").exists()
    assert not list((tmp_path / "d/tmp").iterdir())


def test_a_dataset_without_its_teacher_asks_for_one(tmp_path):
    manifest = write_dataset(tmp_path / "d", teacher={"kind": "external", "sha256": "ab" * 32})
    with pytest.raises(DataError, match="does not carry its teacher.*--teacher"):
        rescore(manifest, threshold=0.5, quiet=True)


def test_the_command(manifest, capsys, monkeypatch):
    from pipeline import cli

    monkeypatch.setattr("sys.argv", ["factory", "rescore", manifest, "--threshold", "0.3", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["rows"] == 48


def test_a_black_box_judges_a_remote_dataset_and_is_only_named(tmp_path, monkeypatch):
    manifest = write_dataset(f"memory://{tmp_path.name}/d", trajectory=lambda i: i)
    (tmp_path / "own_judge.py").write_text("def judge():\n    return lambda x: x.flatten(1)[:, :3]\n")
    (tmp_path / "judge.yaml").write_text(
        "{name: 'own_judge:judge', num_classes: 3, class_names: [left, right, top], "
        "input: {size: 8, channels: 1, mean: [0.3], std: [0.4]}}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = rescore(manifest, str(tmp_path / "judge.yaml"), 0.4, quiet=True)
    assert 0 < result.kept < 48
    assert (result.teacher["kind"], "path" in result.teacher) == ("external", False)
    assert verify(result.manifest) == []
    with pytest.raises(DataError, match="does not carry its teacher"):
        rescore(result.manifest, threshold=0.5, out="b.parquet", quiet=True)
