"""Stores to test against: a local folder, fsspec's memory, and a real S3 server on loopback."""

import uuid
from collections.abc import Iterator

import pytest

from manifests import storage as storage_module
from manifests.storage import Storage
from tests.manifests.flaky_proxy import FlakyProxy


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's folder."""
    import fsspec

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/data/set"


@pytest.fixture
def flaky_s3(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy, without faults yet, through which this process and its children reach ``s3_url``."""
    from s3fs import S3FileSystem

    with FlakyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()  # instances remember the endpoint they were made with
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def any_storage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3_url"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/set")
    return Storage(tmp_path_factory.mktemp("set"))


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without waiting."""
    monkeypatch.setattr(storage_module, "RETRY_DELAYS", (0.0, 0.0, 0.0))
