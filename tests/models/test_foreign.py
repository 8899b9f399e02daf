"""Classifiers from elsewhere: built, loaded, tapped, or refused with one clear line."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from manifests.errors import DataError, UsageError
from stages.models import build, nets
from stages.models.hooks import head_of, outputs_of, stage_paths
from stages.models.loading import build_from, load_model, load_teacher, save_model
from stages.models.source import (
    ModelConfig,
    NamedConfig,
    default_stem,
    resolve,
    source_file,
    split_name,
    teacher_identity,
)
from stages.settings import InputSettings, ModelSettings

RGB = InputSettings(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def config(name, classes=5, stem="native", size=8):
    spec = RGB.model_copy(update={"size": size})
    names = tuple("abcdefgh"[:classes])
    return ModelConfig(architecture=name, num_classes=classes, channels=3, input=spec, class_names=names, stem=stem)


def named_config(name, **more):
    """A configuration whose architecture the user wrote."""
    return NamedConfig(**config(name, **more).model_dump())


def own(function, **more):
    return ModelSettings(name=f"tests.models.nets:{function}", input=RGB, num_classes=5, **more)


class TestNames:
    def test_schemes(self):
        assert split_name("tests.models.nets:tiny")[0] == "code"
        assert split_name("runs/x.onnx") == ("onnx", "runs/x.onnx")
        assert split_name("hf:org/name") == ("hf", "org/name")
        assert split_name("runs/teacher") == ("builtin", "runs/teacher")

    def test_the_stem_is_small_where_that_is_no_guess(self):
        assert default_stem("resnet18", 32) == "small"
        assert default_stem("resnet18", 65) == "native"
        assert default_stem("timm:resnet18", 32) == "native"  # a teacher's weights: its user must say
        assert default_stem("timm:resnet18", 32, student=True) == "small"
        assert default_stem("resnet20", 32, student=True) == "native"

    def test_source_files_are_found_without_running_them(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "boom").mkdir()
        for name in ("__init__", "net"):
            (tmp_path / "boom" / f"{name}.py").write_text("raise SystemExit('was run')")
        assert source_file("boom.net:f") == tmp_path / "boom" / "net.py"
        (tmp_path / "no_init" / "inner").mkdir(parents=True)
        (tmp_path / "no_init" / "inner" / "net.py").touch()
        assert source_file("no_init.inner.net:f") == tmp_path / "no_init" / "inner" / "net.py"
        with pytest.raises(DataError, match=r"no Python file for module boom\.other"):
            source_file("boom.other:f")


class TestOwnCode:
    def test_a_network_in_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = Path(__file__).with_name("nets.py").read_text()
        (tmp_path / "here_and_now.py").write_text(text)
        settings = ModelSettings(name="here_and_now:tiny", input=RGB, num_classes=5, class_names=tuple("vwxyz"))
        before = teacher_identity(settings)
        teacher = load_teacher(settings)
        assert teacher.identity == before
        assert before["kind"] == "external"
        assert teacher.class_names == tuple("vwxyz")
        assert teacher.with_features(IMAGES)[1].shape == (3, 4)
        safetensors.torch.save_file(teacher.net.state_dict(), tmp_path / "w.safetensors")
        again = settings.model_copy(update={"weights": "w.safetensors"})
        assert torch.equal(load_teacher(again).logits(IMAGES), teacher.logits(IMAGES))
        (tmp_path / "here_and_now.py").write_text(text + "\n")
        assert len({before["sha256"], teacher_identity(again)["sha256"], teacher_identity(settings)["sha256"]}) == 3

    def test_batchnorm_inputs_follow_the_layers_not_the_calls(self):
        teacher = load_teacher(own("backwards"))
        logits, inputs = teacher.with_batchnorm_inputs(IMAGES)
        assert torch.equal(logits, teacher.logits(IMAGES))
        assert [len(mean) for mean, _ in teacher.batchnorms] == [x.shape[1] for x in inputs] == [6, 3]
        assert torch.equal(inputs[1], torch.cat([teacher.input(IMAGES), -teacher.input(IMAGES)], 2).flatten(2))

    def test_logits_beside_features_are_found(self):
        teacher = load_teacher(own("with_features"))
        assert teacher.logits(IMAGES).shape == (3, 5)
        assert not teacher.has_batchnorm

    @pytest.mark.parametrize(
        ("function", "line"),
        [
            ("two_heads", r"returns \(\[2, 5\], \[2, 5\]\): 2 of them may be the logits \[n, 5\]"),
            ("wrong_width", r"returns \[2, 4\], expected logits \[n, 5\]"),
            ("nan", "0.weight holds NaN or infinite"),
            ("overflow", "returns NaN or infinite logits"),
            ("nan_in_a_tuple", "returns NaN or infinite logits"),
            ("without_logits", r"returns dict, expected logits \[n, 5\]"),
            ("nothing_at_all", r"returns NoneType, expected logits \[n, 5\]"),
            ("of_one_image", "answers 2 images with 1 rows of logits"),
            ("one_row", "answers 2 images with 1 rows of logits"),
            ("other_size", r"cannot take images of 3×8×8: Input image size \(8\) doesn't match"),
        ],
    )
    def test_what_is_no_table_of_logits_is_refused(self, function, line):
        with pytest.raises(DataError, match=line):
            load_teacher(own(function))

    @pytest.mark.parametrize(
        ("function", "line"),
        [
            ("fails", "fails: KeyError: 'no such file'"),
            ("not_callable", "returns int: expected a network or a function"),
            ("nothing", "has no function nothing; it has tiny, with_features"),
        ],
    )
    def test_code_that_does_not_work(self, function, line):
        with pytest.raises(UsageError, match=line):
            load_teacher(own(function))

    def test_a_wrong_size_is_named(self):
        wrong = own("with_features").model_copy(update={"input": RGB.model_copy(update={"size": 9})})
        with pytest.raises(DataError, match="cannot take images of 3×9×9"):
            load_teacher(wrong)

    def test_a_network_that_cuts_gradients_off_is_found_out(self):
        assert load_teacher(own("with_features")).differentiable
        assert not load_teacher(own("cut_off")).differentiable

    def test_code_is_never_run_because_a_file_says_so(self, tmp_path):
        save_model(tmp_path, build.build_net(named_config("tests.models.nets:tiny")), config("os:getcwd"))
        for load in (load_model, lambda folder: load_teacher(ModelSettings(name=str(folder)))):
            with pytest.raises(UsageError, match="never loaded because a file says so"):
                load(tmp_path)
        with pytest.raises(UsageError, match="never loaded"):
            build_from(config("os:getcwd"), (tmp_path / "model.safetensors").read_bytes(), "x")


class TestBlackBoxes:
    def test_a_function_scores_only(self):
        teacher = load_teacher(own("scores"))
        assert teacher.logits(IMAGES).dtype == torch.float32
        assert (teacher.differentiable, teacher.has_batchnorm, teacher.batchnorms) == (False, False, [])
        assert teacher.with_features(IMAGES)[1] is None and teacher.class_weights is None
        with pytest.raises(UsageError, match="black box without layers"):
            _ = teacher.net

    @pytest.mark.parametrize("batch", ["n", 2])
    def test_onnx(self, tmp_path, batch):
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        weight = torch.randn(5, 192)
        h = onnx.helper
        graph = h.make_graph(
            [h.make_node("Flatten", ["x"], ["f"]), h.make_node("Gemm", ["f", "w"], ["y"], transB=1)],
            "net",
            [h.make_tensor_value_info("x", 1, [batch, 3, 8, 8])],
            [h.make_tensor_value_info("y", 1, [batch, 5])],
            [onnx.numpy_helper.from_array(weight.numpy(), "w")],
        )
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / "t.onnx")
        settings = ModelSettings(name=str(tmp_path / "t.onnx"), input=RGB, num_classes=5)
        teacher = load_teacher(settings)
        assert teacher.identity == teacher_identity(settings)
        torch.testing.assert_close(teacher.logits(IMAGES), teacher.input(IMAGES).flatten(1) @ weight.T)
        with pytest.raises(DataError, match="but input says"):
            load_teacher(settings.model_copy(update={"input": RGB.model_copy(update={"size": 4})}))
        (tmp_path / "t.onnx").write_bytes(b"no model")
        with pytest.raises(DataError, match="cannot be loaded by onnxruntime"):
            load_teacher(settings)


class TestTorchvision:
    def test_saved_students_come_back(self, tmp_path):
        wanted = config("torchvision:mobilenet_v3_small", stem="small", size=32)
        net = build.build_net(wanted).eval()
        assert build.adaptation_of(net).startswith("features.0.0: 3×3 of stride 1; features.1")
        save_model(tmp_path, net, wanted)
        again, _ = load_model(tmp_path)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(x), net(x))
        assert teacher_identity(ModelSettings(name=str(tmp_path)))["kind"] == "external"

    def test_names_are_checked(self):
        with pytest.raises(UsageError, match="no classifier 'resnet19': did you mean resnet101"):
            build.build_net(config("torchvision:resnet19"))
        with pytest.raises(UsageError, match="needs weights, input, num_classes"):
            resolve(ModelSettings(name="torchvision:resnet18"))


class TestTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    def save(self, folder, name, **more):
        net = build.build_net(config(name))
        safetensors.torch.save_file(net.state_dict(), folder / "model.safetensors")
        own_config = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
        content = {"architecture": name[5:], "num_classes": 5, "pretrained_cfg": own_config | more}
        (folder / "config.json").write_text(json.dumps(content))
        return net

    def test_a_folder_knows_its_own_input(self, tmp_path):
        net = self.save(tmp_path, "timm:test_resnet", label_names=list("abcde")).eval()
        teacher = load_teacher(ModelSettings(name=f"timm:{tmp_path}"))
        assert teacher.input.settings == RGB.model_copy(update={"resize": "bicubic"})
        assert teacher.class_names == tuple("abcde")
        assert torch.equal(teacher.logits(IMAGES), net(teacher.input(IMAGES)))

    def test_an_unknown_input_is_asked_for(self, tmp_path):
        self.save(tmp_path, "timm:test_resnet", interpolation="lanczos")
        with pytest.raises(UsageError, match="the files beside its weights do not tell input: the recipe must"):
            resolve(ModelSettings(name=f"timm:{tmp_path}"))

    @pytest.mark.parametrize("count", ["ten", 1, [10]])
    def test_a_count_of_classes_that_is_none_is_refused(self, tmp_path, count):
        self.save(tmp_path, "timm:test_resnet", label_names=3)
        content = json.loads((tmp_path / "config.json").read_text()) | {"num_classes": count}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"number of classes is {re.escape(repr(count))}; expected 2 to"):
            resolve(ModelSettings(name=f"timm:{tmp_path}"))

    def test_a_vision_transformer_has_no_batchnorm_and_no_maps(self):
        net = build.build_net(config("timm:test_vit", size=32))  # 2×2 patches
        with pytest.raises(UsageError, match="cam and gradcam"):
            stage_paths(net)

    def test_a_small_stem_keeps_the_resolution(self):
        sides = {}
        for stem in ("native", "small"):
            net = build.build_net(config("timm:test_resnet", stem=stem, size=32)).eval()
            with outputs_of(net, ["layer4"]) as seen:
                net(torch.zeros(1, 3, 32, 32))
            sides[stem] = seen["layer4"].shape[-1]
        assert sides == {"native": 1, "small": 4}

    def test_stages_and_head_are_found(self):
        net = build.build_net(config("timm:test_resnet", stem="small", size=32))
        assert stage_paths(net) == ["layer1", "layer2", "layer3", "layer4"]
        assert head_of(net) is net.fc
        assert all(module.training for module in net.modules())

    def test_weights_with_the_other_stem_say_so_and_others_do_not(self, tmp_path):
        save_model(tmp_path, build.build_net(config("torchvision:squeezenet1_0", stem="small")), config("resnet18"))
        weights = str(tmp_path / "model.safetensors")
        settings = ModelSettings(name="torchvision:squeezenet1_0", weights=weights, input=RGB, num_classes=5)
        with pytest.raises(DataError, match=r"does not fit SqueezeNet: .*set stem: small\)"):
            load_teacher(settings)
        with pytest.raises(DataError, match=r"does not fit EfficientNet: missing: conv_stem.weight.*more$"):
            load_teacher(settings.model_copy(update={"name": "timm:test_efficientnet"}))

    def test_names_that_fetch_are_refused(self):
        with pytest.raises(UsageError, match="timm has no model"):
            build.build_net(config("timm:hf-hub:timm/resnet18.a1_in1k"))


class TestSettingsFile:
    def test_a_teacher_in_a_file(self, tmp_path):
        save_model(tmp_path, nets.build("resnet8", 5), config("resnet8"))
        content = {"name": "resnet8", "weights": str(tmp_path / "model.safetensors"), "num_classes": 5}
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(content | {"input": RGB.model_dump(mode="json")}))
        given = ModelSettings(name=str(tmp_path / "t.yaml"))
        assert teacher_identity(given)["sha256"] == teacher_identity(ModelSettings(name=str(tmp_path)))["sha256"]
        assert load_teacher(given.model_copy(update={"class_names": tuple("vwxyz")})).class_names == tuple("vwxyz")

    @pytest.mark.parametrize(
        ("text", "line"),
        [("name: [", "is no YAML"), ("nome: x", "describes no model: nome"), ("name: o.yaml", "not another YAML file")],
    )
    def test_files_that_describe_none(self, tmp_path, text, line):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises((DataError, UsageError), match=line):
            resolve(ModelSettings(name=str(tmp_path / "t.yaml")))
