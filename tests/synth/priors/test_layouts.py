"""Repositories as the hub has them load as diffusers loads them, hashed whole, or are refused in one line."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DiTPipeline
from safetensors.torch import load_file, save_file

from manifests.errors import DataError
from stages.hub import NotFetched
from stages.settings import PriorSettings
from stages.synth.priors.files import files_read, locate_prior
from stages.synth.priors.kinds import load_prior
from tests.synth.priors.test_pipelines import edit
from tests.synth.tiny import save_ddpm, save_dit, save_stable_diffusion_xl, save_unclip

NETWORK = "diffusion_pytorch_model"


@pytest.fixture
def copy(prior_folder, tmp_path):
    return shutil.copytree(prior_folder, tmp_path / "copy")


def settings(folder, **values):
    return PriorSettings(path=str(folder), **({"cfg_scale": 1.0, "steps": 2} | values))


def refused(folder, **values):
    with pytest.raises(DataError) as error:
        load_prior(settings(folder, **values), "cpu")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    return str(error.value)


def assert_equal_weights(ours, theirs):
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def flat(folder):
    """As google/ddpm-cifar10-32: the network beside ``model_index.json``."""
    for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        file.rename(folder / file.name)
    for part in ("unet", "scheduler"):
        (folder / part).rmdir()
    return folder


def shard(folder, name):
    """The weights in ``folder`` in two files called by ``name(part)``; returns the map of an index."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    parts = {key: name(1 + i % 2) for i, key in enumerate(sorted(state))}
    for part in set(parts.values()):
        save_file({k: v for k, v in state.items() if parts[k] == part}, folder / part, metadata={"format": "pt"})
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": parts})


def test_a_network_in_the_pipelines_own_folder(tmp_path):
    folder = flat(save_ddpm(tmp_path / "prior"))
    prior = load_prior(settings(folder), "cpu")
    assert_equal_weights(prior.network, DDPMPipeline.from_pretrained(folder).unet)
    assert {f"{NETWORK}.safetensors", "config.json", "scheduler_config.json"} < set(prior.source.names)
    before = locate_prior(settings(folder)).sha256
    rewritten = {key: value + 1 for key, value in load_file(folder / f"{NETWORK}.safetensors").items()}
    save_file(rewritten, folder / f"{NETWORK}.safetensors", metadata={"format": "pt"})
    assert locate_prior(settings(folder)).sha256 != before
    assert load_prior(settings(folder), "meta").image_size == 16


def test_of_a_hubs_flat_repository_the_roots_weights_are_fetched():
    configs = ["config.json", "model_index.json", "scheduler_config.json"]
    assert files_read([*configs, f"{NETWORK}.bin", f"{NETWORK}.safetensors", "README.md"], None) == [
        *configs[:1], f"{NETWORK}.safetensors", *configs[1:]
    ]  # fmt: skip


def test_training_checkpoints_in_a_folder_are_not_read():
    names = ["model_index.json", f"checkpoint-500/unet/{NETWORK}.safetensors", f"unet/{NETWORK}.safetensors"]
    assert files_read(names, None) == ["model_index.json", f"unet/{NETWORK}.safetensors"]


def test_dits_transformer_by_its_earlier_class(tmp_path):
    folder = save_dit(tmp_path / "prior")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    config = folder / "transformer" / "config.json"
    edit(config, _class_name="Transformer2DModel", norm_type="ada_norm_zero", num_vector_embeds=None)
    prior = load_prior(settings(folder), "cpu")
    assert_equal_weights(prior.network, DiTPipeline.from_pretrained(folder).transformer)
    edit(config, norm_type="ada_norm_single")
    assert "a Transformer2DModel with norm_type 'ada_norm_single', expected DiTTransformer2DModel" in refused(folder)


