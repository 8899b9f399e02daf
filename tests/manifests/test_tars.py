import io
import tarfile

import pytest
import webdataset

from manifests.errors import DataError
from manifests.schema import MAX_IMAGE
from manifests.storage import Storage
from manifests.tars import TarCheck, TarStream, walk
from tests.manifests.samples import make_image, make_row, write_shard


def make_tar(samples: int = 4) -> bytes:
    file = io.BytesIO()
    tar = TarStream(file)
    for index in range(samples):
        tar.add(f"000001-{index:06d}.png", make_image(1, index))
        tar.add(f"000001-{index:06d}.cls", b"2")
        tar.add(f"000001-{index:06d}.json", b"{}")
    tar.close()
    return file.getvalue()


def test_walking_finds_what_was_written_where_it_lies() -> None:
    data = make_tar()
    samples = [*walk(io.BytesIO(data))]
    assert [sample.key for sample in samples] == [f"000001-{index:06d}" for index in range(4)]
    for index, sample in enumerate(samples):
        assert sample.image == make_image(1, index) == data[sample.offset :][: len(sample.image)]
        assert (sample.label, sample.json) == (b"2", b"{}")


def test_tars_are_standard_and_reproducible(tmp_path: object) -> None:
    assert make_tar() == make_tar()
    with tarfile.open(fileobj=io.BytesIO(make_tar())) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_webdataset_reads_a_shard(tmp_path: object) -> None:
    storage = Storage(str(tmp_path))
    record = write_shard(storage, 1)
    samples = [*webdataset.WebDataset(storage.path(record.tar), shardshuffle=False)]
    assert [sample["png"] for sample in samples] == [make_image(1, index) for index in range(6)]
    assert [int(sample["cls"]) for sample in samples] == [make_row(1, index)["label"] for index in range(6)]


def test_every_truncation_is_noticed() -> None:
    data = make_tar()
    end = max(index for index, byte in enumerate(data) if byte) // 512 * 512 + 512
    for length in [*range(0, end + 1, 256), end + 511]:
        with pytest.raises(DataError, match="^cut short"):
            [*walk(io.BytesIO(data[:length]))]


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"x", link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


PNG, CLS, JSON = (member(f"000001-000000.{extension}") for extension in ("png", "cls", "json"))


@pytest.mark.parametrize(
    "members",
    [
        [member("../../etc/passwd")],
        [member("/etc/passwd")],
        [member("a/000001-000000.png"), JSON],
        [member("000001-000000.png", tarfile.SYMTYPE, b"", "/etc/passwd"), JSON],
        [member("000001-000000.png", tarfile.LNKTYPE, b"", "x"), JSON],
        [member("000001-000000.png", tarfile.DIRTYPE, b""), JSON],
        [member("000001-000000.png", tarfile.FIFOTYPE, b""), JSON],
        [member("000001-000000.png", tarfile.GNUTYPE_SPARSE), JSON],
        [member("000001-000000.png", tarfile.XHDTYPE), JSON],
        [member("x" * 300)],
        [member("000001-000000.pkl"), JSON],
        [member("000001-000000.png.pyd"), JSON],
        [member("000001-0.5.png"), JSON],
        [member("000001-\u0660\u0660\u0660\u0660\u0660\u0660.png"), JSON],
        [PNG],
        [PNG, CLS],
        [PNG, JSON],
        [CLS, PNG, JSON],
        [PNG, JSON, CLS],
        [JSON, CLS, PNG],
        [PNG, PNG],
        [PNG, member("000001-000001.cls"), JSON],
        [PNG, CLS, member("000001-000001.json")],
        [PNG, CLS, JSON, PNG, CLS, JSON],
        [PNG, CLS, JSON, b"\0" * 512, b"hidden".ljust(512, b"\0")],
    ],
)
def test_anything_but_our_own_members_is_refused(members: list[bytes]) -> None:
    data = b"".join(members).ljust(10240, b"\0")
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        [*walk(io.BytesIO(data))]


@pytest.mark.parametrize(("name", "limit"), [("000001-000000.png", MAX_IMAGE), ("000001-000000.cls", 16)])
def test_claimed_sizes_are_bounded_before_reading(name: str, limit: int) -> None:
    info = tarfile.TarInfo(name)
    for size in (limit + 1, 1 << 40):
        info.size = size
        data = (b"" if name.endswith("png") else PNG) + info.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(DataError, match="claims"):
            [*walk(io.BytesIO(data))]


@pytest.mark.timeout(20)
def test_a_terabyte_of_zeros_is_not_read(tmp_path) -> None:
    for data, flaw in ((b"", "more than 1048576 zeros"), (b"x", "damaged tar header")):
        with open(tmp_path / "tar", "wb") as file:
            file.write(data)
            file.truncate(1 << 40)
        with open(tmp_path / "tar", "rb") as file:
            check = TarCheck(file, 1, expected=10240)
            assert [flaw in str(sample.flaw) for sample in check] == [True]
            assert check.bytes < 2 << 20


def test_bytes_hidden_in_padding_are_noticed() -> None:
    data = bytearray(make_tar())
    data[512 + 511] = 1
    with pytest.raises(DataError, match="padding"):
        [*walk(io.BytesIO(bytes(data)))]
