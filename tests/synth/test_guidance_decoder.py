"""What guidance decodes with: tiny autoencoders in and out of place."""

import shutil

import pytest
import torch
from diffusers import AutoencoderTiny

from manifests.errors import DataError, UsageError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.settings import GuidanceSettings, SynthSettings
from stages.synth.decoders import TinyDecoder
from stages.synth.group import Group
from stages.synth.guidance import Guidance
from stages.synth.inputs import inspect_inputs, semantics
from stages.synth.sampler import Counters, denoise
from stages.synth.worker import ShardWorker
from tests.synth.tiny import TinyTeacher

GROUP = Group(0, (0, 1, 2, 3), (0, 1, 0, 1), ("a", "b", "a", "b"))


def save_tiny(folder, blocks=2, channels=4):
    """A random AutoencoderTiny that enlarges latents by 2^(blocks − 1)."""
    torch.manual_seed(2)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        latent_channels=channels,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "taesd")


def asked(folder):
    return GuidanceSettings(decoder="tiny", tiny_decoder=str(folder))


def test_guidance_alone_sees_through_the_tiny_decoder(prior, tiny_folder, monkeypatch):
    """The vae decodes what is stored, the tiny decoder what the teacher steers by, and it is given scaled latents."""
    decoder, seen, stored = TinyDecoder(prior, asked(tiny_folder)), [], []
    tiny, full = decoder.network.decode, prior.vae.decode
    monkeypatch.setattr(decoder.network, "decode", lambda z: seen.append(z.detach()) or tiny(z))
    monkeypatch.setattr(prior.vae, "decode", lambda z: stored.append(z) or full(z))
    settings = GuidanceSettings(every=2, updates_per_step=2)
    guide = Guidance(prior, TinyTeacher(), torch.tensor(GROUP.labels), settings, decode=decoder)
    counters = Counters()
    list(denoise(prior, GROUP, 0, guide=guide, intermediates=2, counters=counters))
    assert (len(seen), len(stored)) == (counters.updates, counters.decodes) == (3 * 2, 2 + 1)
    with torch.no_grad():
        state = prior.predict(prior.start(GROUP.noise(0, prior.latent_shape)), prior.encode(GROUP.prompts))
    torch.testing.assert_close(seen[0], state.z0)


def test_a_tiny_decoder_of_another_prior_is_refused(prior, prior_folder, tmp_path):
    for wrong, why in (
        (save_tiny(tmp_path / "large", blocks=3), "makes 32 pixels, the prior 16"),
        (save_tiny(tmp_path / "wide", channels=3), "takes 3 channels, the prior's latents have 4"),
        (prior_folder, "cannot be loaded"),
    ):
        with pytest.raises(DataError, match=why):
            TinyDecoder(prior, asked(wrong))
    with pytest.raises(ValueError, match="does nothing"):
        SynthSettings(guidance=GuidanceSettings(tiny_decoder="somewhere"))


def test_families_without_a_tiny_decoder_say_so(tmp_path):
    from tests.synth.tiny import save_ldm

    folder = save_ldm(tmp_path / "ldm")
    given = {"prior": {"path": str(folder), "cfg_scale": 1.0}, "guidance": {"decoder": "tiny"}}
    with pytest.raises(UsageError, match=r"no AutoencoderTiny is known for LDMPipeline.*guidance.tiny_decoder"):
        inspect_inputs(SynthSettings.model_validate(given))


def test_the_plan_knows_a_tiny_decoder_by_its_content(prior_folder, tiny_folder, tmp_path):
    def covered(**guidance):
        parsed = SynthSettings.model_validate({"prior": {"path": str(prior_folder)}, "guidance": guidance})
        return semantics(parsed, inspect_inputs(parsed))

    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    other = save_tiny(tmp_path / "other", blocks=3)
    here = covered(decoder="tiny", tiny_decoder=str(tiny_folder))
    assert here == covered(decoder="tiny", tiny_decoder=str(copy))
    assert here != covered(decoder="tiny", tiny_decoder=str(other)) and here != covered()


def test_a_worker_guided_through_a_tiny_decoder_makes_other_images(prior_folder, tiny_folder, tmp_path):
    tars = []
    for guidance in ({"decoder": "tiny", "tiny_decoder": str(tiny_folder)}, {"decoder": "full"}):
        settings = SynthSettings.model_validate(
            {
                "prior": {"path": str(prior_folder), "steps": 3, "cfg_scale": 1.0},
                "guidance": guidance,
                "groups_per_shard": 1,
                "group_size": 4,
                "device": "cpu",
            }
        )
        storage = Storage(str(tmp_path / str(len(tars))))
        report = ShardWorker(settings.model_dump(mode="json"), storage.url, "f" * 64).run(0)
        assert (report["updates"], report["decodes"]) == (3, 1)
        tars.append(done_records(storage)[0].tar_sha256)
    assert tars[0] != tars[1]
