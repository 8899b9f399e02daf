"""What an image costs, counted in network evaluations, so that a slower loop fails whatever the machine is doing."""

import pytest

from pipeline.recipe import resolve
from stages.settings import SynthSettings
from stages.synth import decoders
from stages.synth.priors.kinds import PROMPTS
from stages.synth.worker import ShardWorker

STEPS, SIZE = 20, 4  # of the demo recipe; trajectories of a group


def worker(prior_folder, tmp_path, *sets):
    fixed = [f"prior.path={prior_folder}", f"group_size={SIZE}", "groups_per_shard=1", "device=cpu"]
    fixed += ["guidance.decoder=full", *sets]
    return ShardWorker(resolve("demo", sets=[f"synth.{s}" for s in fixed]).synth, str(tmp_path / "run"), "f" * 64)


def counted(made, monkeypatch):
    """Images shown to each network while a shard is made, per trajectory, and the report."""
    seen = {}

    def watch(name, owner, method):
        original = getattr(owner, method)

        def call(x, *args, **kwargs):
            seen[name] = seen.get(name, 0) + len(x)
            return original(x, *args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    prior, teacher = made.models.prior, made.models.teacher
    watch("prior", prior.network, "forward")
    watch("vae", prior.vae, "decode")
    watch("teacher", teacher.net, "forward")
    if made.models.decode:
        watch("decoder", made.models.decode, "forward")
    report = made.run(0)
    return {name: rows / SIZE for name, rows in seen.items()}, report


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        # 14 of the 20 steps are guided; one image is stored and scored
        ([], {"prior": 20, "vae": 14 + 1, "teacher": 14 + 1}),
        (["guidance.decoder=fitted"], {"prior": 20, "decoder": 14, "vae": 1, "teacher": 14 + 1}),
        (["guidance.decoder=fitted", "guidance.every=2"], {"prior": 20, "decoder": 7, "vae": 1, "teacher": 7 + 1}),
        (
            ["guidance.decoder=fitted", "guidance.updates_per_step=2"],
            {"prior": 20, "decoder": 28, "vae": 1, "teacher": 28 + 1},
        ),
        (["guidance.gradient_at=xt"], {"prior": 20, "vae": 14 + 1, "teacher": 14 + 1}),
        (["prior.cfg_scale=3", "prior.cfg_interval=[0,0.5]"], {"prior": 10 * 2 + 10, "vae": 15, "teacher": 15}),
        (["method=dmkd", "guidance.decoder=fitted"], {"prior": 20, "vae": 1, "teacher": 1}),
        (["guidance.decoder=fitted", "images.intermediates=2"], {"prior": 20, "decoder": 14, "vae": 3, "teacher": 17}),
    ],
)
def test_networks_are_asked_no_more_than_they_must(quick_fit, prior_folder, tmp_path, monkeypatch, sets, expected):
    monkeypatch.setattr(decoders, "STEPS", 5)
    seen, report = counted(worker(prior_folder, tmp_path, *sets), monkeypatch)
    assert seen == expected
    assert report["evaluations"] == STEPS
    assert report["updates"] + report["decodes"] == seen["teacher"]
    assert report["decodes"] == seen["vae"] - (0 if "decoder" in seen else report["updates"])


def test_nor_where_nothing_is_set(quick_fit, prior_folder, tmp_path, monkeypatch):
    """The defaults: 20 steps with CFG, every one guided through a fitted decoder, one image decoded and scored."""
    sizes = {"group_size": SIZE, "groups_per_shard": 1, "device": "cpu"}
    settings = SynthSettings.model_validate({"prior": {"path": str(prior_folder)}} | sizes)
    seen, report = counted(ShardWorker(settings, str(tmp_path / "run"), "f" * 64), monkeypatch)
    assert seen == {"prior": 20 * 2, "decoder": 20, "vae": 1, "teacher": 20 + 1}
    assert (report["evaluations"], report["updates"], report["decodes"]) == (20, 20, 1)


def test_a_prompt_is_embedded_once_and_few_are_kept(prior):
    prior.row.cache_clear()
    first = prior.encode(["a", "b", "a"])
    prior.encode(["b", "a"])
    assert prior.row.cache_info().misses == 2 and prior.row.cache_info().maxsize == PROMPTS
    assert (first[0] == first[2]).all() and not (first[0] == first[1]).all()
