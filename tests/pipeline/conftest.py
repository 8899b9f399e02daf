"""A small recipe and its finished run, made by the fake worker."""

from pathlib import Path

import pytest

from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import Recipe, resolve
from pipeline.synth import run_synth
from tests.pipeline.fake_worker import FACTORY

INLINE = ExecutorSettings(retry_delay=0)
SMALL = ("method=noise", "groups_per_shard=2", "group_size=10", "images.size=8")


def small_recipe(*sets: str) -> Recipe:
    """Twenty rows a shard, two shards; ``--set`` style changes on top."""
    return resolve("demo", section="synth", sets=[*SMALL, "shards=2", *sets], environ={})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A complete run of two shards."""
    run_synth(small_recipe(), str(tmp_path / "run"), INLINE, worker=FACTORY, quiet=True)
    return tmp_path / "run"
