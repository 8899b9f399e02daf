"""Recipes: packaged and user files, precedence over all layers, errors a user can act on."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from pipeline.layers import mapping_layer
from pipeline.recipe import Recipe, packaged, resolve, to_yaml
from stages.settings import ModelSettings, SynthSettings
from stages.synth.sampler import intermediate_steps


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(*args, environ=kwargs.pop("environ", {}), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_valid_and_carry_their_name(name):
    recipe = resolve(name, environ={})
    assert recipe.name == name
    assert recipe.description


def test_precedence_default_file_environment_set_flag(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("synth: {seed: 1, shards: 1, group_size: 11, method: dmkd, prior: {steps: 11}}")
    recipe = resolve(
        str(file),
        section="synth",
        environ={"FACTORY_SYNTH__SHARDS": "2", "FACTORY_SYNTH__GROUP_SIZE": "12", "FACTORY_SYNTH__METHOD": "diffdfkd"},
        sets=["group_size=13", "method=noise"],
        flags={"synth.method": ("--method", "dmkd"), "synth.seed": ("--seed", None)},
    )
    synth = recipe.synth
    assert (recipe.name, synth.seed, synth.shards, synth.group_size, synth.method) == ("mine", 1, 2, 13, "dmkd")
    assert synth.prior.steps == 11
    assert synth.groups_per_shard == Recipe().synth.groups_per_shard


def test_a_base_lies_below_everything():
    base = mapping_layer({"name": "stored", "distill": {"epochs": 7, "batch_size": 8}}, "recipe in m.parquet")
    recipe = resolve(None, section="distill", base=base, sets=["epochs=9"], environ={})
    assert (recipe.name, recipe.distill.epochs, recipe.distill.batch_size) == ("stored", 9, 8)
    bad = mapping_layer({"distill": {"epoch": 7}}, "recipe in m.parquet")
    assert refusal(None, base=bad).startswith("recipe in m.parquet: distill.epoch: unknown key; did you mean epochs")


def test_resolved_yaml_gives_the_same_recipe_again(tmp_path):
    recipe = resolve("demo", sets=["synth.prompts.subjects=[a, 'b: c']", "distill.where=label == 3"], environ={})
    (tmp_path / "resolved.yaml").write_bytes(to_yaml(recipe))
    assert resolve(str(tmp_path / "resolved.yaml"), environ={}) == recipe
    assert yaml.safe_load(to_yaml(recipe))["distill"]["where"] == "label == 3"


INPUT = "{size: 32, channels: 3, mean: [0, 0, 0], std: [1, 1, 1]}"


def test_a_flag_that_names_a_whole_model_brings_nothing_of_the_files_one(tmp_path):
    (tmp_path / "net2").mkdir()
    told = f"{{name: resnet20, weights: net1.pt, num_classes: 10, input: {INPUT}}}"
    (tmp_path / "mine.yaml").write_text(
        f"synth:\n  teacher: {told}\n  adversary: {told}\n  guidance: {{adversarial: 1}}\n"
    )

    def named(name, *sets):
        flags = {f"synth.{model}.name": (f"--{model}", name) for model in ("teacher", "adversary")}
        recipe = resolve(str(tmp_path / "mine.yaml"), section="synth", sets=sets, flags=flags, environ={})
        return recipe.synth.teacher, recipe.synth.adversary

    for name in (str(tmp_path / "net2"), "embedded:digits", "mine2.yaml", "hf:org/net", "timm:resnet18.a1"):
        assert named(name) == (ModelSettings(name=name), ModelSettings(name=name))
    teacher, adversary = named("embedded:digits", "teacher.weights=mine.pt")
    assert (teacher.weights, teacher.input, adversary.weights) == ("mine.pt", None, None)
    for name in ("resnet20", "timm:resnet18"):  # needs what the file says
        assert [(m.name, m.weights, m.num_classes) for m in named(name)] == [(name, "net1.pt", 10)] * 2
    (tmp_path / "mine.yaml").write_text(
        "synth: {teacher: {name: embedded:digits, stem: native}, guidance: {adversarial: 1}}"
    )
    assert named("embedded:digits")[0].stem == "native"  # the same one


def test_unknown_recipe_name():
    assert "did you mean demo?" in refusal("deom")
    assert "ending in .yaml" in refusal("mine")


def test_recipe_file_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(str(tmp_path / "no.yaml"))
    assert "cannot read" in refusal(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: not valid YAML: 'utf-8' codec can't decode" in refusal(str(tmp_path / "binary.yaml"))


def test_unknown_recipe_key_names_file_line_and_near_match(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nsynth:\n  guidance:\n    step_sice: 0.2\n")
    assert refusal(str(file)) == f"{file}:4: synth.guidance.step_sice: unknown key; did you mean step_size?"


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("guidance.step_sice=1", "unknown key; did you mean step_size?"),
        ("guidance.step_size=-1", "should be greater than or equal to 0, got -1"),
        ("method=magic", "unknown value 'magic'; there are: diffdfkd, dmkd"),
        ("guidance.interval=[0.9, 0.1]", "interval: must satisfy 0 <= start < end <= 1"),
        ("lca.interval=[0.8, 0.2]", "interval: must satisfy 0 <= start < end <= 1"),
        ("seed=9223372036854775808", "should be less than or equal to 9223372036854775807"),
        ("prompts.template={who}", "template may use only"),
        ("prompts.template={subject.__class__}", "template may use only"),
        ("prompts.template={subject:>999999999999}", "template may use only"),
        ("guidance.step_size=.inf", "should be a finite number"),
        ("guidance=5", "synth.guidance"),
        ("teacher.input.size=8", "this key is needed"),
    ],
)
def test_bad_assignment_is_one_line_that_names_it(assignment, part):
    text = refusal("demo", section="synth", sets=[assignment])
    assert part in text
    assert text.startswith(f"--set {assignment}: synth.")


@pytest.mark.parametrize(
    ("sets", "part"),
    [
        (["images.intermediates=20"], "images.intermediates 20: 20 steps have at most 19"),
        (["guidance.interval=[0.01, 0.04]"], "guidance.interval 0.01, 0.04 contains no step of 20"),
        (["lca.every=2", "method=dmkd"], "dmkd mixes no latents: leave lca.every at 0"),
        (["lca.every=12"], "lca.every 12 meets no step of 20 in lca.interval 0, 0.6: lower it"),
        (["images.intermediates=1", "method=noise"], "noise has no intermediate images"),
        (["lca.every=2", "method=dda"], "dda mixes no latents"),
        (["adversary.name=x", "guidance.adversarial=1", "method=dmkd"], "dmkd follows no adversary: leave adversary"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(sets, part):
    assert part in refusal("demo", section="synth", sets=sets)


@given(st.integers(1, 60), st.integers(1, 70))
def test_as_many_intermediates_as_are_stored_are_allowed(steps, count):
    asked = {"prior": {"steps": steps}, "images": {"intermediates": count}}
    if len(intermediate_steps(count, steps) & {*range(steps)}) == count:
        assert SynthSettings.model_validate(asked).images_per_trajectory == count + 1
    else:
        with pytest.raises(ValueError, match="steps have at most"):
            SynthSettings.model_validate(asked)


@pytest.mark.parametrize("key", ["guidance.step_size", "synth.guidance.step_size"])
@pytest.mark.parametrize("section", ["synth", None])
def test_a_key_is_taken_with_and_without_its_section(key, section):
    assert resolve("demo", section=section, sets=[f"{key}=0.3"], environ={}).synth.guidance.step_size == 0.3


def test_what_both_stages_have_needs_its_section_where_a_command_runs_both():
    assert "--set seed=1: seed: unknown key; did you mean synth.seed or distill.seed?" in refusal(
        "demo", sets=["seed=1"]
    )
    assert resolve("demo", section="distill", sets=["seed=1"], environ={}).distill.seed == 1


def test_a_dataset_carries_the_settings_of_stage_2_but_stage_2_reads_no_others():
    assert resolve("demo", section="synth", sets=["distill.epochs=3"], environ={}).distill.epochs == 3
    text = refusal("demo", section="distill", sets=["synth.seed=1"])
    assert text == "--set synth.seed=1: nothing here reads synth; keys start with distill"


@pytest.mark.parametrize(
    ("section", "assignment", "full"),
    [
        ("distill", "lr=0.1", "distill.optimizer.lr"),
        ("synth", "epochs=3", "distill.epochs"),
        ("synth", "cfg_scale=2", "synth.prior.cfg_scale"),
        (None, "step_size=1", "synth.guidance.step_size"),
    ],
)
def test_a_bare_last_part_is_told_its_full_key(section, assignment, full):
    assert f"unknown key; did you mean {full}?" in refusal("demo", section=section, sets=[assignment])


def test_a_recipe_in_python_is_loaded_and_changed_by_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORY_SYNTH__SEED", "7")
    (tmp_path / "mine.yaml").write_text("synth: {seed: 3}")
    recipe = Recipe.load(tmp_path / "mine.yaml", "guidance.step_size=0.3", "distill.seed=4")
    assert (recipe.name, recipe.synth.seed, recipe.synth.guidance.step_size, recipe.distill.seed) == ("mine", 3, 0.3, 4)
    assert recipe.changed("synth.seed=9").synth == recipe.synth.model_copy(update={"seed": 9})
    assert recipe.changed() == recipe
    with pytest.raises(UsageError, match=r"^synth.shards=0: synth.shards: .*greater than 0, got 0$"):
        recipe.changed("synth.shards=0")
