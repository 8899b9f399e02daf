"""Every packaged recipe: paper recipes pass a dry run with only paths changed, twins run both stages end to end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manifests.errors import UsageError
from manifests.reader import Manifest
from pipeline import distill
from pipeline.recipe import packaged, packaged_text, resolve
from pipeline.synth import dry_run, run_synth
from stages.models.build import build_net
from stages.models.source import ModelConfig, default_stem
from stages.settings import ModelSettings
from tests.pipeline.conftest import INLINE
from tests.synth.test_guidance_decoder import save_tiny
from tests.synth.tiny import save_dit, save_if, save_image_variation, save_stable_diffusion

PAPER = {  # images and stored side as the paper (or the recipe's header) gives them
    "diffdfkd-cifar10": (15_000, 32),
    "diffdfkd-cifar10-fast": (15_000, 32),
    "diffdfkd-cifar100": (15_000, 32),
    "diffdfkd-tiny-imagenet": (30_000, 64),
    "diffdfkd-domainnet": (12_000, 224),
    "diffdfkd-quickdraw": (12_000, 224),
    "diffdfkd-table3-sd": (3_000, 32),
    "diffdfkd-table3-dit": (3_000, 32),
    "diffdfkd-table3-if": (3_000, 32),
    "dmkd-imagenet": (200_000, 256),
    "dda-cifar10": (40_000, 32),
    "dda-cifar100": (40_000, 32),
}
TWINS = {"diffdfkd-twin": (200, 8), "dmkd-twin": (40, 8), "dda-twin": (160, 8)}


def test_the_readmes_recipe_for_ones_own_teacher_passes_a_dry_run(tmp_path):
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text().split("```yaml\n# mine.yaml")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    weights = root / "benchmarks/cifar10-teacher/model.safetensors"
    sets = [f"synth.prior.path={root / 'priors/natural32'}", f"synth.teacher.weights={weights}"]
    found = dry_run(resolve(str(tmp_path / "mine.yaml"), sets=sets, environ={}), str(tmp_path / "run"))
    assert (found.classes, found.image_size, found.prior["name"][-9:]) == (10, 32, "natural32")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Where things lie on this machine: tiny priors by the hub id they stand for, a tiny decoder, some weights."""
    root = tmp_path_factory.mktemp("paths")
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": save_stable_diffusion(root / "sd"),
        "lambdalabs/sd-image-variations-diffusers": save_image_variation(root / "variations"),
        "facebook/DiT-XL-2-256": save_dit(root / "dit", classes=1000),
        "DeepFloyd/IF-I-M-v1.0": save_if(root / "if"),
        "tiny": save_tiny(root / "tiny"),
        "weights": root,
    }


def some_weights(teacher: ModelSettings, folder: Path) -> Path:
    """A file of zeros (variances: ones) that fits ``teacher``; recipes with the same network share it."""
    names, size = tuple(map(str, range(teacher.num_classes))), teacher.input.size
    file = folder / f"{teacher.name}-{len(names)}-{size}.safetensors"
    if not file.exists():
        with torch.device("meta"):
            stem = default_stem(teacher.name, size)
            net = build_net(
                ModelConfig(
                    architecture=teacher.name,
                    num_classes=len(names),
                    channels=3,
                    input=teacher.input,
                    class_names=names,
                    stem=stem,
                )
            )
        state = {name: torch.full(t.shape, float("running_var" in name)) for name, t in net.state_dict().items()}
        save_file(state, file)
    return file


def local(name: str, paths: dict[str, Path]) -> list[str]:
    """The changes of paths, and nothing else, that make recipe ``name`` run here."""
    synth = resolve(name, environ={}).synth
    sets = [f"prior.path={paths[synth.prior.path]}", f"teacher.weights={some_weights(synth.teacher, paths['weights'])}"]
    return sets + ([f"guidance.tiny_decoder={paths['tiny']}"] if synth.guidance.decoder == "tiny" else [])


def test_nothing_is_packaged_untested():
    assert set(packaged()) == {"demo", "photos", *PAPER, *TWINS}


