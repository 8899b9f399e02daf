"""Settings in layers: precedence, and errors that name key, place and near matches in one line."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from pipeline.layers import EMPTY, env_layer, flag_layer, mapping_layer, set_layer, validate, yaml_layer
from stages.settings import Settings


class Inner(Settings):
    scale: float = 0.1
    kind: str = "a"
    where: str | None = "x"
    names: tuple[str, ...] = ()


class Outer(Settings):
    inner: Inner = Inner()
    optional: Inner | None = None
    seed: int = 0


class Root(Settings):
    one: Outer = Outer()
    two: Outer = Outer()


class Choices(Settings):
    channels: Literal[1, 3] | None = 3
    kind: Literal["1", "x"] = "x"


class Needy(Settings):
    mean: float
    size: int = 8


class HasNeedy(Outer):
    needy: Needy | None = None


class Needing(Settings):
    one: HasNeedy = HasNeedy()


def message(call) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_later_layers_win_and_leave_the_rest():
    file = yaml_layer("one: {seed: 1, inner: {scale: 0.5, kind: b}}", "r.yaml")
    env = env_layer({"FACTORY_ONE__INNER__SCALE": "0.6", "PATH": "/bin"}, Root, ("one",))
    sets = set_layer(["seed=3"], Root, "one")
    flags = flag_layer({"one.seed": ("--seed", 4), "one.inner.kind": ("--kind", None)})
    found = validate(Root, flags.over(sets.over(env.over(file))))
    assert (found.one.seed, found.one.inner.scale, found.one.inner.kind) == (4, 0.6, "b")
    assert found.two == Outer()


def test_choices_among_numbers_are_numbers_among_texts_texts():
    found = validate(Choices, set_layer(["channels=1", "kind=1"], Choices, None))
    assert (found.channels, found.kind) == (1, "1")
    text = message(lambda: validate(Choices, set_layer(["channels=2"], Choices, None)))
    assert text == "--set channels=2: channels: input should be 1 or 3, got 2"


def test_unknown_key_names_line_and_near_match():
    layer = yaml_layer("one:\n  inner:\n    scael: 1\n", "my.yaml")
    text = message(lambda: validate(Root, layer))
    assert text == "my.yaml:3: one.inner.scael: unknown key; did you mean scale?"


def test_unknown_key_without_a_near_match_lists_what_exists():
    assert message(lambda: validate(Root, yaml_layer("zzz: 1", "r"))) == "r:1: zzz: unknown key; there are: one, two"


def test_unknown_set_key_and_bad_value_name_the_flag():
    assert message(lambda: validate(Root, set_layer(["inner.scal=1"], Root, "one"))).startswith(
        "--set inner.scal=1: one.inner.scal: unknown key; did you mean scale"
    )
    text = message(lambda: validate(Root, set_layer(["seed=two"], Root, "one")))
    assert text.startswith("--set seed=two: one.seed: ") and "integer" in text and "'two'" in text


def test_a_setting_of_another_layer_is_blamed_on_that_layer():
    layer = set_layer(["seed=x"], Root, "two").over(yaml_layer("one: {seed: 1}", "fine.yaml"))
    assert message(lambda: validate(Root, layer)).startswith("--set seed=x: two.seed")


def test_a_missing_key_is_blamed_on_what_last_set_its_neighbours():
    stored = mapping_layer({"one": {"optional": None, "needy": None}}, "stored")
    layer = set_layer(["needy.size=28"], Needing, "one").over(stored)
    assert message(lambda: validate(Needing, layer)) == "--set needy.size=28: one.needy.mean: this key is needed"
    layer = yaml_layer("one:\n  needy: {}\n", "r.yaml").over(stored)
    assert message(lambda: validate(Needing, layer)) == "r.yaml:2: one.needy.mean: this key is needed"


def test_several_problems_are_counted():
    assert message(lambda: validate(Root, yaml_layer("a: 1\nb: 2\n", "r"))).endswith("(and 1 more)")


@pytest.mark.parametrize("text", ["novalue", "=3", " =3"])
def test_set_needs_key_and_value(text):
    assert "KEY=VALUE" in message(lambda: set_layer([text], Root, "one"))


def test_text_fields_take_what_is_written():
    sets = ["inner.kind=a: {b}", "inner.where=null", "inner.names=[x, y]", "inner.scale=1e-4"]
    inner = validate(Root, set_layer(sets, Root, "one")).one.inner
    assert inner == Inner(kind="a: {b}", where=None, names=("x", "y"), scale=1e-4)
    assert validate(Root, set_layer(["inner.kind=007"], Root, "one")).one.inner.kind == "007"


def test_set_reaches_into_optional_settings():
    assert validate(Root, set_layer(["optional.kind=12"], Root, "one")).one.optional == Inner(kind="12")


def test_environment_of_another_section_is_ignored_and_of_none_refused():
    assert env_layer({"FACTORY_TWO__SEED": "1", "FACTORY_WORKERS": "3"}, Root, ("one",)) == EMPTY
    assert "FACTORY_ONE__" in message(lambda: env_layer({"FACTORY_OEN__SEED": "1"}, Root, ("one",)))
    text = message(lambda: validate(Root, env_layer({"FACTORY_ONE__SEDE": "1"}, Root, ("one",))))
    assert text == "environment FACTORY_ONE__SEDE: one.sede: unknown key; did you mean seed?"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "r.yaml:1: not valid YAML"),
        ("- a\n- b", "found a list"),
        ("one: {seed: 1}\none: {seed: 2}", "r.yaml:2: not valid YAML: one is given twice"),
        ("one: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: &a [1]\none: [*a, *a, *a]", "r.yaml:2: not valid YAML: aliases are not read"),
        ("one: &a {seed: *a}", "aliases are not read: write out what *a stands for"),
        ("[" * 5000 + "]" * 5000, "nested more than 32 deep"),
    ],
)
def test_yaml_that_is_no_recipe(text, part):
    assert part in message(lambda: yaml_layer(text, "r.yaml"))


def test_an_empty_file_sets_nothing():
    assert yaml_layer("# nothing\n", "r") == EMPTY


values = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@given(mappings, mappings)
def test_what_a_layer_sets_shows_and_what_it_leaves_stays(lower, upper):
    def leaves(tree, path=()):
        if isinstance(tree, dict):
            return {k: v for key, inner in tree.items() for k, v in leaves(inner, (*path, key)).items()}
        return {path: tree}

    merged = mapping_layer(upper, "").over(mapping_layer(lower, "")).values
    found, top = leaves(merged), leaves(upper)
    assert all(found[path] == value for path, value in top.items())
    assert mapping_layer(merged, "").over(mapping_layer(merged, "")).values == merged
    assert set(found) <= set(top) | set(leaves(lower))
