"""Class-conditional and unconditional priors, saved to disk and loaded again; misfits are refused in one line."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import IFPipeline, StableDiffusionXLPipeline

from manifests.errors import DataError, UsageError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.models.source import teacher_identity
from stages.settings import GuidanceSettings, LatentMixSettings, PriorSettings, SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Guidance
from stages.synth.inputs import inspect_inputs
from stages.synth.latent_mix import LatentMix
from stages.synth.priors.files import check_labels, locate_prior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import State
from stages.synth.sampler import denoise
from stages.synth.worker import ShardWorker
from tests.synth.tiny import (
    TinyTeacher,
    save_ddpm,
    save_dit,
    save_if,
    save_ldm,
    save_stable_diffusion,
    save_stable_diffusion_dc,
    save_stable_diffusion_xl,
    save_unclip,
)

SAVE = {
    "sd": save_stable_diffusion,
    "sd-dc": save_stable_diffusion_dc,
    "sdxl": save_stable_diffusion_xl,
    "if": save_if,
    "unclip": save_unclip,
    "dit": save_dit,
    "ldm": save_ldm,
    "ddpm": save_ddpm,
}
GROUP = Group(0, (0, 1, 2, 3), (0, 1, 0, 1), ("a", "b", "a", "b"), ("cat", "dog", "cat", "dog"))
LABELS = {"cat": 3, "dog": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {name: save(root / name) for name, save in SAVE.items()}


def load(folder, **kw):
    return load_prior(PriorSettings(path=str(folder), **({"steps": 4, "cfg_scale": 1.0, "labels": LABELS} | kw)), "cpu")


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
@pytest.mark.parametrize("name", SAVE)
def test_every_family_is_guided_and_cut_with_every_scheduler(folders, name, scheduler):
    prior, teacher = load(folders[name], scheduler=scheduler), TinyTeacher()
    every_second = LatentMixSettings(every=2, interval=(0, 1))

    def final(guide):
        cut = LatentMix(every_second, GROUP, 0, prior.timesteps, prior.latent_shape)
        *_, frame = denoise(prior, GROUP, 0, guide=guide, mix=cut)
        assert frame.images.shape == (4, 3, 16, 16) and prior.image_size == 16 and any(frame.mixes)
        with torch.no_grad():
            return frame.images, torch.nn.functional.cross_entropy(teacher.logits(frame.images), labels).item()

    labels = torch.tensor(GROUP.labels)
    guide = Guidance(prior, teacher, labels, GuidanceSettings(step_size=0.3, bn=0.0))
    images, loss = final(guide)
    torch.manual_seed(9)  # a global generator plays no part
    assert torch.equal(images, final(guide)[0])
    assert loss < final(None)[1]


def test_identities(folders):
    of = {
        name: locate_prior(PriorSettings(path=str(folder), cfg_scale=1.0)).identity for name, folder in folders.items()
    }
    assert [of[name]["conditioning"] for name in SAVE] == ["text"] * 5 + ["class", "none", "none"]
    assert {identity["image_size"] for identity in of.values()} == {16} and of["dit"]["classes"] == 5


@pytest.mark.parametrize("negative", ["", "b"])
def test_sdxl_gives_what_its_own_pipeline_gives(folders, negative):
    """Both encoders, the pooled embedding, the size and an empty negative prompt as zeros: the whole loop agrees."""
    prior = load(folders["sdxl"], cfg_scale=2.0, negative_prompt=negative)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"], add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    *_, frame = denoise(prior, GROUP, 0)
    theirs = pipeline(
        list(GROUP.prompts),
        negative_prompt=[negative] * 4 if negative else None,
        latents=GROUP.noise(0, prior.latent_shape),
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="pt",
    ).images
    torch.testing.assert_close((frame.images / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-3, atol=1e-4)


def test_if_gives_what_its_own_pipeline_gives_without_thresholding(folders):
    """T5 with its mask, prompts in lower case, the learned variance dropped: the whole loop agrees."""
    prior = load(folders["if"], cfg_scale=2.0, negative_prompt="B", scheduler="ddpm")
    pipeline = IFPipeline.from_pretrained(
        folders["if"], safety_checker=None, watermarker=None, requires_safety_checker=False
    )
    pipeline.scheduler = prior.schedule.scheduler
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["A cat", "dog"]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    rngs = generators()
    state = prior.start(torch.cat([torch.randn(1, 3, 16, 16, generator=rng) for rng in rngs]))
    for _ in prior.timesteps:
        state = prior.step(prior.predict(state, prior.encode(prompts)), rngs)
    theirs = pipeline(
        prompts,
        negative_prompt=["B", "B"],
        guidance_scale=2.0,
        num_inference_steps=4,
        generator=generators(),
        output_type="pt",
        clean_caption=False,
    ).images
    torch.testing.assert_close(state.z, theirs, rtol=1e-3, atol=1e-4)


def test_class_guidance_counts_from_the_null_class_of_the_config(folders):
    prior, z = load(folders["dit"], cfg_scale=3.0), torch.randn(4, 4, 8, 8)
    condition = prior.encode(GROUP.conditions(prior.conditioning))
    assert condition.tolist() == [5] * 4 + [3, 0, 3, 0]
    with torch.no_grad():
        got = prior.predict(State(z, 1), condition).output
        times = torch.full((4,), prior.timesteps[1])
        null, asked = (
            prior.network(z, timestep=times, class_labels=torch.tensor(c)).sample[:, :4]
            for c in ([5] * 4, [3, 0, 3, 0])
        )
    torch.testing.assert_close(got, null + 3.0 * (asked - null), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(null, asked)


def test_unmapped_and_unknown_labels_are_listed(folders):
    prior = load(folders["dit"])
    with pytest.raises(UsageError, match="no label for 2 classes of the teacher: cow, hen; map each .* 0 to 4"):
        prior.encode(["cat", "cow", "hen", "cow"])
    with pytest.raises(UsageError, match="has labels 0 to 4; prior.labels maps dog: 5"):
        load(folders["dit"], labels={"cat": 0, "dog": 5}).encode(["cat"])
    with pytest.raises(UsageError, match="no label for 10 classes"):  # before anything is loaded
        inspect_inputs(SynthSettings(prior=PriorSettings(path=str(folders["dit"]))))


def test_labels_by_index_pair_equal_class_lists_alone(folders):
    base = {"prior": {"path": str(folders["dit"]), "labels_by_index": True}, "teacher": {"name": "embedded:digits"}}
    with pytest.raises(UsageError, match="knows 5 classes, the teacher knows 10"):
        inspect_inputs(SynthSettings.model_validate(base))
    five = PriorSettings(path=str(folders["dit"]), labels_by_index=True)
    check_labels(five, "x", 5, "abcde")
    for either in (five, PriorSettings(labels=dict(zip("abcd", range(4), strict=True)))):
        with pytest.raises(UsageError, match="two of the teacher's classes are called a"):
            check_labels(either, "x", 5, ["a", "b", "a", "c", "d"])
    assert load_prior(five.labeled("abcde"), "cpu").encode(["d", "a"]).tolist() == [5, 5, 3, 0]
    with pytest.raises(ValueError, match="exclude each other"):
        PriorSettings(labels={"a": 0}, labels_by_index=True)


def test_rows_of_a_class_prior_hold_its_labels(folders, tmp_path):
    names = teacher_identity(SynthSettings().teacher)["config"]["class_names"]
    table = {name: i % 5 for i, name in enumerate(names)}
    settings = SynthSettings(
        method="dmkd",
        prior=PriorSettings(path=str(folders["dit"]), steps=2, labels=table),
        groups_per_shard=1,
        group_size=20,
        device="cpu",
    )
    assert inspect_inputs(settings).prior["conditioning"] == "class"
    ShardWorker(settings.model_dump(mode="json"), str(tmp_path), "f" * 64).run(0)
    storage = Storage(str(tmp_path))
    rows = pq.read_table(storage.path(done_records(storage)[0].table)).to_pylist()
    assert [row["prior_label"] for row in rows] == [row["label"] % 5 for row in rows]
    assert all(row["prompt"] is None and row["negative_prompt"] is None for row in rows)


def test_cfg_does_not_apply_to_an_unconditional_prior(folders, caplog):
    with pytest.raises(UsageError, match=r"unconditional, so prior\.cfg_scale=2 .* leave it out"):
        locate_prior(PriorSettings(path=str(folders["ddpm"]), cfg_scale=2.0))
    assert PriorSettings().cfg_scale != 1
    by_default = load_prior(PriorSettings(path=str(folders["ddpm"]), steps=4), "cpu")
    assert [r.message for r in caplog.records] == [
        f"prior {folders['ddpm']} is unconditional: prior.cfg_scale does not apply"
    ]
    z = GROUP.noise(0, by_default.latent_shape)
    with torch.no_grad():
        outputs = [p.predict(p.start(z), p.encode(GROUP.prompts)).output for p in (by_default, load(folders["ddpm"]))]
    assert torch.equal(*outputs)
    assert by_default.settings.cfg_at(0) == 1  # so that no second half is evaluated


def test_grey_pixels_become_rgb(tmp_path):
    prior = load(save_ddpm(tmp_path / "gray", channels=1))
    z = torch.randn(2, 1, 16, 16)
    assert prior.latent_shape == (1, 16, 16) and torch.equal(prior.decode(z), torch.cat([z, z, z], 1))


def test_cfg_outside_its_interval_is_off_and_saves_its_half(folders, monkeypatch):
    half = load(folders["sd"], cfg_scale=3.0, cfg_interval=(0.5, 1.0))
    plain, full = load(folders["sd"]), load(folders["sd"], cfg_scale=3.0)
    z, sizes = torch.randn(2, *half.latent_shape), []
    original = half.network.forward
    monkeypatch.setattr(half.network, "forward", lambda x, *a, **k: sizes.append(len(x)) or original(x, *a, **k))
    for step in range(4):
        like = plain if step < 2 else full
        with torch.no_grad():
            outputs = [p.predict(State(z, step), p.encode(["a", "b"])).output for p in (half, like)]
        torch.testing.assert_close(*outputs)
    assert sizes == [2, 2, 4, 4]
    with pytest.raises(ValueError, match=r"cfg_interval\s+Value error, must satisfy"):
        PriorSettings(cfg_interval=(0.5, 0.5))


@pytest.mark.parametrize("name", ["sd", "ldm"])
def test_sliced_decoding_gives_the_same_images(folders, name):
    whole, sliced = load(folders[name]), load(folders[name], vae_slicing=True)
    z0 = torch.randn(3, *whole.latent_shape)
    with torch.no_grad():
        torch.testing.assert_close(sliced.decode(z0), whole.decode(z0), rtol=1e-4, atol=1e-5)


def test_compile_is_asked_of_the_network_alone(folders, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    assert load(folders["sd"]).network is not None and not compiled
    prior = load(folders["sd"], compile=True)
    assert compiled == [prior.network]


def changed(folders, name, tmp_path, part, **values):
    """A copy of a prior whose ``part/config.json`` says something else."""
    copy = shutil.copytree(folders[name], tmp_path / "copy")
    file = copy / part
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return PriorSettings(path=str(copy), cfg_scale=1.0, labels=LABELS)


@pytest.mark.parametrize(
    ("name", "part", "values", "message"),
    [
        ("sd", "unet/config.json", {"in_channels": 9}, "takes 9 channels, but vae makes 4"),
        ("dit", "vae/config.json", {"latent_channels": 16}, "takes 4 channels, but vae makes 16"),
        ("ddpm", "unet/config.json", {"in_channels": 6}, "takes 6 channels, but images have 1 or 3"),
        ("ldm", "unet/config.json", {"out_channels": 4}, "takes 3 channels and returns 4: expected 3, or 6"),
        ("ldm", "vqvae/config.json", {"block_out_channels": None}, "damaged unet/config.json or vqvae/config.json"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(folders, tmp_path, name, part, values, message):
    settings = changed(folders, name, tmp_path, part, **values)
    for refuse in (locate_prior, lambda s: load_prior(s, "cpu")):
        with pytest.raises(DataError, match=message) as error:
            refuse(settings)
        assert "\n" not in str(error.value)


def test_damaged_folders_are_refused_when_loading(folders, tmp_path):
    settings = changed(folders, "ldm", tmp_path, "model_index.json", vqvae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(DataError, match="vqvae is a AutoencoderTiny, expected VQModel or AutoencoderKL"):
        load_prior(settings, "cpu")
    copy = tmp_path / "copy"
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(DataError, match=r"copy: scheduler: scheduler_config\.json is missing; .* save that scheduler"):
        load_prior(settings, "cpu")
