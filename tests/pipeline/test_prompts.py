"""Prompts of one's own: for each class, from a file, as ``factory prompts`` lists them."""

import pytest

from manifests.errors import UsageError
from pipeline.layers import mapping_layer
from pipeline.prompts import prompts
from pipeline.recipe import Recipe, recipe_of, resolve
from stages.synth.group import make_group
from stages.synth.inputs import inspect_inputs


def test_what_is_listed_is_what_the_run_asks():
    recipe = Recipe.load("demo", "synth.prompts.classes={three: [two bows, a three]}", "synth.prompts.styles=[thin]")
    listed = prompts(recipe, most=4)
    names = inspect_inputs(recipe.synth).class_names
    asked: dict[int, list[str]] = {label: [] for label in range(len(names))}
    for index in range(6):
        group = make_group(recipe.synth, index, names)
        for label, prompt in zip(group.labels, group.prompts, strict=True):
            asked[label].append(prompt)
    assert {each.label: list(each.first) for each in listed.classes} == {k: v[:4] for k, v in asked.items()}
    three, four = listed.classes[3:5]
    assert three.different == 2 and all("two bows" in p or "a three" in p for p in three.first)
    assert four.different == len(recipe.synth.prompts.subjects) and not any("bows" in p for p in four.first)
    lines = [*listed.lines()]
    assert "3 three: 2 different prompts" in lines and any(three.first[0] in line for line in lines)


def test_an_unknown_class_is_one_line_with_the_nearest_name():
    recipe = Recipe.load("demo", "synth.teacher.class_names=[scratch, dent, a, b, c, d, e, f, g, h]")
    with pytest.raises(UsageError, match="prompts.classes: the teacher has no class 'scrach'; did you mean scratch?"):
        inspect_inputs(recipe.changed("synth.prompts.classes={scrach: [x]}").synth)
    with pytest.raises(UsageError, match="gives no subject for dent"):
        recipe.changed("synth.prompts.classes={dent: []}")


def test_a_file_of_prompts_lies_below_what_the_recipe_says_itself(tmp_path, monkeypatch):
    (tmp_path / "bank.yaml").write_text("subjects: [from file]\nstyles: [s1]\nclasses: {'3': [bows]}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: demo\nsynth: {prompts: {file: bank.yaml, styles: [own]}}\n")
    bank = resolve(str(mine), environ={}).synth.prompts
    assert (bank.subjects, bank.styles, bank.classes) == (("from file",), ("own",), {"3": ("bows",)})
    monkeypatch.chdir(tmp_path)
    bank = resolve("demo", section="synth", sets=["prompts.file=bank.yaml"], environ={}).synth.prompts
    assert bank.subjects == ("from file",) and bank.styles == ("s1",)
    (tmp_path / "bank.yaml").write_text("subject: [x]\n")
    with pytest.raises(UsageError, match=r"bank.yaml:1: synth.prompts.subject: unknown key"):
        resolve(str(mine), environ={})
    with pytest.raises(UsageError, match="cannot read none.yaml"):
        resolve("demo", sets=["synth.prompts.file=none.yaml"], environ={})


def test_a_stored_recipe_can_name_no_file(tmp_path):
    stored = mapping_layer({"synth": {"prompts": {"file": "/etc/hostname"}}}, "a manifest")
    with pytest.raises(UsageError, match="a manifest: synth.prompts.file: unknown key"):
        recipe_of(stored)
