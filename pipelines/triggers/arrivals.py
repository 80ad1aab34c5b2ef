"""New data: the complete batches below a folder or an S3 prefix, each known by the digest of its listing.

A batch is a folder with a marker, written last by whoever delivers the rows:

* `_MANIFEST.json`  {"files": {"rows.jsonl": {"size": 1234, "sha256": "…"}}}: the batch is complete when exactly these
  files are there, with these sizes (and, in a folder, these bytes)
* `_SUCCESS`        complete when no file is newer than the marker

Until then it is not there at all. A batch that is delivered again with other bytes is a new one; one that is listed
twice is the same. In AWS, EventBridge tells of the same marker (infra/aws/assay.yaml), so nothing needs to watch.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import digest_of, sha256_file
from assay.components.contracts.errors import DataError
from assay.components.shared.storage import S3Storage

MANIFEST, SUCCESS = "_MANIFEST.json", "_SUCCESS"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One file of a batch."""

    name: str
    """Relative to the batch."""
    size: int
    """Bytes."""
    tag: str
    """What changes with the bytes: the sha256 in a folder, the ETag on S3."""
    modified: float
    """Seconds since 1970; no part of the digest."""


@dataclass(frozen=True)
class Batch:
    """A complete delivery."""

    uri: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """Digest of names, sizes and tags."""
        return digest_of([[item.name, item.size, item.tag] for item in sorted(self.items, key=lambda item: item.name)])


def batches(source: str) -> list[Batch]:
    """Return the complete batches at or below a source, by name.

    Args:
        source: A folder, or `s3://bucket/prefix`.

    Raises:
        DataError: There is no such folder.
        RegistryError: S3 refuses.
    """
    found = _on_s3(S3Storage(source)) if source.startswith("s3://") else _in_folder(Path(source).absolute())
    return [batch for batch in found if batch is not None]


def is_complete(items: Iterable[Item], manifest: bytes | None, where: str, *, hashed: bool) -> bool:
    """Return whether a batch has all that its marker promises.

    Args:
        items: Its files, with the marker.
        manifest: The marker's bytes if it is a manifest, None for `_SUCCESS`.
        where: For the log.
        hashed: Tags are sha256 digests, to be compared.
    """
    files = {item.name: item for item in items if item.name not in (MANIFEST, SUCCESS)}
    if manifest is None:
        marker = next(item for item in items if item.name == SUCCESS)
        return bool(files) and all(item.modified <= marker.modified for item in files.values())
    promised = _promised(manifest, where)
    if promised is None or files.keys() != promised.keys():
        return False
    return all(_agrees(files[name], facts, hashed=hashed) for name, facts in promised.items())


def _promised(manifest: bytes, where: str) -> dict[str, dict[str, Any]] | None:
    try:
        files = json.loads(manifest)["files"]
        if isinstance(files, dict) and files and all(isinstance(facts, dict) for facts in files.values()):
            return files
    except (ValueError, KeyError, TypeError):
        pass
    log.warning('%s is not {"files": {name: {"size": …, "sha256": …}}}; the batch waits until it is', where)
    return None


def _agrees(item: Item, facts: dict[str, Any], *, hashed: bool) -> bool:
    return facts.get("size", item.size) == item.size and (not hashed or facts.get("sha256", item.tag) == item.tag)


def _in_folder(root: Path) -> list[Batch | None]:
    if not root.is_dir():
        raise DataError("there is no such folder to watch", where=str(root), fix="make it, or correct the path")
    markers = [path for name in (MANIFEST, SUCCESS) for path in root.rglob(name)]
    return [_folder_batch(folder) for folder in sorted({path.parent for path in markers})]


def _folder_batch(folder: Path) -> Batch | None:
    try:
        items = tuple(
            _file(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if _counts(path)
        )
        manifest = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else None
    except FileNotFoundError:  # it is being delivered again
        return None
    return Batch(str(folder), items) if is_complete(items, manifest, str(folder / MANIFEST), hashed=True) else None


def _counts(path: Path) -> bool:
    return path.is_file() and (not path.name.startswith((".", "_")) or path.name in (MANIFEST, SUCCESS))


def _file(path: Path, name: str) -> Item:
    facts = path.stat()
    return Item(name, facts.st_size, _sha256(path, facts.st_size, facts.st_mtime_ns), facts.st_mtime)


@lru_cache(maxsize=65536)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash a file once per state: a watcher looks every minute."""
    return sha256_file(path)


def _on_s3(storage: S3Storage) -> list[Batch | None]:
    everything = [_object(entry) for entry in storage.objects()]
    folders = {item.name.rpartition("/")[0] for item in everything if _is_marker(item.name)}
    return [_s3_batch(storage, folder, everything) for folder in sorted(folders)]


def _s3_batch(storage: S3Storage, folder: str, everything: list[Item]) -> Batch | None:
    start = f"{folder}/" if folder else ""
    items = tuple(
        Item(item.name.removeprefix(start), item.size, item.tag, item.modified)
        for item in everything
        if item.name.startswith(start) and _counts_by_name(item.name)
    )
    listed = any(item.name == MANIFEST for item in items)
    manifest = storage.read(start + MANIFEST) if listed else None
    if listed and manifest is None:  # removed between the two looks
        return None
    uri = f"{storage.address}/{folder}".rstrip("/")
    return Batch(uri, items) if is_complete(items, manifest, f"{uri}/{MANIFEST}", hashed=False) else None


def _object(entry: dict[str, Any]) -> Item:
    return Item(entry["Key"], entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())


def _is_marker(key: str) -> bool:
    return key.rpartition("/")[2] in (MANIFEST, SUCCESS)


def _counts_by_name(key: str) -> bool:
    return _is_marker(key) or not key.rpartition("/")[2].startswith((".", "_")) and not key.endswith("/")
