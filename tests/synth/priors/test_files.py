"""Of what a hub holds one format and variant of each network is fetched, hashed and loaded; pickles run no code."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manifests.errors import DataError
from stages.settings import PriorSettings
from stages.synth.priors import files
from stages.synth.priors.files import files_read, locate_prior
from stages.synth.priors.kinds import load_prior

NETWORK = "diffusion_pytorch_model"
HUB = [  # as Stable Diffusion 1.5 lies on its hub, in short
    "model_index.json", "README.md", "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt",
    "scheduler/scheduler_config.json", "safety_checker/config.json", "safety_checker/model.safetensors",
    "tokenizer/vocab.json", "tokenizer/merges.txt",
    *(f"unet/{NETWORK}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin")),
    *(f"vae/{NETWORK}{kind}" for kind in (".safetensors", ".bin")), "vae/config.json", "unet/config.json",
]  # fmt: skip


def weights(names):
    return [name for name in names if name.endswith((".safetensors", ".bin", ".ckpt"))]


def test_of_a_pipeline_only_what_loading_reads():
    plain, half = files_read(HUB, None), files_read(HUB, "fp16")
    assert weights(plain) == [f"unet/{NETWORK}.safetensors", f"vae/{NETWORK}.safetensors"]
    assert weights(half) == [f"unet/{NETWORK}.fp16.safetensors", f"vae/{NETWORK}.safetensors"]  # the VAE has no other
    configs = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"]
    assert [name for name in plain if name not in weights(plain)] == sorted(
        [*configs, "unet/config.json", "vae/config.json"]
    )


def test_weights_in_parts_and_folders_without_safetensors():
    parts = [f"unet/{NETWORK}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [f"unet/{NETWORK}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files_read([*parts, *halves, "model_index.json"], None) == ["model_index.json", *parts]
    assert files_read([*parts, *halves, "model_index.json"], "fp16") == ["model_index.json", *halves]
    assert files_read(["model_index.json", f"unet/{NETWORK}.bin"], "fp16") == [
        "model_index.json",
        f"unet/{NETWORK}.bin",
    ]
    assert files_read(["config.json", f"{NETWORK}.bin", f"{NETWORK}.safetensors"], None) == [  # an AutoencoderTiny
        "config.json",
        f"{NETWORK}.safetensors",
    ]


def test_a_hub_is_asked_for_no_more(monkeypatch, prior_folder):
    asked = {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return str(prior_folder)

    siblings = [SimpleNamespace(rfilename=name) for name in HUB]
    monkeypatch.setattr("huggingface_hub.model_info", lambda _: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert files.locate("org/name", variant="fp16") == prior_folder
    assert asked == {"org/name": files_read(HUB, "fp16")}


def test_a_lora_file_of_a_hub_is_the_one_file_that_is_fetched(monkeypatch, tmp_path):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/a.safetensors").touch()
        return str(tmp_path)

    siblings = [SimpleNamespace(rfilename=name) for name in ("a.safetensors", "sub/a.safetensors", "README.md")]
    monkeypatch.setattr("huggingface_hub.model_info", lambda _: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert files._lora_file("org/name/sub/a.safetensors") == tmp_path / "sub/a.safetensors"
    assert asked == [("org/name", ["sub/a.safetensors"])]


def as_in_a_hubs_cache(folder, cache):
    """A snapshot of links into the blobs of its repository."""
    repository = cache / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob = shutil.copy(file, repository / "blobs" / str(number))
        place = repository / "snapshots/0123" / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return repository / "snapshots/0123"


def test_a_snapshot_of_a_hub_consists_of_links(prior_folder, tmp_path):
    snapshot = as_in_a_hubs_cache(prior_folder, tmp_path)
    plain, linked = (locate_prior(PriorSettings(path=str(folder))) for folder in (prior_folder, snapshot))
    assert linked.sha256 == plain.sha256 and linked.geometry == plain.geometry


@pytest.mark.parametrize("name", ["model_index.json", f"unet/{NETWORK}.safetensors", "unet", "vae/config.json"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_out_of_a_prior_is_refused(prior_folder, tmp_path, name, cached):
    outside = shutil.copytree(prior_folder, tmp_path / "snapshots" / "outside")
    copy = shutil.copytree(prior_folder, tmp_path / "snapshots" / "copy")
    if cached:
        copy = as_in_a_hubs_cache(copy, tmp_path)
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    (copy / name).symlink_to(outside / name)
    with pytest.raises(DataError, match=r"is a link out of its folder"):
        locate_prior(PriorSettings(path=str(copy)))


def test_a_link_inside_a_prior_is_followed(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "copy")
    (copy / "unet/config.json").rename(copy / "unet/other.conf")
    (copy / "unet/config.json").symlink_to("other.conf")
    assert locate_prior(PriorSettings(path=str(copy))).geometry
    (tmp_path / "named").symlink_to(copy)
    assert locate_prior(PriorSettings(path=str(tmp_path / "named"))).geometry


def test_what_is_not_read_is_not_the_priors_identity(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "more")
    sha256 = locate_prior(PriorSettings(path=str(copy))).sha256
    (copy / "checkpoint.safetensors").write_bytes(b"another format of the same")
    (copy / "unet" / f"{NETWORK}.fp16.safetensors").write_bytes(b"another variant")
    assert locate_prior(PriorSettings(path=str(copy))).sha256 == sha256
    assert locate_prior(PriorSettings(path=str(copy), variant="fp16")).sha256 != sha256


def test_weights_as_bin_load_the_same(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "bin")
    for file in copy.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    there, here = (load_prior(PriorSettings(path=str(f)), "cpu") for f in (copy, prior_folder))
    for a, b in ((there.network, here.network), (there.vae, here.vae), (there.encoders[0], here.encoders[0])):
        torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickled-code-ran",)


@pytest.mark.parametrize("file", [f"unet/{NETWORK}", "text_encoder/model"])
def test_pickled_code_does_not_run(prior_folder, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(prior_folder, tmp_path / "pickled")
    (copy / f"{file}.safetensors").unlink()
    torch.save(
        {"weight": Evil()},
        (copy / file).with_name(f"{'pytorch_' if file.endswith('/model') else ''}{(copy / file).name}.bin"),
    )
    with pytest.raises(DataError, match="cannot be loaded"):
        load_prior(PriorSettings(path=str(copy)), "cpu")
    assert not (tmp_path / "pickled-code-ran").exists()


def test_weights_of_other_variants_alone_are_named(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "half")
    plain = copy / "unet" / f"{NETWORK}.safetensors"
    plain.rename(plain.with_name(f"{NETWORK}.fp16.safetensors"))
    with pytest.raises(DataError, match="only weights of the variant fp16: name it"):
        load_prior(PriorSettings(path=str(copy)), "cpu")
    assert load_prior(PriorSettings(path=str(copy), variant="fp16"), "cpu").latent_shape


def test_a_process_reads_a_file_once_for_its_checksum_until_it_changes(prior_folder, tmp_path, monkeypatch):
    copy = shutil.copytree(prior_folder, tmp_path / "prior")
    before = locate_prior(PriorSettings(path=str(copy))).sha256
    digest, read = files.hashlib.file_digest, []
    monkeypatch.setattr(files.hashlib, "file_digest", lambda f, name: read.append(f.name) or digest(f, name))
    assert locate_prior(PriorSettings(path=str(copy))).sha256 == before and not read
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    assert locate_prior(PriorSettings(path=str(copy))).sha256 != before and read == [str(config)]
