"""Every block of docs/interop.md runs, with the libraries that are installed."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/interop.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LIBRARIES = re.compile(r"^(?:from|import) (datasets|duckdb|timm|webdataset|transformers)\b", re.M)

IMPLIED = {"load_dataset": "datasets", "timm:": "timm", "folder": "timm", "mine.": "duckdb", "int8": "onnxruntime"}
"""What a block needs because it uses what an earlier one made."""


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    absent = set[str]()
    for block in BLOCKS:
        needs = set(LIBRARIES.findall(block))
        needs |= {library for word, library in IMPLIED.items() if word in block}
        if missing := {library for library in needs if find_spec(library) is None}:
            absent |= missing
            continue
        exec(compile(block, "docs/interop.md", "exec"), names)
    if absent:
        pytest.skip(f"the blocks of {', '.join(sorted(absent))} did not run: not installed")


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5
