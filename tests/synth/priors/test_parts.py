"""Every network of a prior has each of its weights, or the prior is refused with the keys that are at fault."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from manifests.errors import DataError
from stages.settings import GuidanceSettings, PriorSettings
from stages.synth.decoders import TinyDecoder
from stages.synth.priors.kinds import load_prior
from tests.synth.priors.test_kinds import LABELS, SAVE
from tests.synth.test_guidance_decoder import save_tiny

PARTS = [  # of each family those that hold weights
    *((name, "unet") for name in ("sd", "sdxl", "if", "unclip", "ldm", "ddpm")),
    *((name, "vae") for name in ("sd", "sd-dc", "sdxl", "unclip", "dit")),
    *((name, "text_encoder") for name in ("sd", "sdxl", "if", "unclip")),
    ("sdxl", "text_encoder_2"), ("unclip", "image_encoder"), ("unclip", "image_normalizer"), ("dit", "transformer"),
    ("ldm", "vqvae"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / "prior")


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(folder, change):
    """The weights in ``folder`` as ``change`` returns them, or edits them in place."""
    file = weights_of(folder)
    state = load_file(file)
    save_file(change(state) or state, file, metadata={"format": "pt"})


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder):
    return load_prior(PriorSettings(path=str(folder), steps=4, cfg_scale=1.0, labels=LABELS), "cpu")


def refused(folder, capfd, caplog):
    """The error's text, which is one line and the only one."""
    with pytest.raises(DataError) as error:
        load(folder)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "") and not caplog.records
    return str(error.value)


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_missing_key_is_refused_and_a_spare_one_is_logged(copied, capfd, caplog, name, part):
    folder = copied(name)
    state = load_file(weights_of(folder / part))
    used = sorted(key for key, value in state.items() if value.is_floating_point())

    def spare(state):
        state["spare.weight"] = torch.zeros(2)

    rewrite(folder / part, spare)
    load(folder)
    (record,) = caplog.records
    assert record.message.startswith(f"{folder / part}: 1 keys of the weights are not used by ")
    assert record.message.endswith(", e.g. 'spare.weight'") and capfd.readouterr() == ("", "")
    caplog.clear()
    rewrite(folder / part, lambda state: {key: value for key, value in state.items() if key not in (used[0], "spare")})
    message = refused(folder, capfd, caplog)
    assert message.startswith(f"{folder / part}: weights lack 1 of ") and f" e.g. {used[0]!r}" in message


