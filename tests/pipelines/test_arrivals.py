"""New data, in a folder and on S3: nothing before it is complete, nothing twice."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from assay.components.contracts.errors import DataError, RegistryError
from assay.pipelines.triggers.arrivals import batches
from fixtures.shelf import Shelf

ROWS = b'{"prompt": "red lamp", "answer": "stop"}\n'


@pytest.fixture
def source(shelf: Shelf) -> Shelf:
    """The place that rows are delivered to; empty, and there."""
    if not shelf.on_s3:
        Path(shelf.address).mkdir()
    return shelf


def manifest(**files: bytes) -> bytes:
    facts = {
        f"{name}.jsonl": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    return json.dumps({"files": facts}).encode()


def names(source: Shelf) -> list[str]:
    return [batch.uri.removeprefix(source.address).lstrip("/") for batch in batches(source.address)]


def test_a_batch_is_there_when_all_that_is_promised_is(source: Shelf) -> None:
    assert names(source) == []
    source.put("monday/one.jsonl", ROWS)
    assert names(source) == []
    source.put("monday/_MANIFEST.json", manifest(one=ROWS, two=ROWS))
    assert names(source) == []
    source.put("monday/two.jsonl", ROWS[:10])
    assert names(source) == []
    source.put("monday/two.jsonl", ROWS)
    assert names(source) == ["monday"]
    source.put("monday/three.jsonl", ROWS)  # what nobody promised may still be growing
    assert names(source) == []


def test_the_digest_is_of_the_bytes_and_of_nothing_else(source: Shelf) -> None:
    source.put("monday/one.jsonl", ROWS)
    source.put("monday/_MANIFEST.json", manifest(one=ROWS))
    (first,) = batches(source.address)
    time.sleep(1.1)
    for key in source.keys("monday/"):
        source.put(key, source.get(key))
    (again,) = batches(source.address)
    assert again.items[-1].modified != first.items[-1].modified
    assert again.digest == first.digest
    changed = ROWS.replace(b"stop", b"wait")
    source.put("monday/one.jsonl", changed)
    source.put("monday/_MANIFEST.json", manifest(one=changed))
    (other,) = batches(source.address)
    assert other.digest != first.digest


def test_the_source_itself_may_be_the_batch_and_others_lie_deeper(source: Shelf) -> None:
    for folder in ("", "a/b/", "c/"):
        source.put(f"{folder}one.jsonl", ROWS)
    source.put("a/b/_MANIFEST.json", manifest(one=ROWS))
    source.put("c/_SUCCESS", b"")
    assert names(source) == ["a/b", "c"]
    assert len({batch.digest for batch in batches(source.address)}) == 2


def test_hidden_files_are_no_rows(source: Shelf) -> None:
    source.put("monday/one.jsonl", ROWS)
    source.put("monday/.one.jsonl.part", b"half")
    source.put("monday/_log.txt", b"written by a job")
    source.put("monday/_MANIFEST.json", manifest(one=ROWS))
    assert names(source) == ["monday"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"files": {}}', b'{"files": ["one.jsonl"]}', b"\xff"])
def test_a_manifest_that_cannot_be_read_waits_and_is_told(source: Shelf, text: bytes, caplog) -> None:
    source.put("monday/one.jsonl", ROWS)
    source.put("monday/_MANIFEST.json", text)
    assert names(source) == []
    assert "monday/_MANIFEST.json" in caplog.text


def test_with_a_success_marker_a_newer_file_means_that_it_goes_on(source: Shelf) -> None:
    source.put("monday/one.jsonl", ROWS)
    time.sleep(1.1)  # S3 knows whole seconds
    source.put("monday/_SUCCESS", b"")
    assert names(source) == ["monday"]
    time.sleep(1.1)
    source.put("monday/two.jsonl", ROWS)
    assert names(source) == []
    time.sleep(1.1)
    source.put("monday/_SUCCESS", b"")
    assert names(source) == ["monday"]


def test_a_marker_without_rows_is_no_batch(source: Shelf) -> None:
    source.put("monday/_SUCCESS", b"")
    assert names(source) == []


def test_equal_size_and_other_bytes_are_seen_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(ROWS.replace(b"stop", b"wait"))
    (tmp_path / "_MANIFEST.json").write_bytes(manifest(one=ROWS))
    assert batches(str(tmp_path)) == []
    (tmp_path / "one.jsonl").write_bytes(ROWS)
    os.utime(tmp_path / "one.jsonl", (1, 1))
    assert [batch.uri for batch in batches(str(tmp_path))] == [str(tmp_path)]


def test_a_place_that_is_not_there_is_told(tmp_path: Path, s3_bucket: str) -> None:
    with pytest.raises(DataError, match="no such folder"):
        batches(str(tmp_path / "none"))
    with pytest.raises(RegistryError, match="S3 refuses"):
        batches(f"s3://{s3_bucket}-none/rows")
