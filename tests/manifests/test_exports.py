"""What ``import manifests`` offers, and that it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import manifests
from manifests import lazy_exports


def test_every_exported_name_can_be_loaded() -> None:
    assert {"Manifest", "ShardWriter", "verify", "DataError", "UsageError"} <= set(manifests.__all__)
    assert dir(manifests) == manifests.__all__
    for name in manifests.__all__:
        assert getattr(manifests, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'manifests' has no attribute 'nothing'"):
        _ = manifests.nothing


def test_importing_the_package_or_its_errors_loads_no_library() -> None:
    code = "import manifests, sys; manifests.DataError; print({'pyarrow', 'numpy', 'torch'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_the_helper_serves_other_packages() -> None:
    load, names, every = lazy_exports("somewhere", {"sqrt": "math", "Path": "pathlib"})
    assert names() == every == ["Path", "sqrt"]
    assert load("sqrt")(9.0) == 3.0 and load("Path") is Path
