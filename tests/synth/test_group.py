"""Groups and prompts: balanced, deterministic, independent of how many shards there are."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.settings import PromptSettings, SynthSettings
from stages.synth.group import group_labels, make_group, prompt_for


@given(st.integers(0, 50), st.integers(2, 60), st.integers(2, 40))
def test_two_trajectories_per_class(index, size, classes):
    counts = Counter(group_labels(index, size, classes))
    assert sum(counts.values()) == size and min(counts.values()) >= 2
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.integers(2, 60), st.integers(2, 40))
def test_a_run_is_balanced_over_classes(size, classes):
    counts = Counter(label for g in range(classes) for label in group_labels(g, size, classes))
    assert counts == dict.fromkeys(range(classes), size)


def test_a_group_is_a_pure_function_of_the_plan():
    names = ("zero", "one", "two")
    small, large = SynthSettings(shards=2, group_size=6), SynthSettings(shards=64, group_size=6)
    assert make_group(small, 5, names) == make_group(large, 5, names)
    assert make_group(small, 5, names).trajectories == tuple(range(30, 36))
    noise = make_group(small, 5, names).noise(0, (4, 2, 2))
    assert noise.shape == (6, 4, 2, 2) and len({tuple(n.flatten().tolist()) for n in noise}) == 6


def test_prompts_named_and_unnamed():
    bank = PromptSettings(template="{style}: {subject}", subjects=("a", "b"), styles=("x", "y"))
    drawn = Counter(prompt_for(bank, "cat", 0, t) for t in range(400))
    assert set(drawn) == {"x: a", "x: b", "y: a", "y: b"} and min(drawn.values()) > 60
    named = bank.model_copy(update={"class_names": True})
    assert {prompt_for(named, "cat", 0, t) for t in range(40)} == {"x: cat", "y: cat"}
    style = lambda settings: [prompt_for(settings, "cat", 0, t)[0] for t in range(40)]  # noqa: E731
    assert style(bank) == style(named)


def test_prompts_of_classes_and_several_templates():
    bank = PromptSettings(template="{style}: {subject}", subjects=("a", "b"), styles=("x", "y"))
    mine = bank.model_copy(update={"classes": {"cat": ("tabby", "tiger")}})
    assert {prompt_for(mine, "cat", 0, t)[3:] for t in range(40)} == {"tabby", "tiger"}
    assert [prompt_for(mine, "dog", 0, t) for t in range(40)] == [prompt_for(bank, "dog", 0, t) for t in range(40)]
    several = bank.model_copy(update={"templates": ("{style}: {subject}", "{style}; {subject}")})
    drawn = Counter(prompt_for(several, "dog", 0, t) for t in range(400))
    assert len(drawn) == 8 and min(drawn.values()) > 25
    assert [p.replace(";", ":") for p in (prompt_for(several, "dog", 0, t) for t in range(40))] == [
        prompt_for(bank, "dog", 0, t) for t in range(40)
    ]
