"""The golden script itself: what differs from run to run is passed over, every other difference is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import golden

ROOT = Path(__file__).resolve().parents[2]


def test_paths_times_and_progress_are_passed_over(tmp_path):
    run = golden.Run(ROOT, tmp_path / "frozen", tmp_path / "case")
    text = f"synth: 1/4, 3 s left\nwrote {tmp_path}/case/run in 1 min 05 s\nsynth: 4/4, 12 images\n"
    assert run.text(text) == "wrote <case>/run in <duration>\nsynth: 4/4, 12 images\n"
    assert run.values({"rows": 3, "seconds": 1.5, "checksum": "ab"}) == {
        "rows": 3, "seconds": "<seconds>", "checksum": "<checksum>",
    }  # fmt: skip
    assert run.values({"rows": 3, "checksum": "ab"}) == {"rows": 3, "checksum": "ab"}


def test_every_difference_is_printed(tmp_path, capsys):
    one = {"a": {"x": {"sha256": "1"}, "text": "p\nq\n", "rows": [1, 2]}, "b": {}}
    two = {"a": {"x": {"sha256": "2"}, "text": "p\nr\n", "rows": [1, 2, 3]}, "c": {}}
    for name, record in (("one", one), ("two", two)):
        (tmp_path / name).write_text(json.dumps(record))
    assert golden.compare(tmp_path / "one", tmp_path / "one", 9) == 0
    capsys.readouterr()
    assert golden.compare(tmp_path / "one", tmp_path / "two") == 1
    out = capsys.readouterr().out
    for part in ("x › sha256: '1' | '2'", "-q", "+r", "rows › 2: only in the second", "one: b\n", "two: c\n"):
        assert part in out, part
    assert out.index("rows › 2") < out.index("x › sha256")  # what a checksum is of comes first
    golden.compare(tmp_path / "one", tmp_path / "two", leaves=["rows"])
    assert "sha256" not in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_one_case_twice_is_the_same(tmp_path):
    """End to end, with the fork and the frozen folder, which is made by hand: this case needs nothing of it."""
    (tmp_path / "golden-frozen").mkdir()
    for name in ("one", "two"):
        command = [sys.executable, ROOT / "benchmarks/golden.py", tmp_path / name, "--only", "synth/method/noise"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert golden.compare(tmp_path / "one", tmp_path / "two", 9) == 0
    record = json.loads((tmp_path / "one").read_text())["synth/method/noise"]
    assert record["synth run"]["code"] == 0
    assert {"m.parquet", "plan.json", "shards/000001.tar"} <= record["files run"].keys()