@pytest.mark.parametrize(
    ("shards", "index"),
    [
        (f"{NETWORK}.fp16-0000{{}}-of-00002.safetensors", f"{NETWORK}.safetensors.index.fp16.json"),
        (f"{NETWORK}-0000{{}}-of-00002.fp16.safetensors", f"{NETWORK}.safetensors.index.fp16.json"),
        (f"{NETWORK}-0000{{}}-of-00002.fp16.safetensors", f"{NETWORK}.safetensors.fp16.index.json"),
    ],
)
def test_a_variant_in_parts_by_names_old_and_new(copy, prior_folder, shards, index):
    (copy / "unet" / index).write_text(shard(copy / "unet", shards.format))
    prior = load_prior(settings(copy, variant="fp16"), "cpu")
    assert_equal_weights(prior.network, load_prior(settings(prior_folder), "cpu").network)
    assert {f"unet/{shards.format(part)}" for part in (1, 2)} < set(prior.source.names)
    assert prior.source.decisions["weights"] == "no variant of text_encoder, vae; fp16 variant of unet"
    assert "holds only weights of the variant fp16: name it, prior.variant" in refused(copy)


def test_an_index_that_lists_other_files_is_refused(copy):
    index = shard(copy / "unet", (f"{NETWORK}-0000{{}}-of-00002.safetensors").format)
    listed = index.replace(f"{NETWORK}-00002", "more-00002")
    (copy / "unet" / f"{NETWORK}-00002-of-00002.safetensors").rename(copy / "unet" / "more-00002-of-00002.safetensors")
    (copy / "unet" / f"{NETWORK}.safetensors.index.json").write_text(listed)
    assert "lists 'more-00002-of-00002.safetensors', which is absent or none of the files read" in refused(copy)


def test_a_variant_that_no_part_has_is_said(prior_folder, caplog):
    plain = locate_prior(settings(prior_folder, variant="fp16"))
    assert "has no weights of the variant 'fp16': its plain ones are read" in caplog.text
    assert [*plain.weights] == [None]


@pytest.mark.parametrize(
    ("value", "side"), [([8, 8], 8), (16, 16), (None, 64), ([8, 12], None), (0, None), ("8", None), ([[8], [8]], None)]
)
def test_sample_size(copy, value, side):
    edit(copy / "unet" / "config.json", sample_size=value)
    if side is None:
        assert f"has sample_size {str(value)!r}: only squares are sampled" in refused(copy)
    else:
        assert locate_prior(settings(copy)).geometry.latent == (4, side, side)


def test_sample_size_of_none_is_the_pipelines_or_asked_for(tmp_path, prior_folder):
    folder = save_stable_diffusion_xl(tmp_path / "xl")
    edit(folder / "unet" / "config.json", drop=["sample_size"])
    assert locate_prior(settings(folder)).geometry.image_size == 256  # 128 latents
    pixels = save_ddpm(tmp_path / "ddpm")
    edit(pixels / "unet" / "config.json", sample_size=None)
    assert "unet/config.json has no sample_size: write the side" in refused(pixels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (["pipeline.py", "MyPipeline"], "code of its own, which is not run"),
        ({"a": 1}, "is not supported"),
        (None, "is not supported"),
        ("\x1b[31mFlux", "is not supported"),
    ],
)
def test_odd_names_of_a_pipeline(copy, name, message):
    edit(copy / "model_index.json", _class_name=name)
    assert message in refused(copy)


def test_single_files_are_to_be_converted(prior_folder, tmp_path):
    file = shutil.copy(prior_folder / "unet" / f"{NETWORK}.safetensors", tmp_path / "v1-5-pruned.safetensors")
    for path in (file, tmp_path, "nowhere.ckpt", "https://hub/org/name/model.safetensors"):
        assert 'from_single_file("' in refused(path) and "save_pretrained" in refused(path)


def test_a_name_that_is_neither_folder_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", lambda name: (_ for _ in ()).throw(OSError("no\nnetwork")))
    with pytest.raises(NotFetched, match=r"^prior org/nothing-here: neither a local folder .* \(no\)$"):
        locate_prior(settings("org/nothing-here"))
    assert "no such folder (expected a folder, or org/name on the hub)" in refused("a/b/c")