def test_a_renamed_key_is_named_in_both_forms(copied, capfd, caplog):
    folder = copied("sd")

    def rename(state):
        state["conv_in.kernel"] = state.pop("conv_in.weight")

    rewrite(folder / "unet", rename)
    assert (
        "of UNet2DConditionModel, e.g. 'conv_in.weight'; hold 1 keys that it does not have, e.g. 'conv_in.kernel'"
        in (refused(folder, capfd, caplog))
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_networks_weights_are_called_that(folders, copied, capfd, caplog, part):
    folder = copied("sd")
    save_file({f"module.{i}": torch.zeros(1) for i in range(9)}, weights_of(folder / part), metadata={"format": "pt"})
    assert refused(folder, capfd, caplog).endswith("'module.2', …; are those of another network")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_another_shape_is_refused(copied, capfd, caplog, part):
    folder, shape = copied("sd"), {}

    def widen(state):
        key = min(key for key, value in state.items() if value.ndim == 2)
        shape[key] = list(state[key].shape)
        state[key] = torch.zeros(3, 5)

    rewrite(folder / part, widen)
    ((key, expected),) = shape.items()
    message = refused(folder, capfd, caplog)
    assert "for 1 of " in message and message.endswith(f"{key!r}: [3, 5], expected {expected}")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_integers_for_weights_are_refused(copied, capfd, caplog, part, suffix):
    """As a quantized file holds them: cast to floating point they would be another network's."""
    folder = copied("sd")
    gone, file = min(load_file(weights_of(folder / part))), weights_of(folder / part)
    rewrite(folder / part, lambda state: state | {gone: state[gone].to(torch.int8)})
    if suffix == "bin":
        stem = "pytorch_model" if part == "text_encoder" else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    assert refused(folder, capfd, caplog).endswith(f"weights are no floating-point numbers in 1 keys, e.g. {gone!r}")


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_weights_without_storage_are_refused(copied, capfd, caplog, part, file):
    folder = copied("sd")
    state = load_file(weights_of(folder / part))
    weights_of(folder / part).unlink()
    torch.save({key: value.to("meta") for key, value in state.items()}, folder / part / f"{file}.bin")
    assert str(folder) in refused(folder, capfd, caplog)


@pytest.mark.parametrize(("part", "stem"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_key_that_the_index_lists_and_no_shard_holds_is_missing(copied, capfd, caplog, part, stem):
    folder = copied("sd")
    state, shard = load_file(weights_of(folder / part)), f"{stem}-00001-of-00001.safetensors"
    weights_of(folder / part).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, shard)}
    (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    gone = min(key for key, value in state.items() if value.is_floating_point())
    save_file({k: v for k, v in state.items() if k != gone}, folder / part / shard, metadata={"format": "pt"})
    assert f"weights lack 1 of {len(state)} keys" in refused(folder, capfd, caplog)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_lora_layers_are_called_that(copied, capfd, caplog, part):
    folder = copied("sd")
    key = min(k for k, v in load_file(weights_of(folder / part)).items() if v.ndim == 2).removesuffix(".weight")

    def unmerged(state):
        state[f"{key}.base_layer.weight"] = state.pop(f"{key}.weight")
        state[f"{key}.lora_A.default.weight"] = torch.zeros(1, 1)

    rewrite(folder / part, unmerged)
    assert refused(folder, capfd, caplog).endswith("(LoRA layers do not apply: merge them and save again)")


def test_tied_weights_and_unsaved_buffers_may_be_absent(copied, caplog):
    """T5 holds its embedding twice, its files once; CLIP's positions were saved by earlier versions."""
    folder = copied("if")
    config = T5Config.from_pretrained(folder / "text_encoder")
    t5 = T5ForConditionalGeneration(config)  # files that hold the decoder, too
    state = {key: value.clone() for key, value in t5.state_dict().items()}
    for dropped in ("encoder.embed_tokens.weight", "shared.weight"):
        kept = {key: value for key, value in state.items() if key not in (dropped, "lm_head.weight")}
        save_file(kept, weights_of(folder / "text_encoder"), metadata={"format": "pt"})
        encoder = load(folder).encoders[0]
        assert torch.equal(encoder.encoder.embed_tokens.weight, state["shared.weight"])
    assert not caplog.records


def test_positions_in_an_earlier_clip_file_are_no_spare_weights(copied, caplog):
    folder = copied("sd")

    def positions(state):
        prefix = "text_model." if any(key.startswith("text_model.") for key in state) else ""
        state[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]

    rewrite(folder / "text_encoder", positions)
    load(folder)
    assert not caplog.records


def test_an_encoder_of_another_class_is_logged_and_of_another_type_refused(copied, capfd, caplog):
    folder = copied("sd")
    edit(folder / "text_encoder" / "config.json", architectures=["CLIPTextModelWithProjection"])
    load(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder / 'text_encoder'} is a CLIPTextModelWithProjection by its configuration, loaded as CLIPTextModel"
    ]
    caplog.clear()
    edit(folder / "text_encoder" / "config.json", model_type="siglip_text_model")  # its keys would fit CLIP's
    assert refused(folder, capfd, caplog).endswith(
        "describes a model of type 'siglip_text_model', but CLIPTextModel is of type 'clip_text_model'"
    )


def test_the_libraries_log_again_afterwards(copied):
    before = [logging.getLogger(name).level for name in ("transformers", "diffusers")]
    load(copied("sd"))
    assert [logging.getLogger(name).level for name in ("transformers", "diffusers")] == before


def test_a_tiny_decoder_has_all_its_weights(prior, tmp_path):
    folder = save_tiny(tmp_path / "taesd")
    rewrite(folder, lambda state: {key: value for key, value in state.items() if "decoder.layers.0" not in key})
    with pytest.raises(DataError, match=f"^{folder}: weights lack 2 of .* of AutoencoderTiny"):
        TinyDecoder(prior, GuidanceSettings(decoder="tiny", tiny_decoder=str(folder)))
