"""Classifiers from elsewhere: built, loaded, tapped, or refused with one clear line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from manifests.errors import DataError, UsageError
from stages.models import build, nets
from stages.models.hooks import head_of, outputs_of, stage_paths
from stages.models.inputs import to_unit
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
from tests.models import nets as nets_here

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
        with pytest.raises(DataError, match="is no ONNX model"):
            load_teacher(settings)

    def export(self, folder, graph):
        onnx = pytest.importorskip("onnx")
        weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) / 20
        h = onnx.helper
        nodes = [h.make_node("Flatten", ["x"], ["f"]), h.make_node("Gemm", ["f", "w"], ["y"], transB=1)]
        if graph == "softmax":
            nodes.append(h.make_node("Softmax", ["y"], ["z"], axis=1))
        made = h.make_graph(
            nodes,
            "net",
            [h.make_tensor_value_info("x", 1, ["n", 8, 8, 3] if graph == "channels last" else ["n", 3, 8, 8])],
            [h.make_tensor_value_info("z" if graph == "softmax" else "y", 1, ["n", 5])],
            [onnx.numpy_helper.from_array(weight.numpy(), "w")],
        )
        model = h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
        options = {"save_as_external_data": True, "location": "t.data", "size_threshold": 0}
        onnx.save(model, folder / "t.onnx", **(options if graph == "external" else {}))
        return weight, ModelSettings(name=str(folder / "t.onnx"), input=RGB, num_classes=5)

    def test_onnx_of_two_files(self, tmp_path, monkeypatch):
        pytest.importorskip("onnxruntime")
        weight, settings = self.export(tmp_path, "external")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        source = resolve(settings)
        before = source.identity["sha256"]
        teacher = load_teacher(source)
        torch.testing.assert_close(teacher.logits(IMAGES), teacher.input(IMAGES).flatten(1) @ weight.T)
        source.release()
        data = tmp_path / "t.data"
        data.write_bytes(b"\x00\x00" + data.read_bytes()[2:])
        assert teacher_identity(settings)["sha256"] != before
        with pytest.raises(DataError, match="files that it refers to were altered while in use"):
            load_teacher(source)
        data.write_bytes(data.read_bytes()[:-4])
        with pytest.raises(DataError, match=r"t\.data is truncated: 3836 bytes, t\.onnx needs 3840"):
            load_teacher(settings)
        data.rename(tmp_path / "elsewhere" / "t.data")
        with pytest.raises(DataError, match=r"its data 't\.data' is missing: copy it beside the model"):
            load_teacher(settings)
        data.symlink_to("/etc/passwd")
        with pytest.raises(DataError, match=r"is a link out of its folder"):
            load_teacher(settings)

    @pytest.mark.parametrize("location", ["../t.data", "/etc/passwd", "a/../../t.data", "..\\t.data", ""])
    def test_onnx_data_outside_its_folder_is_refused(self, tmp_path, location):
        onnx = pytest.importorskip("onnx")
        _, settings = self.export(tmp_path, "external")
        model = onnx.load(tmp_path / "t.onnx", load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        (tmp_path / "t.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(DataError, match="names data outside its folder"):
            teacher_identity(settings)

    def test_channels_last_is_refused(self, tmp_path):
        pytest.importorskip("onnxruntime")
        with pytest.raises(DataError, match="channels last: export it with channels first"):
            load_teacher(self.export(tmp_path, "channels last")[1])

    def test_onnx_probabilities(self, tmp_path):
        pytest.importorskip("onnxruntime")
        weight, settings = self.export(tmp_path, "softmax")
        source = resolve(settings)
        teacher = load_teacher(source)
        logits = teacher.input(IMAGES).flatten(1) @ weight.T
        torch.testing.assert_close(teacher.logits(IMAGES), logits.log_softmax(1), atol=1e-4, rtol=1e-4)
        assert source.decisions["outputs"].startswith("probabilities")

    @pytest.mark.parametrize("function", ["softmaxed", "softmaxed_half", "softmaxed_numpy", "softmaxed_dict"])
    def test_probabilities_become_logits(self, function):
        source = resolve(own(function))
        teacher = load_teacher(source)
        logits = nets_here.tiny_seeded()(teacher.input(IMAGES))
        atol = 2e-2 if function == "softmaxed_half" else 1e-5
        torch.testing.assert_close(teacher.logits(IMAGES), logits.log_softmax(1), atol=atol, rtol=0)
        assert source.decisions["outputs"].startswith("probabilities")

    def test_sigmoids_are_named(self):
        source = resolve(own("sigmoids"))
        load_teacher(source)
        assert source.decisions["outputs"].startswith("in [0, 1] without a sum of 1, taken as logits")

    @pytest.mark.parametrize("function", ["tiny_seeded", "scores", "with_features", "log_softmaxed"])
    def test_logits_stay_as_they_are(self, function):
        source = resolve(own(function))
        load_teacher(source)
        assert "outputs" not in source.decisions


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
        with pytest.raises(UsageError, match="no classifier 'resnet19': did you mean resnet"):
            build.build_net(config("torchvision:resnet19"))
        with pytest.raises(UsageError, match=r"needs weights, input, num_classes .*{size: 224, .*resize_size: 256}"):
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
        assert teacher.input.settings == RGB.model_copy(update={"resize": "bicubic", "resize_size": 9})  # 8 / 0.875
        assert teacher.class_names == tuple("abcde")
        assert torch.equal(teacher.logits(IMAGES), net(teacher.input(IMAGES)))

    @pytest.mark.parametrize(
        ("field", "line"),
        [
            ({"interpolation": "lanczos"}, "says interpolation lanczos"),
            ({"crop_mode": "border"}, "says crop_mode border, which pads"),
            ({"input_size": [3, 8, 16]}, "only square inputs are supported"),
            ({"input_size": [4, 8, 8]}, "which is no rule for 1 or 3 channels"),
            ({"crop_pct": "most"}, "which is no rule"),
        ],
    )
    def test_an_input_that_no_rule_expresses_is_asked_for(self, tmp_path, field, line):
        self.save(tmp_path, "timm:test_resnet", **field)
        with pytest.raises(UsageError, match=f"needs input in its settings: .*pretrained_cfg.*{line}"):
            resolve(ModelSettings(name=f"timm:{tmp_path}"))

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("test_resnet", {}),
            ("test_resnet", {"in_chans": 1, "global_pool": "max"}),
            ("test_vit", {"img_size": 96, "global_pool": "avg", "class_token": False}),
            ("test_efficientnet", {"act_layer": "relu"}),
            ("test_convnext", {"pretrained_cfg_overlay": {"crop_mode": "squash", "crop_pct": 0.9}}),
        ],
    )
    def test_what_timm_saves_answers_and_crops_as_timm(self, timm, tmp_path, name, arguments):
        torch.manual_seed(0)
        net = timm.create_model(name, num_classes=5, **arguments).eval()
        timm.models.save_for_hf(net, tmp_path, safe_serialization=True, model_config={"label_names": list("abcde")})
        source = resolve(ModelSettings(name=f"timm:{tmp_path}"))
        teacher = load_teacher(source)
        assert teacher.class_names == tuple("abcde")
        assert "label_names of config.json" in source.decisions["classes"]
        assert "pretrained_cfg of config.json" in source.decisions["input"]
        cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
        for shape in ((200, 311), (311, 199), (160, 160)):
            picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
            image = Image.fromarray(picture)
            theirs = transform(image.convert("L") if teacher.input.channels == 1 else image)[None]
            ours = teacher.input(teacher.input.view(to_unit(torch.from_numpy(picture)[None])))
            off = ((ours - theirs).abs() * torch.tensor(teacher.input.settings.std).view(-1, 1, 1)).max()
            assert off < 1e-5
            torch.testing.assert_close(teacher.net(theirs), net(theirs), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"pretrained": True},
            {"checkpoint_path": "x"},
            {"features_only": True},
            {"depth": 10**9},
            {"a": [[[[[1]]]]]},
            3,
        ],
    )
    def test_arguments_that_are_not_of_the_network_are_refused(self, tmp_path, arguments):
        self.save(tmp_path, "timm:test_resnet")
        content = json.loads((tmp_path / "config.json").read_text()) | {"model_args": arguments}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"config\.json: model_args hold"):
            resolve(ModelSettings(name=f"timm:{tmp_path}"))

    def test_arguments_that_timm_does_not_know_are_refused_in_a_line(self, tmp_path):
        self.save(tmp_path, "timm:test_resnet")
        content = json.loads((tmp_path / "config.json").read_text()) | {"model_args": {"colour": "red"}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match="'test_resnet' cannot be built with .*'colour': 'red'"):
            load_teacher(ModelSettings(name=f"timm:{tmp_path}"))

    def test_one_table_of_older_versions(self, tmp_path):
        net = self.save(tmp_path, "timm:test_resnet").eval()
        content = json.loads((tmp_path / "config.json").read_text())
        content |= content.pop("pretrained_cfg") | {"labels": list("abcde")}
        (tmp_path / "config.json").write_text(json.dumps(content))
        teacher = load_teacher(ModelSettings(name=f"timm:{tmp_path}"))
        assert teacher.class_names == tuple("abcde")
        assert torch.equal(teacher.logits(IMAGES), net(teacher.input(IMAGES)))

    @pytest.mark.parametrize(
        "name", ["someone/pets", "hf-hub:someone/pets", "hf_hub:timm/resnet18.a1_in1k", "resnet18.a1"]
    )
    def test_hub_ids_have_no_dot_or_one(self, name, monkeypatch):
        asked = []
        monkeypatch.setattr("stages.models.source.fetch", lambda name, what: asked.append(name) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve(ModelSettings(name=f"timm:{name}"))
        assert asked == [{"resnet18.a1": "timm/resnet18.a1"}.get(name, name.partition(":")[2] or name)]

    def test_what_the_library_takes_is_said_where_the_input_is_missing(self):
        with pytest.raises(UsageError, match=r"input: {size: 160, .*resize_size: 168}"):
            resolve(ModelSettings(name="timm:test_resnet", weights="w.pt", num_classes=5))

    def test_a_network_may_call_its_own_parts_head_and_stages(self):
        net = build.build_net(config("timm:hrnet_w18_small", size=64))
        assert net.head == "classification"
        assert head_of(net) is net.classifier

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
        [
            ("name: [", "not valid YAML"),
            ("nome: x", "describes no model: nome"),
            ("name: o.yaml", "not another YAML file"),
        ],
    )
    def test_files_that_describe_none(self, tmp_path, text, line):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises((DataError, UsageError), match=line):
            resolve(ModelSettings(name=str(tmp_path / "t.yaml")))
