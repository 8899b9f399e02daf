"""Weights files as training loops, hubs and code bases write them: read, or refused in one line that says why."""

import argparse
import collections
import datetime
import enum
import functools
import pathlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from manifests.errors import DataError, UsageError
from stages.models import nets
from stages.models.loading import load_model, load_teacher, save_model, source_files
from stages.models.source import resolve, teacher_identity
from stages.settings import InputSettings, ModelSettings

SMALL = InputSettings(size=8, channels=1, mean=(0.3,), std=(0.4,))
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def randomized(net):
    """``net`` in eval mode with statistics, biases and scales that all change its logits."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value += torch.empty_like(value).normal_(0, 0.1, generator=generator)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return randomized(nets.build("digits-cnn-small", 3, 1))


@pytest.fixture(scope="module")
def state(net):
    return net.state_dict()


@pytest.fixture(scope="module")
def other(state):
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def source_of(path, name="digits-cnn-small", classes=3, spec=SMALL, **more):
    return resolve(ModelSettings(name=name, weights=str(path), input=spec, num_classes=classes, **more))


@torch.no_grad()
def answer(source, images=IMAGES):
    """Logits of the loaded network, and the line on its weights."""
    return load_model(source)[0](images), source.decisions.get("weights", "")


class Color(enum.Enum):
    RED = 1


class Options(dict):
    """As attribute dicts of configuration libraries: items and attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Slots:
    __slots__ = ("rate",)

    def __init__(self):
        self.rate = 0.1


BESIDE = {
    "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("/x")),
    "numpy": [np.float64(91.2), np.random.default_rng(0).random(3), np.dtype("f4"), np.int64(3)],
    "containers": [collections.defaultdict(list, a=[1]), collections.deque([1]), {1, 2}, Options(a=Options(b=1))],
    "objects": [Color.RED, datetime.datetime(2026, 1, 1), functools.partial(int, base=2), Slots()],
    "code": [nn.ReLU, nn.functional.relu, nn.CrossEntropyLoss()],
    "keys": {pathlib.Path("a"): 1, Color.RED: 2},
}


