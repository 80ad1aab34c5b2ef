"""Artifacts as they travel between tasks, and the digest of their content.

The digest knows no URI and no time: a file that was touched, copied or moved is the same artifact.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from assay.components.contracts.artifacts import MANIFEST, UNSEALED, Manifest, digest_of, sha256_file
from assay.components.contracts.errors import RunError

_MOUNTS = {"s3://": "/s3/", "gs://": "/gcs/", "minio://": "/minio/", "oci://": "/oci/"}
"""Where KFP's containers see remote storage."""
_MEMO_BYTES = 1 << 20
"""Smaller files are hashed faster than looked up."""
_MEMO_SETTLED_SECONDS = 2.0
"""A file this young may change again without its time changing."""


@dataclass(frozen=True)
class Artifact:
    """One artifact: KFP's fields, and the digest of its content."""

    name: str
    uri: str
    type: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def runtime(self) -> dict[str, Any]:
        """Return it as it stands in KFP's ExecutorInput."""
        return {"name": self.name, "uri": self.uri, "type": self.type, "metadata": self.metadata}

    def identity(self) -> str:
        """Return the digest of all that a consumer can see but the place."""
        return digest_of([self.digest, self.type.get("schemaTitle", ""), self.metadata])

    def dump(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    def sealed(self, home: Path, *, trust_manifest: bool = True) -> "Artifact":
        """Return it with the digest of its content; of its URI where it lies elsewhere."""
        path = local_path(self.uri)
        if "://" in self.uri and not path.exists():
            return replace(self, digest=digest_of({"uri": self.uri}))
        return replace(self, digest=content_digest(path, home, trust_manifest=trust_manifest))


def local_path(uri: str) -> Path:
    """Return where an artifact lies on this machine."""
    for prefix, mount in _MOUNTS.items():
        if uri.startswith(prefix):
            return Path(mount + uri.removeprefix(prefix))
    return Path(uri.removeprefix("file://")).expanduser()


def content_digest(path: Path, home: Path, *, trust_manifest: bool = True) -> str:
    """Return the digest of a file or directory; of nothing at all when the task wrote nothing.

    Args:
        path: The artifact.
        home: Holds the memory of what large files hash to.
        trust_manifest: Take a sealed directory's manifest for its content; a step that reads it verifies it.
    """
    if path.is_file():
        return digest_of({"file": _file_digest(path, home)})
    if not path.is_dir():
        return digest_of({"absent": True})
    if trust_manifest and (path / MANIFEST).is_file():
        with contextlib.suppress(ValidationError):  # a file of that name that is no manifest is a file like any other
            return Manifest.model_validate_json((path / MANIFEST).read_bytes()).digest
    files = (entry for entry in sorted(path.rglob("*")) if entry.is_file() and entry.name not in UNSEALED)
    return digest_of({"tree": {entry.relative_to(path).as_posix(): _file_digest(entry, home) for entry in files}})


def file_sizes(path: Path) -> dict[str, int]:
    """Return the size of every file below a folder by its path inside."""
    files = (entry for entry in sorted(path.rglob("*")) if entry.is_file())
    return {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in files}


def imported(uri: str, type_: dict[str, str], metadata: dict[str, Any], home: Path) -> Artifact:
    """Return the artifact behind an importer's URI.

    Raises:
        RunError: Nothing lies there on this machine.
    """
    path = local_path(uri)
    if "://" in uri and not uri.startswith("file://"):
        if not path.exists():
            raise RunError(
                "the local engine reads files of this machine only",
                where=uri,
                fix=f"download it and name the local path, or mount it at {path}"
                if str(path) != uri
                else "download it",
            )
    elif not path.exists():
        raise RunError("there is no such file or folder", where=str(path), fix="check the path of the data")
    where = uri if "://" in uri and not uri.startswith("file://") else str(path.absolute())
    return Artifact("artifact", where, type_, metadata).sealed(home, trust_manifest=False)


def _file_digest(path: Path, home: Path) -> str:
    stat = path.stat()
    if stat.st_size < _MEMO_BYTES or time.time() - stat.st_mtime < _MEMO_SETTLED_SECONDS:
        return sha256_file(path)
    identity = json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    key = hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.suppress(sqlite3.Error), _memory(home) as memory:
        row = memory.execute("SELECT sha256 FROM digests WHERE key = ?", [key]).fetchone()
        if row:
            return str(row[0])
    sha256 = sha256_file(path)
    with contextlib.suppress(sqlite3.Error), _memory(home) as memory:  # to forget costs time, nothing else
        memory.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", [key, sha256])
    return sha256


@contextlib.contextmanager
def _memory(home: Path) -> Iterator[sqlite3.Connection]:
    """Open what large files hash to, and commit at the end."""
    folder = home / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(folder / "digests.sqlite", timeout=60)
    try:
        with memory:
            memory.execute("CREATE TABLE IF NOT EXISTS digests (key TEXT PRIMARY KEY, sha256 TEXT NOT NULL)")
            yield memory
    finally:
        memory.close()
