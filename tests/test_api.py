"""The public names: lazy, typed alike, and every block of docs/api.md runs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dfkd_factory

ROOT = Path(__file__).parents[1]


def test_importing_them_loads_neither_torch_nor_pyarrow():
    code = (
        "import sys, dfkd_factory, pipeline, manifests, stages; dir(dfkd_factory);"
        "assert not {'torch', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", dfkd_factory.__all__)
def test_every_name_is_there_and_described(name):
    assert getattr(dfkd_factory, name).__doc__
    assert name in dir(dfkd_factory)


def test_type_checkers_see_the_same_names_from_the_same_places():
    tree = ast.parse(Path(dfkd_factory.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == dfkd_factory.MODULES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'run_synthesis'"):
        dfkd_factory.run_synthesis  # noqa: B018
    with pytest.raises(ImportError):
        from dfkd_factory import nothing  # noqa: F401


def test_the_wheel_holds_the_package_and_its_marker():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "dfkd_factory" in tool["setuptools"]["packages"]["find"]["include"]
    assert tool["setuptools"]["package-data"]["dfkd_factory"] == ["py.typed"]
    assert "dfkd_factory" in tool["mypy"]["packages"]
    assert (ROOT / "dfkd_factory/py.typed").exists()


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