class TestTables:
    @pytest.mark.parametrize(
        ("key", "wrap"),
        [
            ("model_state_dict", lambda s: {"model_state_dict": s, "epoch": 3, "loss": torch.tensor(0.4)}),
            ("net", lambda s: {"net": prefixed("module._orig_mod.", s), "acc": 91.2}),
            ("ckpt/network", lambda s: {"ckpt": {"network": s}}),
            ("0", lambda s: (s, {"epoch": 3})),
            ("whatever", lambda s: {"whatever": {k.replace("stage1.", "stage1.module."): v for k, v in s.items()}}),
        ],
    )
    def test_a_table_is_found_whatever_its_key(self, tmp_path, net, state, key, wrap):
        torch.save(wrap(state), tmp_path / "w.pth")
        logits, line = answer(source_of(tmp_path / "w.pth"))
        assert torch.equal(logits, net(IMAGES))
        assert line.startswith(f"{key} of w.pth")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("what", BESIDE)
    def test_what_lies_beside_is_neither_imported_nor_in_the_way(self, tmp_path, net, state, what, zipped):
        if what == "code" and not zipped:
            pytest.skip("the old format stores the source of modules in a way that torch refuses")
        torch.save({"state_dict": state, what: BESIDE[what]}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        logits, line = answer(source_of(tmp_path / "w.pth"))
        assert torch.equal(logits, net(IMAGES))
        assert line == f"state_dict of w.pth (beside it: {what})"

    def test_nothing_runs(self, tmp_path, state, capfd):
        class Evil:
            def __reduce__(self):
                return (exec, ("print('ran')",))

        class Worse:
            def __reduce__(self):
                import os

                return (os.system, ("echo ran",))

        torch.save({"model": state, "x": Evil()}, tmp_path / "w.pth")
        assert answer(source_of(tmp_path / "w.pth"))[1] == "model of w.pth (beside it: x)"
        torch.save({"model": state, "x": Worse()}, tmp_path / "w.pth")
        with pytest.raises(DataError, match=r"cannot be read without running what it holds: \w+\.system$"):
            answer(source_of(tmp_path / "w.pth"))
        assert capfd.readouterr().out == ""

    def test_an_optimizer_beside_is_no_table_of_the_network(self, tmp_path, net, state):
        twin = nets.build("digits-cnn-small", 3, 1)
        optimizer = torch.optim.AdamW(twin.parameters())
        twin(IMAGES).sum().backward()
        optimizer.step()
        torch.save({"optimizer": optimizer.state_dict(), "model": state}, tmp_path / "w.pth")
        assert torch.equal(answer(source_of(tmp_path / "w.pth"))[0], net(IMAGES))

    def test_a_file_that_contains_itself(self, tmp_path, net, state):
        loop = {"model": state, "list": []}
        loop["self"] = loop
        loop["list"].append(loop["list"])
        torch.save(loop, tmp_path / "w.pth")
        assert torch.equal(answer(source_of(tmp_path / "w.pth"))[0], net(IMAGES))


class TestPrefixes:
    def test_one_prefix_goes_and_other_branches_are_said(self, tmp_path, net, state):
        torch.save({"state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(3)}}, tmp_path / "w.ckpt")
        logits, line = answer(source_of(tmp_path / "w.ckpt"))
        assert torch.equal(logits, net(IMAGES))
        assert line == "state_dict of w.ckpt, prefix model. removed, left out: criterion.weight"

    def test_counters_of_a_profiler_are_left_out(self, tmp_path, net, state):
        counters = {f"{path}total_ops": torch.zeros(1) for path in ("", "stage1.", "stage1.0.")}
        torch.save(state | counters | {"total_params": torch.zeros(1)}, tmp_path / "w.pth")
        logits, line = answer(source_of(tmp_path / "w.pth"))
        assert torch.equal(logits, net(IMAGES))
        assert line == "w.pth, left out: 3 × total_ops, total_params"

    def test_a_head_that_lies_beside_its_backbone(self, tmp_path, net, state):
        split = {("head." if name.startswith("classifier") else "backbone.") + name: v for name, v in state.items()}
        torch.save({"meta": {"epoch": 1}, "state_dict": split}, tmp_path / "w.pth")
        logits, line = answer(source_of(tmp_path / "w.pth"))
        assert torch.equal(logits, net(IMAGES))
        assert line == "state_dict of w.pth (beside it: meta), prefix backbone. and head. removed"

    def test_a_layer_too_many_is_refused(self, tmp_path, state):
        torch.save(state | {"se.weight": torch.zeros(3)}, tmp_path / "w.pth")
        with pytest.raises(DataError, match=r"does not fit DigitsCNN: unexpected: se\.weight$"):
            answer(source_of(tmp_path / "w.pth"))

    def test_keys_that_are_in_the_file_instead(self, tmp_path, state):
        renamed = {name.replace("classifier", "output"): value for name, value in state.items()}
        torch.save({"state_dict": renamed}, tmp_path / "w.pth")
        with pytest.raises(
            DataError, match=r"\(state_dict\) does not fit .* missing: classifier\.weight, .* has output"
        ):
            answer(source_of(tmp_path / "w.pth"))


class TestSeveralTables:
    @pytest.mark.parametrize(
        "pair",
        [
            lambda raw, averaged: {"state_dict": raw, "state_dict_ema": averaged},
            lambda raw, ema: {"model": raw, "model_ema": prefixed("module.", ema) | {"n_averaged": torch.tensor(3)}},
            lambda raw, averaged: {"model": raw, "ema": {"decay": 0.99, "shadow": averaged}},
            lambda raw, averaged: prefixed("net.", raw) | prefixed("ema_net.", averaged),
            lambda raw, averaged: {  # mmengine's hook swaps the two
                "message_hub": {}, "ema_state_dict": prefixed("module.", raw), "state_dict": averaged
            },
        ],
    )  # fmt: skip
    def test_averaged_weights_are_read_before_raw_ones(self, tmp_path, net, state, other, pair):
        torch.save(pair(other, state), tmp_path / "w.pth")
        assert torch.equal(answer(source_of(tmp_path / "w.pth"))[0], net(IMAGES))

    def test_the_key_decides_and_makes_another_teacher(self, tmp_path, net, state, other):
        torch.save({"state_dict": state, "state_dict_ema": other}, tmp_path / "w.pth")
        source = source_of(tmp_path / "w.pth", checkpoint_key="state_dict")
        logits, line = answer(source)
        assert torch.equal(logits, net(IMAGES))
        assert line == "state_dict of w.pth (beside it: state_dict_ema)"
        assert source.identity["sha256"] != source_of(tmp_path / "w.pth").identity["sha256"]
        both = {name: value.clone() for name, value in (prefixed("net.", state) | prefixed("ema_net.", other)).items()}
        safetensors.torch.save_file(both, tmp_path / "w.safetensors")
        source = source_of(tmp_path / "w.safetensors", checkpoint_key="net")
        assert torch.equal(answer(source)[0], net(IMAGES))
        stored = safetensors.torch.load(source_files(source)["model.safetensors"])
        assert stored.keys() == state.keys()  # what travels with a dataset needs no key

    def test_two_networks_are_not_guessed_between(self, tmp_path, state, other):
        torch.save({"student": state, "teacher": other}, tmp_path / "w.pth")
        with pytest.raises(
            DataError, match="several tables that fit DigitsCNN, student and teacher: name one with check"
        ):
            answer(source_of(tmp_path / "w.pth"))
        with pytest.raises(UsageError, match="no 'pupil' that checkpoint_key names: it has student, teacher"):
            answer(source_of(tmp_path / "w.pth", checkpoint_key="pupil"))

    def test_averaged_weights_that_do_not_fit_are_said(self, tmp_path, net, state, other):
        torch.save({"model": state, "ema": other | {"gate": torch.zeros(1)}}, tmp_path / "w.pth")
        logits, line = answer(source_of(tmp_path / "w.pth"))
        assert torch.equal(logits, net(IMAGES))
        assert line == "model of w.pth (beside it: ema), averaged weights ema do not fit (unexpected: gate)"


class TestRefusals:
    def save(self, path, what, net, state):
        if what == "model":
            torch.save(net, path)
        elif what == "model in a table":
            torch.save({"epoch": 3, "model": net}, path)
        elif what == "arrays":
            torch.save({name: value.numpy() for name, value in state.items()}, path)
        elif what == "pickle":
            path.write_bytes(pickle.dumps(state))
        elif what == "protocol":
            torch.save(state, path, pickle_protocol=4)
        elif what == "script":
            torch.jit.script(net).save(path)
        elif what == "arrays in a zip":
            with path.open("wb") as file:
                np.savez(file, a=np.zeros(3))
        elif what == "page":
            path.write_text("\n<!DOCTYPE html><html>")
        elif what == "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        elif what == "folder":
            path.mkdir()
        elif what == "meta":
            with torch.device("meta"):
                torch.save(nets.build("digits-cnn-small", 3, 1).state_dict(), path)
        else:
            change = {
                "sparse": lambda v: v.to_sparse(),
                "int8": lambda v: v.to(torch.int8),
                "quantized": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
            }[what]
            torch.save({name: change(v) if name == "classifier.weight" else v for name, v in state.items()}, path)

    @pytest.mark.parametrize(
        ("what", "line"),
        [
            ("model", r"holds no table .*pickled model of class .*\.DigitsCNN\).*torch\.save\(torch\.load\('.*w', "
                      r"weights_only=False\)\.state_dict\(\), 'weights\.pt'\)$"),
            ("model in a table", r"\(epoch: int, model: a whole pickled .*False\)\['model'\]\.state_dict\(\)"),
            ("arrays", "no table of named tensors.*: numpy array"),
            ("pickle", "is a plain pickle, which may run anything"),
            ("protocol", "has another pickle_protocol than torch.save's own: save it again"),
            ("script", "is a TorchScript program, not weights"),
            ("arrays in a zip", r"is a zip archive, but none of torch\.save: it holds a\.npy"),
            ("page", "is a web page: download the file itself"),
            ("pointer", "is a git-lfs pointer, not the weights: run git lfs pull"),
            ("folder", r"holds no model\.safetensors or pytorch_model\.bin"),
            ("meta", r"not plain numbers: stage1\.0\.0\.weight \(on the meta device: without values\)"),
            ("sparse", r"not plain numbers: classifier\.weight \(sparse\)"),
            ("int8", r"not plain numbers: classifier\.weight \(int8\)"),
            ("quantized", r"not plain numbers: classifier\.weight \(quantized\)"),
        ],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_one_line_says_what_it_is_and_what_would_help(self, tmp_path, net, state, what, line):
        self.save(tmp_path / "w", what, net, state)
        with pytest.raises(DataError, match=line) as caught:
            answer(source_of(tmp_path / "w"))
        assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)

    def test_a_file_that_expands_is_not_expanded(self, tmp_path, state):
        import zipfile

        torch.save(state, tmp_path / "w.pth")
        with zipfile.ZipFile(tmp_path / "w.pth") as archive, zipfile.ZipFile(tmp_path / "x.pth", "w", 8) as packed:
            for name in archive.namelist():
                packed.writestr(name, archive.read(name) + bytes(100_000 * ("/data/" in name)))
        with pytest.raises(DataError, match="is compressed, which torch.save never does"):
            answer(source_of(tmp_path / "x.pth"))

    def test_devices_are_not_read(self):
        with pytest.raises(DataError, match="/dev/zero: it is no regular file"):
            source_of("/dev/zero").read()


class TestShards:
    def write(self, folder, state, name="model.safetensors"):
        names, parts = sorted(state), {}
        stem, suffix = name.rsplit(".", 1)
        for i in (0, 1):
            shard = f"{stem}-0000{i + 1}-of-00002.{suffix}"
            part = {key: state[key] for key in names[i::2]}
            if suffix == "bin":
                torch.save(part, folder / shard)
            else:
                safetensors.torch.save_file(part, folder / shard)
            parts |= dict.fromkeys(part, shard)
        import json

        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
        return sorted(set(parts.values()))

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_all_shards_are_read_and_belong_to_the_identity(self, tmp_path, net, state, other, name):
        shards = self.write(tmp_path, state, name)
        source = source_of(tmp_path)  # a folder stands for the weights in it
        before = source.identity["sha256"]
        assert torch.equal(answer(source)[0], net(IMAGES))
        assert source_of(tmp_path / f"{name}.index.json").identity["sha256"] == before
        assert safetensors.torch.load(source_files(source)["model.safetensors"]).keys() == state.keys()
        self.write(tmp_path, other, name)
        assert source_of(tmp_path).identity["sha256"] != before
        (tmp_path / shards[1]).unlink()
        with pytest.raises(DataError, match=f"cannot read teacher weights .*{shards[1]}"):
            answer(source_of(tmp_path))

    @pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "a/w.safetensors", ".."])
    def test_an_index_names_files_beside_it_only(self, tmp_path, name):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
        with pytest.raises(DataError, match="expected the names of files beside it"):
            answer(source_of(tmp_path))


class Basic(nn.Module):
    """Block of a ResNet; the module of its shortcut is called ``shortcut``."""

    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.name = shortcut
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add_module(shortcut, projection if stride > 1 or inputs != outputs else nn.Sequential())

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.get_submodule(self.name)(x))


