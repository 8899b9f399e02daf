"""Loading: what fits is loaded whole, what does not is refused with one clear line."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from manifests.errors import DataError, UsageError
from stages.models import folders, nets
from stages.models.loading import load_model, load_teacher, save_model
from stages.models.source import EMBEDDED, ModelConfig, config_json, resolve, teacher_identity
from stages.settings import InputSettings, ModelSettings

INPUT = InputSettings(size=8, channels=1, mean=(0.3,), std=(0.4,))
CONFIG = ModelConfig(
    architecture="digits-cnn-small", num_classes=3, channels=1, input=INPUT, class_names=("a", "b", "c")
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "m", nets.build("digits-cnn-small", 3, 1), CONFIG)
    return tmp_path / "m"


def test_saved_model_comes_back_equal(folder, tmp_path):
    net, config = load_model(folder)
    assert config == CONFIG
    save_model(tmp_path / "again", net, config)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["pt", "pth.tar", "safetensors"])
def test_wrapper_prefixes_and_nesting_are_stripped(folder, tmp_path, kind):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    path = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(wrapped, path)
    else:
        torch.save({"state_dict": wrapped, "epoch": 3}, path)
    teacher = load_teacher(ModelSettings(name="digits-cnn-small", weights=str(path), input=INPUT, num_classes=3))
    assert torch.equal(teacher.class_weights, state["classifier.weight"])
    assert teacher.class_names == ("class 0", "class 1", "class 2")


def test_truncated_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated"):
        load_teacher(ModelSettings(name=str(folder)))


def test_a_source_reads_its_weights_once_and_notices_that_they_changed(folder, monkeypatch):
    source, reads = resolve(ModelSettings(name=str(folder), weights=str(folder / "model.safetensors"))), []
    read = folders.read_regular
    monkeypatch.setattr(folders, "read_regular", lambda path, *more: reads.append(path.name) or read(path, *more))
    before = source.identity["sha256"]
    assert load_teacher(source).identity["sha256"] == before
    assert reads == ["model.safetensors"]
    source.release()
    load_teacher(source)
    (folder / "model.safetensors").write_bytes(safetensors.torch.save({"w": torch.zeros(1)}))
    load_teacher(source)
    source.release()
    with pytest.raises(DataError, match=f"model.safetensors is truncated or was altered: .* expected {before}"):
        load_teacher(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_a_saved_model_is_refused(folder, tmp_path_factory, name):
    outside = (folder / name).rename(tmp_path_factory.mktemp("elsewhere") / name)
    (folder / name).symlink_to(outside)
    with pytest.raises(DataError, match=rf"{name} is a link out of its folder"):
        load_teacher(ModelSettings(name=str(folder)))


def test_missing_weights_and_missing_folder(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot read teacher weights .*model\.safetensors"):
        load_teacher(ModelSettings(name=str(folder)))
    with pytest.raises(DataError, match="does not exist"):
        load_teacher(ModelSettings(name=str(folder / "nowhere")))


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {"epoch": 3}, [torch.zeros(1)]])
def test_checkpoints_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt holds no table of named tensors"):
        load_teacher(ModelSettings(name="digits-cnn", weights=str(tmp_path / "w.pt"), input=INPUT, num_classes=3))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "model_best.pth.tar", "w"])
@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_files_that_are_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is (truncated or no safetensors file|damaged, or no file of|empty)"):
        load_teacher(ModelSettings(name="digits-cnn", weights=str(tmp_path / name), input=INPUT, num_classes=3))


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}])
def test_a_checkpoint_without_weights_is_no_random_network(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt holds no table of named tensors"):
        load_teacher(ModelSettings(name="digits-cnn", weights=str(tmp_path / "w.pt"), input=INPUT, num_classes=3))


def test_one_class_leaves_nothing_to_choose(tmp_path):
    one = CONFIG.model_copy(update={"num_classes": 1, "class_names": ("a",)})
    save_model(tmp_path, nets.build("digits-cnn-small", 1, 1), one)
    with pytest.raises(DataError, match=r"config\.json: number of classes is 1; expected 2 to 100000"):
        load_model(tmp_path)


@pytest.mark.parametrize("channels", [-1, 3, 1 << 40])
def test_a_config_has_one_number_of_channels(folder, channels):
    config = CONFIG.model_copy(update={"channels": channels})
    (folder / "config.json").write_bytes(config_json(config, (folder / "model.safetensors").read_bytes()))
    with pytest.raises(
        DataError, match=r"config\.json(: channels is 3, but input\.channels is 1| is no model config: channels: )"
    ):
        load_model(folder)


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"no table of named tensors \(x: builtins\.print\)"):
        load_teacher(ModelSettings(name="digits-cnn", weights=str(tmp_path / "evil.pt"), input=INPUT, num_classes=3))


def test_keys_that_do_not_fit_are_named(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["extra.weight"] = state.pop("stage1.0.0.weight")
    weights = safetensors.torch.save(state)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_bytes(config_json(CONFIG, weights))
    with pytest.raises(DataError, match=r"missing: stage1\.0\.0\.weight"):
        load_model(folder)


def test_class_counts_must_agree(folder):
    with pytest.raises(DataError, match="has 3 classes, but num_classes is 10"):
        load_teacher(ModelSettings(name=str(folder), num_classes=10))
    weights = str(folder / "model.safetensors")
    with pytest.raises(DataError, match="has 3 classes, but 10 were asked for"):
        load_teacher(ModelSettings(name="digits-cnn-small", weights=weights, input=INPUT, num_classes=10))
    config = json.loads((folder / "config.json").read_text())
    del config["checksum"]  # as a user who writes one by hand
    (folder / "config.json").write_text(json.dumps({**config, "class_names": ["a"]}))
    with pytest.raises(DataError, match="1 class names for 3 classes"):
        load_model(folder)


def test_unknown_names():
    with pytest.raises(UsageError, match=r"did you mean .*resnet20"):
        nets.build("resnet-20", 10)
    with pytest.raises(UsageError, match="embedded:digits"):
        load_teacher(ModelSettings(name="embedded:letters"))
    with pytest.raises(UsageError, match="needs weights, input, num_classes"):
        load_teacher(ModelSettings(name="resnet20"))


def test_embedded_teacher_and_its_identity(tmp_path):
    teacher = load_teacher(ModelSettings())
    assert teacher.num_classes == 10
    assert teacher.has_batchnorm
    assert teacher.differentiable
    assert teacher.identity == teacher_identity(ModelSettings())
    copy = tmp_path / "copy"
    shutil.copytree(EMBEDDED["embedded:digits"], copy)
    assert load_teacher(ModelSettings(name=str(copy))).identity == teacher.identity


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("mine.pt", "factory init mine.pt writes such a recipe"),
        ("mynet.nets.MyNet", "own code is named mynet.nets:MyNet"),
    ],
)
def test_names_of_another_form_are_answered_with_the_form_that_works(name, form):
    with pytest.raises(UsageError, match=form):
        resolve(ModelSettings(name=name))
