import hashlib
import json
from typing import Any

import pytest

from manifests.dataset import DatasetInfo, TarInfo, file_name
from manifests.errors import DataError
from tests.manifests.samples import INFO

SHA = "0123456789ab" + "c" * 52
TARS = (TarInfo(0, f"shards/000000-{SHA[:12]}.tar", SHA, 20480, 6), TarInfo(3, file_name(3, SHA, "tar"), SHA, 512, 0))


def test_it_survives_the_trip_through_metadata() -> None:
    full = INFO.with_tars(TARS)
    assert DatasetInfo.from_metadata(full.to_metadata(), "m.parquet") == full
    assert full.rows == 6
    assert full.to_metadata() == full.to_metadata()


def damaged(change: dict[str, Any]) -> dict[bytes, bytes]:
    """Metadata whose description was changed by someone who also fixed its checksum."""
    metadata = INFO.with_tars(TARS).to_metadata()
    text = json.dumps({**json.loads(metadata[b"factory.info"]), **change}).encode()
    return {**metadata, b"factory.info": text, b"factory.info_sha256": hashlib.sha256(text).hexdigest().encode()}


@pytest.mark.parametrize(
    "change",
    [
        {"tars": [[0, SHA, 1]]},
        {"tars": [[0, "../../../../etc/passwd", 1, 1]]},
        {"tars": [[0, SHA.upper(), 1, 1]]},
        {"tars": [[0, 5, 1, 1]]},
        {"tars": [[-1, SHA, 1, 1]]},
        {"tars": [["../0", SHA, 1, 1]]},
        {"tars": [[0, SHA, 1, 1], [0, SHA, 1, 1]]},
        {"tars": [[1, SHA, 1, 1], [0, SHA, 1, 1]]},
        {"tars": [[0, SHA, -1, 1]]},
        {"tars": [[0, SHA, 1, True]]},
        {"tars": 5},
        {"teacher": "evil:load"},
        {"class_names": "abc"},
        {"image_size": "32"},
        {"fingerprint": None},
    ],
)
def test_damaged_descriptions_are_data_errors(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"m\.parquet: damaged description"):
        DatasetInfo.from_metadata(damaged(change), "m.parquet")


def test_metadata_that_is_not_ours_newer_or_altered() -> None:
    with pytest.raises(DataError, match="not a manifest of this factory"):
        DatasetInfo.from_metadata(None, "m.parquet")
    metadata = INFO.to_metadata()
    with pytest.raises(DataError, match="format version '99', this program reads 3"):
        DatasetInfo.from_metadata({**metadata, b"factory.format_version": b"99"}, "m.parquet")
    altered = metadata[b"factory.info"].replace(b"zero", b"nine")
    with pytest.raises(DataError, match="altered"):
        DatasetInfo.from_metadata({**metadata, b"factory.info": altered}, "m.parquet")