class Residual(nn.Module):
    """``conv1``, ``bn1``, ``layer1`` …, and a head of any name."""

    def __init__(self, widths, blocks, shortcut, head):
        super().__init__()
        self.widths, self.name = widths, head
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for number, width in enumerate(widths):
            strides = [2 if number else 1] + [1] * (blocks - 1)
            rows = [Basic(before if i == 0 else width, width, stride, shortcut) for i, stride in enumerate(strides)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*rows))
            before = width
        self.add_module(head, nn.Linear(before, 5))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for number in range(len(self.widths)):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.get_submodule(self.name)(x.mean((2, 3)))


class Plain(nn.Module):
    """VGG-11 as one list, whose convolutions have a bias."""

    def __init__(self, mlp):
        super().__init__()
        layers, before = [], 3
        for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()] if width else []
            layers += [] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, 5)) if mlp else nn.Linear(512, 5)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class TestFieldNetworks:
    RGB = InputSettings(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    PHOTOS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(
        ("name", "made", "line"),
        [
            (
                "resnet8",
                lambda: Residual((16, 32, 64), 1, "downsample", "fc"),
                "built with 1×1 convolutions as shortcuts",
            ),
            ("resnet20", lambda: Residual((16, 32, 64), 3, "shortcut", "linear"), "built with 1×1 convolutions"),
            ("resnet18", lambda: Residual((64, 128, 256, 512), 2, "shortcut", "linear"), "20 names translated"),
            ("vgg11", lambda: Plain(mlp=False), "biases of 8 convolutions subtracted from the BatchNorm means"),
            ("vgg11", lambda: Plain(mlp=True), "built with three linear layers"),
        ],
    )
    @torch.no_grad()
    def test_other_names_and_layers_of_the_same_network(self, tmp_path, name, made, line):
        torch.manual_seed(0)
        net = randomized(made())
        torch.save({"net": prefixed("module.", net.state_dict())}, tmp_path / "w.pth")
        stem = "native" if name == "vgg11" else None
        logits, said = answer(source_of(tmp_path / "w.pth", name, 5, self.RGB, stem=stem), self.PHOTOS)
        expected = net(self.PHOTOS)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert line in said
        again, config = load_model(source_of(tmp_path / "w.pth", name, 5, self.RGB, stem=stem))
        save_model(tmp_path / "m", again, config)
        assert torch.equal(load_model(tmp_path / "m")[0](self.PHOTOS), logits)

    def test_a_shufflenet_whose_blocks_number_their_layers(self, tmp_path):
        net = randomized(nets.build("shufflenetv2", 5, variant=True))
        names, seen = {"conv1.0": "conv1", "conv1.1": "bn1", "conv5.0": "conv2", "conv5.1": "bn2", "fc": "linear"}, {}
        for path, module in net.named_modules():
            if path.startswith("stage") and isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                stage, block, _ = path.split(".", 2)
                kind = "bn" if isinstance(module, nn.BatchNorm2d) else "conv"
                number = seen[stage, block, kind] = seen.get((stage, block, kind), 0) + 1
                names[path] = f"layer{int(stage[-1]) - 1}.{block}.{kind}{number}"
        table = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in net.state_dict().items()}
        assert {"layer1.0.conv5.weight", "layer2.7.bn3.weight"} <= table.keys()
        torch.save({"model": table}, tmp_path / "w.pth")
        logits, line = answer(source_of(tmp_path / "w.pth", "shufflenetv2", 5, self.RGB), self.PHOTOS)
        with torch.no_grad():
            assert torch.equal(logits, net(self.PHOTOS))
        assert line.endswith("built with a 1×1 first convolution of stride 1, no max pooling")

    def test_only_a_stem_that_differs_is_said_to(self, tmp_path):
        net = Plain(mlp=False)
        torch.save(net.state_dict(), tmp_path / "w.pth")
        with pytest.raises(DataError, match=r"\(it was trained with the other first layers: set stem: native\)$"):
            answer(source_of(tmp_path / "w.pth", "vgg11", 5, self.RGB), self.PHOTOS)  # 32 px: a small stem by default
        torch.save(nets.build("shufflenetv2", 5).state_dict(), tmp_path / "w.pth")
        with pytest.raises(DataError, match=r"does not fit Vgg11: missing: (?!.*stem)"):
            answer(source_of(tmp_path / "w.pth", "vgg11", 5, self.RGB), self.PHOTOS)


