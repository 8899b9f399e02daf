"""Full and read-only disks: one line, the right exit code, nothing half-written; with room again the same command goes
on. Real file systems of a few hundred kB, where this process may mount one."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from manifests.errors import StoreError
from manifests.integrity import verify
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import done_records
from manifests.storage import Storage
from pipeline import cli
from pipeline.synth import run_synth
from tests.pipeline.conftest import INLINE, SMALL, small_recipe

ROOT = Path(__file__).parents[2]


class Disk:
    """A tmpfs at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    try:
        disk.mount("size=300k")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield disk
    subprocess.run(["umount", "-l", folder], check=True)


def factory(*arguments):
    """(exit code, lines on stderr that are not progress)"""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("synth: ")]


def synth(out):
    sets = [text for setting in (*SMALL, "images.size=48") for text in ("--set", setting)]
    return factory("run", "synth", "-c", "demo", "--shards", 4, *sets, "--out", out)


def test_a_full_disk_stops_stage_1_and_the_same_command_resumes(disk, tmp_path):
    out = disk.path / "run"
    code, lines = synth(out)
    assert code == 1
    assert lines[-1].startswith("shard 00000") and "resumes" in lines[-1]
    assert f"{out}/tmp: cannot write: No space left on device" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    done = done_records(Storage(out))
    assert 0 < len(done) < 4 and not [*(out / "tmp").iterdir()]
    assert not (out / "m.parquet").exists() and not (out / "failed").exists()
    assert {problem.where for problem in verify(str(out))} <= {"plan.json", "m.parquet"}  # missing, but nothing damaged
    disk.remount("size=20m")
    assert synth(out)[0] == 0
    synth(tmp_path / "whole")
    assert Manifest.open(out, verify=True).digest == Manifest.open(tmp_path / "whole").digest


def test_a_disk_too_full_for_the_manifest_says_where(disk):
    out = disk.path / "run"
    run_synth(small_recipe(), str(out), INLINE, quiet=True)
    before = Manifest.open(out)
    with suppress(OSError), open(disk.path / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    with pytest.raises(StoreError, match=f"^{out}/tmp: cannot write: .*No space left on device"):
        merge(Storage(out), before.info)
    assert not [*(out / "tmp").iterdir()] and Manifest.open(out).digest == before.digest


def test_a_disk_too_full_for_the_first_note_says_so(disk):
    (disk.path / "ballast").write_bytes(b"x" * 290_000)
    with suppress(OSError), open(disk.path / "more", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    code, lines = synth(disk.path / "run")
    assert code == 1 and len(lines) == 1
    assert "plan.json: cannot write: No space left on device" in lines[0]


def test_a_read_only_disk_is_named(disk, monkeypatch, capsys):
    out = disk.path / "run"
    run_synth(small_recipe(), str(out), INLINE, quiet=True)
    disk.remount("ro")
    for arguments in (
        ("run", "synth", "-c", "demo", "--shards", 3, *(t for s in SMALL for t in ("--set", s)), "--out", out),
        ("run", "synth", "--method", "noise", "--out", disk.path / "new"),
        ("gc", out),
        ("run", "distill", "-m", out / "m.parquet", "-o", out / "distill", "--teacher", "embedded:digits"),
    ):
        monkeypatch.setattr(sys, "argv", ["factory", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "Read-only file system" in line
    assert verify(str(out)) == []


def test_a_full_disk_leaves_the_last_checkpoint_usable(disk, tmp_path):
    """Stage 2 checkpoints every step onto a disk with room for one checkpoint, not for the next beside it."""
    from stages.distill import checkpoint
    from stages.distill.run import run_distill
    from tests.distill.drawn import write_dataset
    from tests.distill.short import settings, weights

    data = write_dataset(tmp_path / "data")
    asked = settings(checkpoint_seconds=0)
    run_distill(asked, [(data, 1.0)], str(tmp_path / "whole"))
    size = (tmp_path / "whole" / checkpoint.STATE).stat().st_size
    disk.remount(f"size={int(1.5 * size)}")
    out = Storage(disk.path / "run")
    with pytest.raises(StoreError, match=r"checkpoint\.pt: cannot write: No space left on device"):
        run_distill(asked, [(data, 1.0)], out)
    assert (disk.path / "run" / checkpoint.STATE).stat().st_size > 0.9 * size
    assert not [*(disk.path / "run/tmp").iterdir()]
    disk.remount("size=50m")
    run_distill(asked, [(data, 1.0)], out)
    assert weights(disk.path / "run") == weights(tmp_path / "whole")
