"""SIGKILL of the ``factory`` command at each step of the commit, the same command again, ``factory gc``: nothing lost,
doubled or left over. The long version, with random moments and several workers: ``benchmarks/kill_matrix.py``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from manifests.shard import STEPS
from manifests.storage import Storage
from pipeline.repair import collect
from pipeline.synth import run_synth
from tests.pipeline.conftest import INLINE, SMALL, small_recipe

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "pipeline.cli", "run", "synth", "-c", "demo", "--shards", "3"]


def factory(out, fault):
    sets = [text for setting in SMALL for text in ("--set", setting)]
    environment = {**os.environ, "FACTORY_FAULT": fault, "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, *sets, "--out", str(out)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode


def tree(folder):
    """Every file but those that tell what happened, and the contact sheet of calls that are not quiet."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    told = ("events", "lease/", "sheet.png")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(told)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_synth(small_recipe("shards=3"), str(folder), INLINE, quiet=True)
    return tree(folder)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_it_resumes_without_a_trace(tmp_path, unbroken, step):
    assert factory(tmp_path, f"{step}:1") == -signal.SIGKILL
    assert 0 < len(tree(tmp_path)) < len(unbroken) + 1
    run_synth(small_recipe("shards=3"), str(tmp_path), INLINE, quiet=True)
    collect(Storage(tmp_path))
    assert tree(tmp_path) == unbroken
    keys = pq.read_table(tmp_path / "m.parquet", columns=["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 60
