"""A downloaded dataset as an enemy would make it: it cannot run code, write elsewhere, or fill the memory."""

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from manifests.errors import DataError, FactoryError, UsageError
from manifests.integrity import verify
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import resolve_distill
from stages.distill.eval_data import labeled_images
from stages.distill.evaluate import evaluate
from stages.distill.export import markdown
from stages.distill.run import run_distill
from stages.distill.student import Student
from stages.models.source import NamedConfig, config_json
from stages.settings import DistillSettings
from tests.distill.drawn import TEACHER, square, teacher_files, write_dataset
from tests.distill.short import settings

ANSI = "<script>\x1b[31m\nx\u202e"


def rewritten(path: str, **changes: Any) -> str:
    """The manifest with another description, checksums and all."""
    storage = Storage(Path(path).parent)
    merge(storage, dataclasses.replace(Manifest.open(path).info.with_tars(()), **changes))
    return path


def teacher_of(manifest: str, **changes: Any) -> dict[str, Any]:
    return Manifest.open(manifest).info.teacher | changes


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that appears if ``evil.py``, importable from here, is ever run."""
    found = tmp_path / "was-run"
    (tmp_path / "evil.py").write_text(f"open({str(found)!r}, 'w')\ndef net(**_): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield found
    assert not found.exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class TestTeacher:
    @pytest.mark.parametrize("place", ["../{}", "/etc/passwd", "teacher/../../{}", "teacher/./x", "a\\b", "", "x\n"])
    def test_its_weights_lie_inside_the_dataset(self, tmp_path, place):
        path = write_dataset(tmp_path / "d", 12)
        outside = tmp_path / "outside.safetensors"
        outside.write_bytes((tmp_path / "d/teacher/model.safetensors").read_bytes())
        rewritten(path, teacher=teacher_of(path, path=place.format(outside.name)))
        with pytest.raises(DataError, match="unsafe file name"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "name", ["evil:net", "hf:evil/net", "hf:.", "timm:resnet18", "torchvision:resnet18", "x.onnx"]
    )
    def test_only_built_in_networks_are_built_from_metadata(self, tmp_path, marker, name):
        path = write_dataset(tmp_path / "d", 12)
        config = teacher_of(path)["config"] | {"architecture": name}
        rewritten(path, teacher=teacher_of(path, config=config, architecture=name))
        with pytest.raises(DataError, match="a built-in teacher, which it is not: name the teacher"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))

    @pytest.mark.parametrize(
        "change",
        [{"num_classes": 10**12}, {"num_classes": -1}, {"class_names": ["a"]}, {"input": {"size": 10**9}}, {"x": 1}],
    )
    def test_its_size_is_bounded(self, tmp_path, change):
        path = write_dataset(tmp_path / "d", 12)
        config = teacher_of(path)["config"]
        config = config | (change | {"input": config["input"] | change["input"]} if "input" in change else change)
        rewritten(path, teacher=teacher_of(path, config=config))
        with pytest.raises(DataError, match="its teacher's config.*; name the teacher with --teacher"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))

    def test_pickled_weights_are_never_loaded(self, tmp_path, marker):
        path = write_dataset(tmp_path / "d", 12)
        buffer = io.BytesIO()
        torch.save({"net": Evil(marker)}, buffer)
        for name, data in {"model.pt": buffer.getvalue(), "model.safetensors": pickle.dumps(Evil(marker))}.items():
            (tmp_path / "d/teacher" / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            rewritten(path, teacher=teacher_of(path, path=f"teacher/{name}", sha256=digest))
            with pytest.raises(DataError, match="no table of named tensors|no safetensors file"):
                run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))

    def test_verify_names_an_altered_copy(self, tmp_path):
        path = write_dataset(tmp_path / "d", 12)
        copy = tmp_path / "d/teacher/model.safetensors"
        copy.write_bytes(copy.read_bytes()[:-1] + b"\x07")
        assert [str(p) for p in verify(path)] == [
            "teacher/model.safetensors: was altered: its sha256 differs from the manifest's"
        ]


class TestStoredRecipe:
    def recipe(self, tmp_path, distill, sets=(), **flags):
        path = rewritten(write_dataset(tmp_path / "d", 12), recipe={"name": "x", "distill": distill})
        return resolve_distill(
            Manifest.open(path), None, sets, {f"distill.{k}": (f"--{k}", v) for k, v in flags.items()}
        )

    @pytest.mark.parametrize("name", ["evil:net", "hf:evil/net", "x.onnx"])
    def test_its_students_are_built_in_or_named_by_the_user(self, tmp_path, marker, name):
        with pytest.raises(
            UsageError, match=f"never built because a file says so: name it yourself, with --student {name}"
        ):
            self.recipe(tmp_path, {"students": ["resnet8", name]})
        assert self.recipe(tmp_path, {"students": [name]}, students=["resnet8"]).distill.students == ("resnet8",)
        assert self.recipe(tmp_path, {}, [f"students=['{name}']"]).distill.students == (name,)

    def test_it_says_nothing_of_the_machine(self, tmp_path):
        hostile = {"device": "cuda:7", "threads": 10**30, "memory_gb": 1e300, "checkpoint_seconds": 0}
        assert self.recipe(tmp_path, hostile).distill == DistillSettings()

    def test_it_says_nothing_of_places_and_lets_nothing_through(self, tmp_path):
        hostile = {"loggers": ["wandb"], "skip_bad": True, "allow_other_teacher": True, "epochs": 3}
        found = self.recipe(
            tmp_path, hostile | {"teacher_cache": {"folder": str(tmp_path / "home"), "top_k": 5}}
        ).distill
        assert (found.loggers, found.skip_bad, found.allow_other_teacher, found.teacher_cache.folder) == (
            (),
            False,
            False,
            None,
        )
        assert (found.epochs, found.teacher_cache.top_k) == (3, 5)

    @pytest.mark.parametrize(
        "distill", [5, [], "x", {"students": 5}, {"teacher_cache": 5}, {"epochs": 1.5}, {"lr": None}]
    )
    def test_nonsense_is_one_line(self, tmp_path, distill):
        with pytest.raises(UsageError, match=r"^recipe stored in [^\n]*$"):
            self.recipe(tmp_path, distill)


class TestImages:
    def run(self, tmp_path, make):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.distill.drawn.square", lambda label, rng: make(square(label, rng)))
            path = write_dataset(tmp_path / "d", 12)
        for out in ("cached", "streamed"):
            asked = settings(memory_gb=0.0 if out == "streamed" else 1.0)
            with pytest.raises(DataError, match=r"sample '000000-0000\d\d': not a readable image: [^\n]*$"):
                run_distill(asked, [(path, 1.0)], str(tmp_path / out))

    def test_bombs(self, tmp_path, monkeypatch):
        from tests.manifests.test_images import png_claiming

        self.run(tmp_path, lambda _: png_claiming(12_000, 12_000))

    def test_images_of_another_size(self, tmp_path):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 8)).save(buffer, "PNG")
        self.run(tmp_path, lambda _: buffer.getvalue())

    def test_no_images(self, tmp_path, marker):
        self.run(tmp_path, lambda _: pickle.dumps(Evil(marker)))

    def test_keys_and_labels_that_stage_1_never_writes(self, tmp_path):
        path = write_dataset(tmp_path / "d", 12, label=lambda i: i * 1000)
        with pytest.raises(DataError, match="labels reach from 0 to 11000, but its classes are 3"):
            run_distill(settings(), [(path, 1.0)], str(tmp_path / "out"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    for name, data in teacher_files().items():
        (folder / name).write_bytes(data)
    return str(folder)


class TestLabeledData:
    def tar(self, path: Path, *members: tuple[str, bytes, bytes, str]) -> str:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, kind, data, link in members:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = kind, len(data), link
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    def test_paths_links_devices_and_pickles_in_a_tar(self, model, tmp_path, marker):
        image = square(0, np.random.default_rng(0))
        file = tarfile.REGTYPE
        path = self.tar(
            tmp_path / "a.tar",
            ("../../../../tmp/a.png", file, image, ""),
            ("../../../../tmp/a.cls", file, b"0", ""),
            ("/b.png", tarfile.SYMTYPE, b"", "/etc/passwd"),
            ("/b.png", tarfile.LNKTYPE, b"", "/etc/passwd"),
            ("b.png", tarfile.CHRTYPE, b"", ""),
            ("b.png", tarfile.FIFOTYPE, b"", ""),
            ("../../../../tmp/a.pkl", file, pickle.dumps(Evil(marker)), ""),
        )
        assert evaluate(model, path).images == 1
        assert not Path("/tmp/a.png").exists()

    @pytest.mark.parametrize("size", [(64 << 20) + 1, 1 << 40])
    def test_a_member_of_any_claimed_size(self, model, tmp_path, size):
        info = tarfile.TarInfo("a.png")
        info.size = size
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(DataError, match=f"'a.png' claims {size} bytes"):
            evaluate(model, str(tmp_path / "a.tar"))

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"label": Infinity}', '{"label": 1e999}', "[]", '{"label": {}}'])
    def test_oversize_and_nonsense_json(self, model, tmp_path, text):
        image = square(0, np.random.default_rng(0))
        members = (("a.png", tarfile.REGTYPE, image, ""), ("a.json", tarfile.REGTYPE, text.encode(), ""))
        with pytest.raises(DataError, match="sample 'a' has no label"):
            evaluate(model, self.tar(tmp_path / "a.tar", *members))

    def test_bombs_in_every_container(self, model, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from tests.manifests.test_images import png_claiming

        bomb = png_claiming(30_000, 30_000)
        pq.write_table(pa.table({"png": [bomb], "label": [0]}), tmp_path / "a.parquet")
        (tmp_path / "f/left").mkdir(parents=True)
        (tmp_path / "f/left/a.png").write_bytes(bomb)
        tar = self.tar(tmp_path / "a.tar", ("a.png", tarfile.REGTYPE, bomb, ""), ("a.cls", tarfile.REGTYPE, b"0", ""))
        for path in (tmp_path / "a.parquet", tmp_path / "f", tar):
            with pytest.raises(DataError, match="is no image: not a readable image: .*pixels"):
                evaluate(model, str(path))


class TestText:
    def test_class_names_in_the_model_card_are_only_text(self, tmp_path):
        names = (ANSI, "![x](http://evil)", "`code` <img src=x>")
        weights = teacher_files()["model.safetensors"]
        hostile = TEACHER.model_copy(update={"class_names": names})
        (tmp_path / "t").mkdir()
        (tmp_path / "t/model.safetensors").write_bytes(weights)
        (tmp_path / "t/config.json").write_bytes(config_json(hostile, weights))
        path = write_dataset(tmp_path / "d", 12)
        teacher = teacher_of(path) | {"config": hostile.model_dump(mode="json")}
        rewritten(path, teacher=teacher, class_names=names)
        run_distill(settings(epochs=1), [(path, 1.0)], str(tmp_path / "out"))
        card = (tmp_path / "out/digits-cnn-small/README.md").read_text()
        line = next(line for line in card.splitlines() if line.startswith("- **Classes**"))
        assert "&lt;script&gt;\\\\x1b\\[31m\\\\nx\\\\u202e" in line
        assert "!\\[x\\](http\\://evil), \\`code\\` &lt;img src=x&gt;" in line
        assert "\x1b" not in card and "<script" not in card

    def test_markdown(self):
        assert markdown("zero") == "zero"
        assert markdown("https://a.b: WWW.a.b, www.a") == "https\\://a.b: WWW\\.a.b, www\\.a"
        assert markdown("[a](b)\n# c") == "\\[a\\](b)\\\\n# c"


def test_a_checkpoint_cannot_run_code(dataset, tmp_path, marker):
    from stages.distill import checkpoint

    run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "out"))
    path = tmp_path / "out" / checkpoint.STATE
    for hostile in (pickle.dumps(Evil(marker)), None):
        buffer = io.BytesIO(hostile or b"")
        if hostile is None:
            torch.save({"step": Evil(marker)}, buffer)
        path.write_bytes(checkpoint.with_digest(buffer.getvalue()))
        with pytest.raises(FactoryError, match=r"checkpoint\.pt is damaged"):
            run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "out"))


def test_a_model_folder_cannot_run_code(tmp_path, marker):
    weights = safetensors.torch.save({"a": torch.zeros(1)})
    for name in ("evil:net", "hf:evil/net", "x.onnx"):
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(config_json(TEACHER.model_copy(update={"architecture": name}), weights))
        (folder / "model.safetensors").write_bytes(weights)
        with pytest.raises(UsageError, match="never loaded because a file says so"):
            evaluate(str(folder), "x.tar")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(json.dumps(config | {"auto_map": {"AutoModel": "evil.net"}}).encode())
    with pytest.raises(DataError, match="config.json is no model config"):
        evaluate(str(folder), "x.tar")


@pytest.mark.parametrize(
    "metrics", [[None], [{"epoch": "1"}], [{"epoch": 1, "val_agreement": {}}], [{"val_agreement": 1.0}]]
)
def test_a_checkpoint_whose_metrics_are_none_is_damaged(dataset, tmp_path, metrics):
    from stages.distill import checkpoint

    run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "out"))
    path = tmp_path / "out" / checkpoint.STATE
    state = torch.load(io.BytesIO(checkpoint.without_digest(path.read_bytes())), weights_only=True)
    next(iter(state["students"].values()))["metrics"] = metrics
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(checkpoint.with_digest(buffer.getvalue()))
    with pytest.raises(FactoryError, match=r"checkpoint\.pt is damaged"):
        run_distill(settings(epochs=1), [(dataset, 1.0)], str(tmp_path / "out"))


@pytest.mark.parametrize("pattern", ["x{1..99999999}.tar", "{0..999}{0..999}.tar", "x" + "{a,b}" * 40, "{-5..1000000}"])
def test_a_pattern_for_more_files_than_there_can_be(pattern):
    with pytest.raises(DataError, match="stands for more than 100,000 files"):
        labeled_images(pattern, ("a", "b"))


@pytest.mark.parametrize("name", ["torchvision:inception_v3", "digits-cnn-small"])
def test_a_student_for_larger_images_is_one_line(name):
    size = 1 if name == "digits-cnn-small" else 16
    chosen = DistillSettings(students=(name,), input={"size": size, "mean": (0,) * 3, "std": (1,) * 3})
    config = NamedConfig(
        architecture=name, num_classes=10, channels=3, input=chosen.input, class_names=tuple("0123456789")
    )
    with pytest.raises(UsageError, match=rf"'{name}' cannot take {size} × {size} pixels"):
        Student(config, chosen, torch.device("cpu"))


def test_a_repeated_image_of_a_parquet_file_is_spelled_out_row_by_row(tmp_path):
    image = bytes(100 << 20)  # repeated 64 times, 6.7 GB
    table = pa.table(
        {"image": pa.DictionaryArray.from_arrays(pa.array([0] * 64), pa.array([image])), "label": [0] * 64}
    )
    pq.write_table(
        table, tmp_path / "t.parquet", use_dictionary=["image"], compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 20
    del table, image
    before = pa.default_memory_pool().bytes_allocated()
    data = labeled_images(str(tmp_path / "t.parquet"), ("a", "b"))
    with pytest.raises(DataError, match="row 0"):
        next(iter(data))
    assert pa.default_memory_pool().max_memory() - before < 1 << 30
