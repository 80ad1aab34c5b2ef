"""What both kinds of storage promise, and how S3's refusals read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from assay.components.contracts.errors import RegistryError
from assay.components.shared import tracking
from assay.components.shared.storage import PART, FolderStorage, S3Storage, open_storage
from fixtures.shelf import Shelf


def test_an_object_is_read_as_it_was_written(shelf: Shelf) -> None:
    storage = open_storage(shelf.address)
    assert storage.read("a/b.json") is None
    storage.write("a/b.json", b"one")
    storage.write("a/b.json", b"two")
    assert storage.read("a/b.json") == b"two"
    storage.create("a/c/d", b"")
    storage.create("ab/c", b"not below a/")
    assert storage.keys("a") == ["a/b.json", "a/c/d"]
    assert storage.keys("nothing") == []


def test_of_sixteen_that_create_an_object_one_wins(shelf: Shelf) -> None:
    storage = open_storage(shelf.address)
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: storage.create("claim", b"%d" % number), range(16)))
    assert sum(won) == 1
    assert storage.read("claim") == b"%d" % won.index(True)


def test_who_asks_again_because_the_answer_was_lost_has_won(shelf: Shelf) -> None:
    storage = open_storage(shelf.address)
    assert storage.create("claim", b"mine")
    assert storage.create("claim", b"mine")
    assert not storage.create("claim", b"yours")
    assert storage.read("claim") == b"mine"


def test_a_crash_leaves_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FolderStorage(tmp_path)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", crash)
    with pytest.raises(KeyboardInterrupt):
        storage.create("entries/1", b"whole")
    (tmp_path / "entries" / f"{PART}left").write_bytes(b"ha")  # as a power cut would leave it
    assert storage.read("entries/1") is None
    assert storage.keys("entries") == []


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/", "s3://bucket/a/b/", "s3://bucket/a/b"])
def test_an_s3_address_has_one_form(address: str) -> None:
    storage = S3Storage(address)
    assert storage.bucket == "bucket"
    assert storage.address == address.rstrip("/")


def test_an_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(RegistryError, match="no S3 address"):
        open_storage("s3:///prefix")


def test_a_bucket_that_is_not_there_is_one_clear_message(s3_bucket: str) -> None:
    storage = S3Storage(f"s3://{s3_bucket}-gone/registry")
    for call in (storage.read, storage.keys, lambda key: storage.create(key, b"x")):
        with pytest.raises(RegistryError, match="S3 refuses") as error:
            call("ledger")
        assert error.value.where == f"s3://{s3_bucket}-gone/registry/ledger"
        assert "make the bucket" in error.value.fix


def test_no_credentials_is_one_clear_message(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(RegistryError, match="Unable to locate credentials") as error:
        S3Storage(f"s3://{s3_bucket}/registry").read("ledger")
    assert "AWS_PROFILE" in error.value.fix


def test_a_registry_on_s3_needs_a_tracking_server(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", f"s3://{s3_bucket}/registry")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="no embedded MLflow store") as error:
        tracking.tracking_uri()
    assert "MLFLOW_TRACKING_URI" in error.value.fix
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert tracking.tracking_uri() == "https://mlflow.example.com"
