"""Nothing is read, written, listed or deleted through a link or special file below the root, whatever the operation."""

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests.errors import DataError, LinkError
from manifests.local import temporary_name
from manifests.shard import ShardWriter
from manifests.storage import Storage
from tests.pipeline.fake_worker import image, row


def put(storage: Storage, name: str) -> None:
    local = Path(storage.url).parent / "finished"
    local.write_bytes(b"new")
    storage.put_file(local, name)


OPERATIONS: dict[str, Callable[[Storage, str], object]] = {
    "exists": Storage.exists,
    "size": Storage.size,
    "read": Storage.read,
    "read_range": lambda storage, name: storage.read_range(name, 0, 1),
    "read_many": lambda storage, name: [*storage.read_many([name])],
    "open": Storage.open,
    "write": lambda storage, name: storage.write(name, b"new"),
    "write beside": lambda storage, name: storage.write(name, b"new", beside=True),
    "append": lambda storage, name: storage.append(name, b"new"),
    "create": lambda storage, name: storage.create(name, b"new"),
    "put_file": put,
    "delete": Storage.delete,
    "list": Storage.list,
    "folder": Storage.folder,
}


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link to a file": lambda path, victim: path.symlink_to(victim / ".bashrc"),
    "link to a folder": lambda path, victim: path.symlink_to(victim),
    "dangling link": lambda path, victim: path.symlink_to(victim / "nowhere"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "FIFO": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: make_socket(path),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    (folder / "inner").mkdir(parents=True)
    (folder / ".bashrc").write_text("x")
    (folder / "inner/0.json").write_text("y")
    return folder


def state(folder: Path) -> dict[str, object]:
    """Every entry below ``folder``, with what it is and holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_refuses_every_kind_of_link(tmp_path: Path, victim: Path, operation: str, kind: str) -> None:
    """In the place of the file, of its folder, and of a folder above that."""
    root = tmp_path / "root"
    for at, name in (("x", "x"), ("a/x", "a/x"), ("x", "x/.bashrc"), ("x", "x/inner/0.json"), ("a/x", "a/x/inner/y")):
        shutil.rmtree(root, ignore_errors=True)
        (root / "a").mkdir(parents=True)
        KINDS[kind](root / at, victim)
        before = state(victim), state(root)
        with pytest.raises(LinkError) as refused:
            OPERATIONS[operation](Storage(root), name)
        assert str(refused.value).startswith(f"{root}/{at}: is a ") and "\n" not in str(refused.value)
        assert refused.value.exit_code == 3
        after = state(root)
        assert not after.pop("tmp", None) or not [*(root / "tmp").iterdir()]
        assert (state(victim), after) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_listing_names_a_link_in_it(tmp_path: Path, victim: Path, kind: str) -> None:
    (tmp_path / "root/done").mkdir(parents=True)
    KINDS[kind](tmp_path / "root/done/000000.json", victim)
    with pytest.raises(LinkError, match=r"done/000000\.json: is a "):
        Storage(tmp_path / "root").list("done")


@pytest.mark.parametrize("kind", KINDS)
def test_temporary_files_go_through_no_link(tmp_path: Path, victim: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    KINDS[kind](root / "tmp", victim)
    storage = Storage(root)
    for call in (
        storage.scratch,
        storage.temporary,
        lambda: storage.drop_temporary("inner"),
        lambda: storage.write("a", b"new"),
        lambda: storage.create("a", b"new"),
        lambda: ShardWriter(storage, 0, "f" * 64),
    ):
        before = state(victim)
        with pytest.raises(LinkError, match=r"root/tmp: is a "):
            call()
        assert state(victim) == before and not storage.exists("a")


def test_a_temporary_folder_goes_without_what_its_links_point_to(tmp_path: Path, victim: Path) -> None:
    storage = Storage(tmp_path / "root")
    inner = storage.scratch() / "rebuild-abcd_123"
    inner.mkdir()
    (inner / "0.parquet").write_bytes(b"123")
    (inner / "link").symlink_to(victim)
    link = storage.scratch() / temporary_name("write")
    link.symlink_to(victim / ".bashrc")
    (storage.scratch() / "thesis.tex").write_text("mine")
    before = state(victim)
    own, foreign = storage.temporary()
    assert [*own] == ["rebuild-abcd_123"] and foreign == ["thesis.tex", link.name]
    storage.drop_temporary("rebuild-abcd_123")
    with pytest.raises(LinkError):
        storage.drop_temporary(link.name)
    assert state(victim) == before and sorted(storage.temporary()[1]) == foreign and not storage.temporary()[0]


def test_a_shard_is_not_published_through_a_link(tmp_path: Path, victim: Path) -> None:
    """Nor does the line blame the shard: whoever runs it stops."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/shards").symlink_to(victim)
    before = state(victim)
    with ShardWriter(Storage(tmp_path / "root"), 0, "f" * 64) as writer:
        writer.add(row(0, 0), image(0, 0))
        with pytest.raises(LinkError, match="root/shards: is a symbolic link") as refused:
            writer.commit()
    assert refused.value.stops_run and state(victim) == before


def test_the_root_may_be_a_link_and_folders_above_it(tmp_path: Path) -> None:
    (tmp_path / "real/run").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("real")
    (tmp_path / "run").symlink_to("runs/run")
    storage = Storage(tmp_path / "run")
    storage.write("shards/a.tar", b"1")
    assert storage.create("done/a", b"2") and storage.append("events.jsonl", b"3")
    assert Storage(tmp_path / "runs/run").read("shards/a.tar") == b"1"


def test_an_append_reaches_no_other_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("x\n")
    (tmp_path / "root").mkdir()
    os.link(tmp_path / ".bashrc", tmp_path / "root/events.jsonl")
    storage = Storage(tmp_path / "root")
    for line in (b"a\n", b"b\n"):
        assert storage.append("events.jsonl", line)
    assert storage.read("events.jsonl") == b"x\na\nb\n"
    assert (tmp_path / ".bashrc").read_text() == "x\n"


def test_nothing_is_appended_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    assert not Storage(tmp_path / "root").append("events.jsonl", b"x")
    assert not (tmp_path / "root").exists()


def test_a_folder_in_the_place_of_a_file_is_still_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").mkdir()
    for operation in ("read", "open", "write", "write beside", "append"):
        with pytest.raises(DataError, match=r"m\.parquet: is a folder, expected a file"):
            OPERATIONS[operation](Storage(tmp_path), "m.parquet")