@pytest.mark.parametrize("given", [None, 10**30, 77])
def test_prompts_are_as_long_as_the_text_encoder_takes(copy, prior_folder, given):
    edit(
        copy / "tokenizer" / "tokenizer_config.json", drop=[] if given else ["model_max_length"], model_max_length=given
    )
    here, there = (load_prior(settings(folder), "cpu").encode(["a long cat", ""]) for folder in (copy, prior_folder))
    assert torch.equal(here, there)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pointers_of_git_lfs_are_called_that(copy, part):
    (file,) = (copy / part).glob("*.safetensors")
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")
    assert f"{file} is a pointer of git-lfs" in refused(copy)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_part_that_the_index_has_not(copy, part):
    edit(copy / "model_index.json", **{part: [None, None]})
    assert f"model_index.json has no {part}, which StableDiffusionPipeline needs" in refused(copy)


def test_what_the_libraries_warn_of_is_not_shown(copy, capfd, caplog, recwarn):
    edit(copy / "unet" / "config.json", new_setting="\x1b[31m")
    edit(copy / "scheduler" / "scheduler_config.json", skip_prk_steps=True, odd="\x1b[31m")
    for device in ("cpu", "meta"):
        load_prior(settings(copy), device)
    assert capfd.readouterr() == ("", "") and not caplog.records and not recwarn.list


def test_decisions(prior_folder):
    assert locate_prior(settings(prior_folder)).decisions == {
        "weights": "no variant of text_encoder, unet, vae",
        "noise schedule": "of its DDIMScheduler, predicts epsilon",
        "size": "4×8×8 for 16 px",
    }


@pytest.mark.parametrize(
    ("save", "file"),
    [
        (save_unclip, "image_normalizer/config.json"),
        (save_unclip, "image_noising_scheduler/scheduler_config.json"),
        (save_unclip, "text_encoder/config.json"),
        (save_dit, "transformer/config.json"),
    ],
)
def test_a_configuration_that_is_a_text_is_no_name_on_the_hub(tmp_path, monkeypatch, save, file):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked the hub"))
    folder = save(tmp_path / "prior")
    (folder / file).write_text('"org/name"')
    assert f"{file.split('/')[0]}: {file.split('/')[1]} holds no JSON object" in refused(folder)


@pytest.mark.parametrize("values", [{"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, {"latents_mean": [0.0] * 4}])
def test_statistics_of_latents_that_do_not_fit(tmp_path, values):
    folder = save_stable_diffusion_xl(tmp_path / "prior")
    edit(folder / "vae" / "config.json", **({"latents_std": [1.0, 1.0, 1.0, 0.0]} | values))
    assert "of its vae are not 4 finite numbers each, the latter above 0" in refused(folder)


def test_a_distilled_network_is_refused(copy):
    edit(copy / "unet" / "config.json", time_cond_proj_dim=8)
    message = refused(copy)
    assert "weights lack 1 of" in message or "is distilled (time_cond_proj_dim 8)" in message


@pytest.mark.parametrize(
    ("part", "key", "value"), [("text_encoder", "num_hidden_layers", 2**63), ("unet", "layers_per_block", [1, 10**9])]
)
def test_numbers_without_bounds_are_refused_before_building(copy, part, key, value):
    edit(copy / part / "config.json", **{key: value})
    assert f"{part}: {key} in config.json is {value}, above 1024" in refused(copy)


def test_a_tokenizer_of_another_text_encoder_is_refused(copy):
    edit(copy / "tokenizer" / "tokenizer_config.json", pad_token="<|another|>")
    assert "cannot be loaded: index out of range" in refused(copy)


def test_names_cannot_steer_a_terminal(copy):
    edit(copy / "model_index.json", scheduler=["diffusers", "\x1b[31m\nScheduler"])
    assert "is made for \\x1b[31m\\nScheduler" in refused(copy)
