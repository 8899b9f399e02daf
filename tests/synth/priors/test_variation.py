"""Image variation by Stable unCLIP: what diffusers' own pipeline gives, and DDA on it."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImageVariationPipeline, StableUnCLIPImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import resolve
from pipeline.synth import dry_run, run_synth
from stages.settings import DdaSettings, PriorSettings, SynthSettings
from stages.synth.dda import variation
from stages.synth.group import make_group
from stages.synth.priors.files import locate_prior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import State, VariationPrior
from stages.synth.sampler import denoise
from tests.synth.tiny import save_image_variation, save_unclip

GROUP = make_group(SynthSettings(group_size=3), 0, ("a", "b"))
PLACE = ExecutorSettings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_unclip(tmp_path_factory.mktemp("unclip") / "prior")


def load(folder, **kw):
    return load_prior(PriorSettings(path=str(folder), **({"steps": 4, "cfg_scale": 2.0} | kw)), "cpu")


def pictures(seed=0, n=3, side=32):
    """uint8 ``[n, side, side, 3]``: coarse noise, enlarged; it overshoots neither 0 nor 255 when resized."""
    coarse = np.random.default_rng(seed).integers(60, 196, (n, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse])


def tensors(pixels):
    """The same in [−1, 1], ``[n, 3, side, side]``."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def variants(prior, images, seed, **own):
    (frame,) = denoise(prior, GROUP, seed, **variation(prior, images, GROUP, DdaSettings(**own))(seed))
    return frame.images


@pytest.mark.parametrize("side", [8, 16, 20, 64])
def test_pixels_are_those_of_the_feature_extractor(folder, side):
    pixels = pictures(side=side)
    extractor = CLIPImageProcessor.from_pretrained(folder, subfolder="feature_extractor")
    wanted = extractor([Image.fromarray(p) for p in pixels], return_tensors="pt").pixel_values
    got = load(folder).pixels(tensors(pixels))
    assert got.shape == wanted.shape == (3, 3, 16, 16)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1.01 / 255 / min(extractor.image_std))  # it rounds to bytes


@pytest.mark.parametrize("level", [0, 300])
def test_variants_are_those_of_the_pipeline_itself(folder, level):
    """Encoder, normalizer, noise, its level, the unconditional half and the whole loop agree."""
    prior, images = load(folder, negative_prompt="b"), tensors(pictures())
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    embedded = prior.embed_images(images)
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(3))
    condition = prior.encode_with(GROUP.prompts, embedded, noise, level)
    (frame,) = denoise(prior, GROUP, 0, condition=condition)
    theirs = pipeline(
        prior.pixels(images),
        list(GROUP.prompts),
        negative_prompt=["b"] * 3,
        latents=GROUP.noise(0, prior.latent_shape),
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=2.0,
        noise_level=level,
        output_type="pt",
    ).images
    torch.testing.assert_close((frame.images / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-3, atol=1e-4)


def test_an_open_image_is_a_zero_embedding(folder):
    prior = load(folder, cfg_scale=1.0)
    z, rows = GROUP.noise(0, prior.latent_shape), prior.encode(GROUP.prompts)
    tokens = torch.cat([prior.row(prompt) for prompt in GROUP.prompts])
    with torch.no_grad():
        wanted = prior.network(z, prior.timesteps[1], tokens, class_labels=torch.zeros(3, 16)).sample
        torch.testing.assert_close(prior.predict(State(z, 1), rows).output, wanted)


def test_variants_follow_their_source_their_seed_and_the_noise(folder):
    prior, one = load(folder), tensors(pictures())
    assert isinstance(prior, VariationPrior)
    first = variants(prior, one, 5)
    torch.manual_seed(9)  # a global generator plays no part
    assert torch.equal(first, variants(prior, one, 5, strength=0.1))
    changed = one.clone()
    changed[1] = tensors(pictures(seed=1))[1]
    other = variants(prior, changed, 5)
    torch.testing.assert_close(other[[0, 2]], first[[0, 2]])
    assert (other[1] - first[1]).abs().max() > 1e-3
    assert (variants(prior, one, 6) - first).abs().max() > 1e-3
    assert (variants(prior, one, 5, noise_level=500) - first).abs().max() > 1e-3


def test_two_variants_of_a_seed_differ_in_the_noise_on_their_features(folder):
    prior, images = load(folder, cfg_scale=1.0), tensors(pictures())
    at = variation(prior, images, GROUP, DdaSettings(noise_level=500))
    rows = [at(seed)["condition"] for seed in (5, 5, 6)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0][:, :-16], rows[2][:, :-16]) and torch.equal(rows[0][:, -8:], rows[2][:, -8:])


def test_in_micro_batches_and_half_precision(folder):
    prior, images = load(folder), tensors(pictures())
    whole = variants(prior, images, 5)
    prior.batch_limit = 2
    torch.testing.assert_close(variants(prior, images, 5), whole, rtol=1e-4, atol=1e-5)
    half = variants(load(folder, dtype="bf16"), images, 5)
    assert half.dtype == torch.float32 and (half - whole).abs().mean() < 0.1 * whole.abs().mean()


def recipe(folder, *more):
    fixed = [
        *(
            "method=dda",
            f"prior.path={folder}",
            "prior.steps=5",
            "prior.cfg_scale=0.5",
            "device=cpu",
            "dda.min_cosine=-1",
        ),
        *("cmi.steps=3", "cmi.width=4", "cmi.latent=8", "dda.variants=2", "group_size=6", "groups_per_shard=1"),
    ]
    return resolve("demo", section="synth", sets=[*fixed, "shards=1", *more])


