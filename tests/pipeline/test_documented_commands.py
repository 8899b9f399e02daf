"""Every ``factory …`` command that the documentation and the container files show is one that the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from pipeline.cli import app
from pipeline.layers import dotted_keys
from pipeline.recipe import SECTIONS, Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTAINERS = [path for path in sorted((ROOT / "docker").rglob("*")) if path.is_file()]
KEYS = {*dotted_keys(Recipe)}


def shown() -> Iterator[tuple[str, str]]:
    """(file, command) of code blocks and code in a line of text; in container files of commands and comments."""
    for path in PAGES:
        text = path.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        yield from ((path.name, line.strip()) for line in lines if re.match(r"\s*(\.venv/bin/)?factory [a-z]", line))
    commands = typer.main.get_command(app).commands
    groups = [commands, *(command.commands for command in commands.values() if isinstance(command, click.Group))]
    examples = {name: command.epilog for group in groups for name, command in group.items()}
    yield from ((f"help of {name}", str(line).removeprefix("Example: ")) for name, line in examples.items() if line)
    assert {name for name, line in examples.items() if not line} == {"run", "export"}, (
        "every help screen has an example"
    )
    names = "|".join(commands)
    for path in CONTAINERS:
        text = re.sub(r"\\\n#?", " ", path.read_text())
        yield from ((path.name, found) for found in re.findall(rf"\bfactory (?:{names})\b[^\n\"]*", text))


@pytest.mark.parametrize(("file", "line"), sorted({*shown()}))
def test_it_parses(file, line):
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    words = [word for word in words if word != "…"]
    command, name = typer.main.get_command(app), "factory"
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, line
        name, command = words[0], command.commands[words.pop(0)]
    try:
        command.make_context(name, [*words], resilient_parsing=False)
    except click.MissingParameter:  # a command that is only spoken of
        assert not [word for word in words if not word.startswith("--")], line
    except click.exceptions.NoArgsIsHelpError:
        assert not words


@pytest.mark.parametrize("path", [*PAGES, *CONTAINERS], ids=lambda path: path.name)
def test_settings_that_are_set_exist(path):
    for key in re.findall(r"--set ([\w.]+)=", path.read_text()):
        assert {key, *(f"{section}.{key}" for section in SECTIONS)} & KEYS, f"--set {key}"


def test_there_are_commands_to_check():
    assert len({*shown()}) > 20
    assert {"README.md", "compose.yaml", "synth.yaml", "distill.yaml"} <= {file for file, _ in shown()}
