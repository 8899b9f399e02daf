"""A run folder with links in it, as it may come from somebody else: no command writes or deletes through them."""

import shutil
import sys
from pathlib import Path

import pytest

from manifests.errors import LinkError
from manifests.integrity import rebuild
from manifests.local import temporary_name
from manifests.reader import Manifest
from manifests.shard import done_records
from manifests.storage import Storage
from pipeline import cli
from pipeline.events import EventLog
from pipeline.lease import Lease, current
from pipeline.outputs import default_folder
from pipeline.repair import collect
from pipeline.synth import run_synth
from tests.distill.drawn import write_dataset
from tests.pipeline.conftest import INLINE, small_recipe
from tests.pipeline.fake_worker import FACTORY


@pytest.fixture
def victim(tmp_path):
    """A folder of the user's, with a file of every name that a command writes or deletes somewhere."""
    folder = tmp_path / "victim"
    (folder / "inner").mkdir(parents=True)
    for name in (
        *(".bashrc", "README.md", "inner/f", "model.safetensors", "000000.json", "results.json", "resolved.yaml"),
        *("000000-0123456789ab.tar", temporary_name("write"), temporary_name("000000", ".tar")),
    ):
        (folder / name).write_text(f"mine: {name}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def link(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def factory(monkeypatch, capsys, *arguments):
    """(exit code, lines on stdout, lines on stderr)"""
    monkeypatch.setattr(sys, "argv", ["factory", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("place", ["tmp", "shards", "lease", "done", "failed"])
def test_gc_empties_no_folder_that_a_link_names(run_folder, victim, place, monkeypatch, capsys):
    link(run_folder / place, victim)
    before = contents(victim)
    code, _, (line,) = factory(monkeypatch, capsys, "gc", run_folder)
    assert code == 3 and line.startswith(f"{run_folder}/{place}: is a symbolic link")
    assert contents(victim) == before


def test_gc_deletes_names_of_this_program_alone_and_says_what_it_left(run_folder, victim, monkeypatch, capsys):
    storage = Storage(run_folder)
    mine = ["shards/.bashrc", "shards/000001-0123456789ab.tar.bak", "shards/thesis.tex", "tmp/half.tar", "tmp/write-01"]
    own = ["shards/000001-0123456789ab.tar", f"tmp/{temporary_name('merge', '.parquet')}"]
    for name in (*mine, *own, "tmp/folder/file"):
        storage.write(name, b"12")
    link(run_folder / "tmp/x", victim)
    link(run_folder / "tmp" / (linked := temporary_name("write")), victim)
    before = contents(victim)
    found = collect(storage)
    assert found.foreign == sorted([*mine, "tmp/folder", f"tmp/{linked}", "tmp/x"])
    assert (found.orphans, found.temporary, found.bytes) == ([own[0]], [own[1].removeprefix("tmp/")], 4)
    assert all(storage.exists(name) for name in (*mine, "tmp/folder/file")) and contents(victim) == before
    assert not any(storage.exists(name) for name in own)
    code, lines, _ = factory(monkeypatch, capsys, "gc", run_folder)
    assert code == 0 and "left alone, not made by this program: tmp/x" in lines


def test_a_lease_reads_and_deletes_its_records_alone(tmp_path):
    storage = Storage(tmp_path)
    with Lease(storage):
        pass
    others = [f"lease/{name}" for name in (".bashrc", "000000", "000000.json.bak", "0000000.json", "notes.json", "x")]
    for name in others:
        storage.write(name, b"{}")
    with Lease(storage):
        assert current(storage)[0] == 2
    assert storage.list("lease") == sorted([*others, "lease/000002.json"])


@pytest.mark.parametrize("target", [".bashrc", "nowhere", "inner"])
def test_events_are_not_appended_through_a_link(tmp_path, victim, target):
    link(tmp_path / "run/events.jsonl", victim / target)
    before = contents(victim)
    with pytest.raises(LinkError, match=r"run/events\.jsonl: is a symbolic link"):
        EventLog(Storage(tmp_path / "run"))
    assert contents(victim) == before


def test_a_contact_sheet_is_not_written_through_a_link(run_folder, victim, monkeypatch, capsys):
    monkeypatch.chdir(run_folder.parent)
    place = run_folder.parent / default_folder(Manifest.open(run_folder), "demo")
    link(place / "sheet.png", victim / "README.md")
    before = contents(victim)
    code, lines, (note, *_) = factory(monkeypatch, capsys, "inspect", run_folder / "m.parquet")
    assert code == 0 and "40 rows" in lines[0]
    assert note.startswith(f"no contact sheet: {place}/sheet.png: is a symbolic link")
    assert note.endswith("--sheet FILE puts it elsewhere") and contents(victim) == before


PLACES = [
    ("distill/lease", "."),
    ("distill/tmp", "."),
    ("distill/events.jsonl", ".bashrc"),
    ("distill/events.jsonl", "nowhere"),
    ("distill/run.json", "README.md"),
    ("distill/resolved.yaml", "README.md"),
    ("distill/digits-cnn-small", "."),
    ("distill/teacher-cache", "."),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Path(write_dataset(tmp_path_factory.mktemp("drawn") / "data")).parent


@pytest.mark.parametrize(("place", "target"), PLACES)
def test_stage_2_writes_through_no_link(dataset, tmp_path, victim, place, target, monkeypatch, capsys):
    folder = shutil.copytree(dataset, tmp_path / "data")
    link(folder / place, victim / target)
    before = contents(victim)
    sets = (
        "teacher_cache.enabled=true",
        "augment.num_views=1",
        "augment.cutmix=0",
        "augment.mixup=0",
        "min_agreement=0",
        "epochs=1",
    )
    data = ("-m", folder / "m.parquet", "-o", folder / "distill")
    options = (text for setting in sets for text in ("--set", setting))
    code, _, lines = factory(monkeypatch, capsys, "run", "distill", *data, *options)
    assert code == 3 and lines[-1].startswith(f"{folder}/{place}: is a symbolic link"), lines
    assert contents(victim) == before


def test_rebuild_keeps_done_records_where_a_link_is_in_its_way(run_folder, victim):
    link(run_folder / "tmp", victim)
    before = contents(run_folder / "done"), contents(victim)
    with pytest.raises(LinkError, match="tmp: is a symbolic link"):
        rebuild(Storage(run_folder))
    assert (contents(run_folder / "done"), contents(victim)) == before and len(done_records(Storage(run_folder))) == 2


def test_stage_1_stops_at_a_link_before_its_first_shard(run_folder, victim):
    link(run_folder / "shards", victim)
    before = contents(victim)
    (run_folder / "done/000001.json").unlink()
    with pytest.raises(LinkError, match=r"run/shards: is a symbolic link"):
        run_synth(small_recipe(), str(run_folder), INLINE, worker=FACTORY, quiet=True)
    assert contents(victim) == before and not (run_folder / "failed").exists()
