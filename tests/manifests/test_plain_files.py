"""Files that others wrote: special, large or odd ones end in one error, and YAML means what JSON can say."""

import os

import pytest

from manifests.errors import UsageError
from manifests.plain_files import MAX_SETTINGS, load_yaml, load_yaml_file, read_regular


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: !!timestamp x", "y:1: not valid YAML: tags are not read: leave tag:yaml.org,2002:timestamp out"),
        ("a: !!bool x", "tags are not read"),
        ("a: !!set {b}", "tags are not read"),
        ("a: !!binary aGk=", "tags are not read"),
        ("a: !x b", "tags are not read"),
        ("a: 1\nb: {c: 1, c: 2}", "y:2: not valid YAML: b.c is given twice"),
        ("a: &x [lol]\nb: &y [*x, *x]\nc: [*y, *y]", "y:2: not valid YAML: aliases are not read"),
        ("a: 0x_", "not valid YAML"),
        ("a: 0b_", "not valid YAML"),
        (f"a: {'9' * 5000}", "not valid YAML"),
        ('a: "\\ud83d"', "half of a surrogate pair"),
        ('"\\ud83d": 1', "half of a surrogate pair"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("{a: " * 100_000, "nested more than 32 deep"),
        ("- " * 10_000, "nested more than 32 deep"),
        ("a: b\n---\nc: d", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused_in_one_line(text, part):
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "y")
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_dates_and_merge_keys_are_text():
    assert load_yaml("a: 2020-13-45\nb: {<<: {c: 1}}\nd: =", "y")[0] == {
        "a": "2020-13-45",
        "b": {"<<": {"c": 1}},
        "d": "=",
    }


def test_special_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(3 << 30)
    expected = {"fifo": "no regular file", "zero": "no regular file", "large": f"more than {MAX_SETTINGS} bytes"}
    expected |= {".": "Is a directory", "absent": "No such file", "a\0b": "no name of a file", "\ud83d": "no name"}
    for name, part in expected.items():
        with pytest.raises(UsageError, match=part):
            load_yaml_file(f"{tmp_path}/{name}")
    with (tmp_path / "larger").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(OSError, match="memory"):
        read_regular(tmp_path / "larger")
    (tmp_path / "link").symlink_to("small")
    (tmp_path / "small").write_bytes(b"abc")
    assert read_regular(tmp_path / "link", 3) == b"abc"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_regular(tmp_path / "link", 2)