def test_the_recipe_for_photographs_is_what_the_benchmark_was_run_with():
    photos = resolve("photos", environ={})
    benchmark = resolve(str(Path(__file__).parents[2] / "benchmarks/cifar10.yaml"), environ={})
    assert photos.synth == benchmark.synth.model_copy(update={"shards": 6, "lca": photos.synth.lca})
    learned = {"batch_size": 128, "students": ("resnet8",), "augment": photos.distill.augment}
    assert {name: getattr(benchmark.distill, name) for name in learned} == learned
    assert photos.distill.augment.flip and photos.distill.epochs == 200 and len(photos.synth.prompts.subjects) == 200


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_needs_only_paths(tmp_path, paths, name):
    recipe = resolve(name, section="synth", sets=local(name, paths), environ={})
    found = dry_run(recipe, str(tmp_path / "run"))
    assert (found.images, found.image_size) == PAPER[name]
    assert found.unknown is None and found.classes == recipe.synth.teacher.num_classes
    prior, dda = recipe.synth.prior, recipe.synth.method == "dda"  # three variants
    calls = (3 if dda else 1) * sum(1 + (prior.cfg_at(step) != 1) for step in range(prior.steps))
    assert found.denoiser_calls == calls * found.trajectories
    cost, guided = found.cost, recipe.synth.method == "diffdfkd"
    assert (found.published_bn is not None) == (guided or dda)
    assert cost.flop > cost.denoiser * found.trajectories > 0 and cost.weights_bytes > 1e6
    assert (cost.guidance_teacher > 0) == guided and (cost.inversion > 0) == dda
    assert (cost.saved_bytes_per_group > 0) == (guided or dda)
    assert found.disk_bytes_at_most < 4 * 2**30 * (10 if name == "dmkd-imagenet" else 1)
    assert any(line.startswith("compute") for line in found.lines())


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_says_what_to_change_and_trains_a_known_student(name):
    text, recipe = packaged_text(name), resolve(name, environ={})
    assert recipe.name == name and recipe.description
    assert "yours" in text or "extends: diffdfkd-table3-sd" in text or "extends: diffdfkd-cifar10" in text
    teacher = recipe.synth.teacher
    assert teacher.class_names is None or len(set(teacher.class_names)) == teacher.num_classes
    assert recipe.synth.images.size == teacher.input.size or recipe.synth.method == "dmkd"
    assert recipe.distill.students[0] == ("wrn-16-1" if recipe.synth.method == "dda" else "resnet18")
    assert recipe.distill.loss.temperature >= 10


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_both_stages(tmp_path, name):
    recipe = resolve(name, environ={})
    planned = dry_run(recipe, str(tmp_path / "run"))
    assert (planned.images, planned.image_size) == TWINS[name] and planned.cost.flop > 0
    made = run_synth(recipe, str(tmp_path / "run"), INLINE, quiet=True)
    assert made.rows == TWINS[name][0]
    manifest = Manifest.open(made.manifest)
    assert manifest.info.image_size == 8 and manifest.info.recipe["name"] == name
    students = distill.resolve_distill(manifest, None, [], {})
    assert students.distill == recipe.distill
    result = distill.run_distill(students, [(manifest.url, 1.0)], str(tmp_path / "out"), quiet=True)
    assert result.images + result.val_images == made.kept > TWINS[name][0] // 2 and not result.parked


def test_a_recipe_extends_another_and_every_value_knows_its_place(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("extends: demo\nsynth:\n  seed: 3\n  shards: 9\n")
    top.write_text("extends: base.yaml\nsynth:\n  shards: 8\n")
    recipe = resolve(str(top), environ={})
    assert (recipe.synth.seed, recipe.synth.shards, recipe.synth.prior.steps) == (3, 8, 20)
    assert recipe.name == "top"
    base.write_text("extends: demo\nsynth:\n  seeed: 3\n")
    with pytest.raises(UsageError, match=r"base.yaml:3: synth.seeed: unknown key; did you mean seed"):
        resolve(str(top), environ={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml", "goes round in a circle"),
        ("extends: [demo]", "mine.yaml:1: extends: name a packaged recipe"),
        ("extends: nowhere.yaml", "nowhere.yaml: cannot read this recipe"),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        resolve(str(tmp_path / "mine.yaml"), environ={})
    assert len(str(caught.value).splitlines()) == 1