class TestTorchvision:
    """A sample; all of them: ``python benchmarks/sweep_torchvision.py``."""

    def check(self, tmp_path, name, size, rename=lambda name: name, **arguments):
        from torchvision import models

        torch.manual_seed(0)
        net = randomized(models.get_model(name, weights=None, num_classes=5, **arguments))
        torch.save({rename(key): value for key, value in net.state_dict().items()}, tmp_path / "w.pth")
        spec = InputSettings(size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        logits, line = answer(source_of(tmp_path / "w.pth", f"torchvision:{name}", 5, spec), images)
        with torch.no_grad():
            assert torch.equal(logits, net(images))
        return line

    def test_versions_that_a_plain_table_does_not_carry(self, tmp_path):
        self.check(tmp_path, "mnasnet0_5", 64)

    def test_auxiliary_heads_are_left_out(self, tmp_path):
        line = self.check(tmp_path, "googlenet", 64, aux_logits=True, init_weights=False)
        assert "left out: 10 × aux1, 10 × aux2" in line

    def test_names_of_older_versions(self, tmp_path):
        import re

        old = lambda name: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)  # noqa: E731
        assert "names translated" in self.check(tmp_path, "densenet121", 32, old)

    def test_weights_that_expect_other_normalization_are_said_to(self, tmp_path):
        from torchvision import models

        net = models.get_model("googlenet", weights=None, num_classes=5, aux_logits=True, init_weights=False)
        torch.save(net.state_dict(), tmp_path / "w.pth")
        imagenet = InputSettings(size=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        source = source_of(tmp_path / "w.pth", "torchvision:googlenet", 5, imagenet)
        load_model(source)
        assert "take mean and std of 0.5" in source.decisions["weights"]


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            num_labels=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=8, patch_size=4,
        )  # fmt: skip
        torch.manual_seed(0)
        net = randomized(transformers.ViTForImageClassification(config))
        net.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        return tmp_path, net

    def settings(self, folder, **more):
        spec = InputSettings(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        return ModelSettings(name=f"hf:{folder}", input=spec, **more)

    @pytest.mark.parametrize("sharded", [False, True])
    @torch.no_grad()
    def test_bin_files_load_where_there_is_no_safetensors(self, folder, sharded):
        folder, net = folder
        if sharded:
            TestShards().write(folder, net.state_dict(), "pytorch_model.bin")
        else:
            torch.save(net.state_dict(), folder / "pytorch_model.bin")
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        teacher = load_teacher(self.settings(folder))
        torch.testing.assert_close(teacher.logits(x), net(teacher.input(x)).logits)
        assert teacher.identity == teacher_identity(self.settings(folder))

    def test_weights_of_a_training_loop(self, folder):
        folder, net = folder
        torch.save({"state_dict": prefixed("model.", net.state_dict()), "epoch": 1}, folder / "w.ckpt")
        source = resolve(self.settings(folder, weights=str(folder / "w.ckpt")))
        load_model(source)
        assert source.decisions["weights"] == "state_dict of w.ckpt (beside it: epoch), prefix model. removed"

    def test_tensors_without_values_are_no_weights(self, folder):
        folder, net = folder
        torch.save({name: value.to("meta") for name, value in net.state_dict().items()}, folder / "pytorch_model.bin")
        with pytest.raises(DataError, match=r"holds no plain numbers: .* \(on the meta device"):
            load_model(resolve(self.settings(folder)))

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_hub_is_asked_for_bin_files_only_where_there_is_no_safetensors(self, folder, monkeypatch, safe):
        huggingface_hub = pytest.importorskip("huggingface_hub")
        folder, net = folder
        asked = []

        there = ["config.json", "README.md", "tf_model.h5", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
        there += ["model.safetensors"] if safe else []

        def download(name, allow_patterns):
            asked.extend(allow_patterns)
            (folder / asked[1]).write_bytes(safetensors.torch.save(net.state_dict()))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        siblings = [SimpleNamespace(rfilename=name) for name in there]
        monkeypatch.setattr(huggingface_hub, "model_info", lambda name: SimpleNamespace(siblings=siblings))
        source = resolve(self.settings("org/name"))
        assert source.weights == folder / ("model.safetensors" if safe else "pytorch_model.bin")
        assert asked == ["config.json", *(there[-1:] if safe else there[3:])]

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_link_out_of_a_folder_is_refused(self, folder, tmp_path_factory, name):
        folder, net = folder
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(net.state_dict()))
        outside = (folder / name).rename(tmp_path_factory.mktemp("elsewhere") / name)
        (folder / name).symlink_to(outside)
        with pytest.raises(DataError, match=rf"{name} is a link out of its folder: copy what it names there"):
            resolve(self.settings(folder))
        (folder / name).unlink()
        outside.rename(folder / "blob")
        (folder / name).symlink_to("blob")
        assert resolve(self.settings(folder)).weights == folder / "model.safetensors"

    def test_a_folder_without_weights_says_what_it_has(self, folder):
        (folder[0] / "tf_model.h5").touch()
        with pytest.raises(DataError, match=r"holds no model\.safetensors or pytorch_model\.bin.*it has tf_model\.h5"):
            resolve(self.settings(folder[0]))