def test_dda_from_end_to_end(folder, tmp_path):
    asked = recipe(folder)
    told = dry_run(asked, str(tmp_path / "one"))
    assert told.denoiser_calls == 6 * 2 * 5 * 2  # trajectories, variants, all steps in spite of strength, CFG
    report = run_synth(asked, str(tmp_path / "one"), PLACE, quiet=True)
    manifest = Manifest.open(report.manifest)
    rows = manifest.file.group(0).to_pylist()
    assert len(rows) == told.images == 18
    assert [row["source_key"] is None for row in rows] == [True, False, False] * 6
    assert all((row["step"], row["cosine_ref"]) == (5, "source") for row in rows if row["source_key"])
    assert len({row["xxh3"] for row in rows}) == 18
    again = run_synth(asked, str(tmp_path / "two"), PLACE, quiet=True)
    assert Manifest.open(again.manifest).info.tars == manifest.info.tars
    assert dry_run(recipe(folder, "dda.noise_level=9"), str(tmp_path / "x")).fingerprint != told.fingerprint


@pytest.mark.parametrize(
    "part", ["image_encoder/model.safetensors", "image_normalizer/diffusion_pytorch_model.safetensors"]
)
def test_the_identity_covers_encoder_and_normalizer(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = locate_prior(PriorSettings(path=str(copy))).identity
    weights = load_file(copy / part)
    save_file({name: values + 1 for name, values in weights.items()}, copy / part)
    assert locate_prior(PriorSettings(path=str(copy))).sha256 != before["sha256"]


def refused(settings, *loaders):
    for refuse in loaders:
        with pytest.raises(DataError) as error:
            refuse(settings)
        assert "\n" not in str(error.value)
        yield str(error.value)


def test_a_folder_without_its_image_encoder_is_refused_in_one_line(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "image_encoder")
    for line in refused(PriorSettings(path=str(copy)), locate_prior, lambda s: load_prior(s, "cpu")):
        assert line == f"prior {copy}: image_encoder: config.json is missing"


@pytest.mark.parametrize("part", ["image_normalizer", "image_noising_scheduler", "feature_extractor"])
def test_other_missing_parts_are_refused_when_loading(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part)
    (line,) = refused(PriorSettings(path=str(copy)), lambda s: load_prior(s, "cpu"))
    assert line.startswith(f"prior {copy}: {part}: ") and line.endswith("config.json is missing")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("feature_extractor/preprocessor_config.json", {"crop_size": {"height": 8, "width": 8}}, "8 pixels for 16"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 12}, "an embedding of 8 for 6, half"),
    ],
)
def test_parts_of_two_models_are_refused(folder, tmp_path, file, values, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | values))
    with pytest.raises(DataError, match=f"do not belong together: .*{message}"):
        load_prior(PriorSettings(path=str(copy)), "meta")


def test_a_noise_level_above_the_schedule_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "image_noising_scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": 100}))
    with pytest.raises(UsageError, match="noise level 100 is not below 100"):
        variants(load(copy), tensors(pictures()), 0, noise_level=100)


@pytest.fixture(scope="module")
def images_only(tmp_path_factory):
    return save_image_variation(tmp_path_factory.mktemp("variation") / "prior")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_variation_without_text_is_that_of_the_pipeline_itself(images_only, scale):
    prior, images = load(images_only, cfg_scale=scale), tensors(pictures())
    assert isinstance(prior, VariationPrior)
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(images_only, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prior.pixels(images),
        latents=GROUP.noise(5, prior.latent_shape),
        num_inference_steps=4,
        guidance_scale=scale,
        output_type="pt",
    ).images
    ours = variants(prior, images, 5)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-3, atol=1e-4)
    assert (variants(prior, tensors(pictures(seed=1)), 5) - ours).abs().max() > 1e-3


def test_dda_on_image_variation_from_end_to_end(images_only, tmp_path):
    asked = recipe(images_only, "prior.cfg_scale=1.0", "dda.guided=true", "guidance.decoder=full")
    told = dry_run(asked, str(tmp_path / "one"))
    assert told.denoiser_calls == 6 * 2 * 5  # trajectories, variants, steps
    manifest = Manifest.open(run_synth(asked, str(tmp_path / "one"), PLACE, quiet=True).manifest)
    rows = manifest.file.group(0).to_pylist()
    assert len(rows) == told.images == 18 and all(row["prompt"] is None for row in rows)


def test_image_variation_serves_dda_alone_and_adds_no_noise(images_only, tmp_path):
    asked = resolve("demo", section="synth", sets=[f"prior.path={images_only}"])
    for start in (lambda out: dry_run(asked, out), lambda out: run_synth(asked, out, PLACE, quiet=True)):
        with pytest.raises(UsageError, match="only varies images: it takes part in --method dda, not diffdfkd"):
            start(str(tmp_path / "run"))
    with pytest.raises(UsageError, match="leave dda.noise_level at 0"):
        variants(load(images_only), tensors(pictures()), 5, noise_level=9)


def test_an_encoder_of_another_width_is_refused(images_only, tmp_path):
    copy = shutil.copytree(images_only, tmp_path / "copy")
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 24}))
    with pytest.raises(DataError, match="do not belong together: .*an embedding of 16 for 24 in cross-attention"):
        load_prior(PriorSettings(path=str(copy)), "meta")
