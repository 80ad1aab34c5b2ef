"""Artifacts: directories with a manifest, so that what a step reads is what another step wrote.

`manifest.json` names the kind, the schema version, the sha256 and size of every file, counts, and the digests of what
the artifact was made from; lineage is that chain of digests. Nothing that differs between two identical runs (a time, a
path) may stand in an artifact's sealed files: a timing goes to `UNSEALED` files, which the digest leaves out.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DataError

MANIFEST = "manifest.json"
ENCODING = "embedding.json"
"""Says of a folder that it is an encoder, and how it is used (`embed.py`)."""
METADATA = ".assay-metadata.json"
"""What an engine without a metadata store keeps beside an artifact's files."""
UNSEALED = frozenset({"timing.json", METADATA})
"""Files that may differ between two identical runs; they travel with the artifact and are not part of its digest."""
UNSEALED_FOLDERS = frozenset({"site"})
"""Folders at the top of an artifact of which the same holds: a site that a library writes with times in it."""


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size: int
    """Bytes."""


class Manifest(BaseModel):
    """What an artifact is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """For example `rows`, `splits`, `model`, `pairs`, `candidates`, `results`, `verdicts`, `decision`, `summary`."""
    schema_version: int = 1
    files: dict[str, FileEntry]
    counts: dict[str, int] = {}
    """Rows or files by name."""
    parents: dict[str, str] = {}
    """Digest of each artifact this one was made from, by the name of the input."""
    metadata: dict[str, Any] = {}
    """Small facts a reader needs (the base model's name, the chat template's digest); deterministic."""

    @property
    def content(self) -> str:
        """Digest of the files alone: equal for two artifacts with the same bytes, whatever they were made from."""
        return digest_of({name: entry.sha256 for name, entry in sorted(self.files.items())})

    @property
    def digest(self) -> str:
        """Digest of the whole manifest: files, counts, metadata and parents."""
        return digest_of(self.model_dump(mode="json"))


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed_files(folder: Path) -> list[Path]:
    """Return the files that belong to an artifact's digest, in a stable order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != MANIFEST
        and path.name not in UNSEALED
        and path.relative_to(folder).parts[0] not in UNSEALED_FOLDERS
    )


def seal(
    folder: str | Path,
    kind: str,
    *,
    parents: dict[str, Manifest] | None = None,
    counts: dict[str, int] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json` over everything in `folder`; call it last, once.

    Args:
        folder: The artifact's directory.
        kind: What it is; a reader asks for it by this name.
        parents: The manifests of the inputs it was made from.
        counts: Rows by name, for people.
        metadata: Small deterministic facts.
    """
    folder = Path(folder)
    manifest = Manifest(
        kind=kind,
        files={
            path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
            for path in sealed_files(folder)
        },
        counts=counts or {},
        parents={name: parent.digest for name, parent in (parents or {}).items()},
        metadata=metadata or {},
    )
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def read_manifest(folder: str | Path, *kinds: str, verify: bool = True) -> Manifest:
    """Read and verify an artifact's manifest.

    Args:
        folder: The artifact's directory.
        kinds: The kinds the caller can use; none means any.
        verify: Hash every file again. Turn it off only where the hash was just taken.

    Raises:
        DataError: No manifest, another kind, or a file that is missing, added or changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            "there is no manifest.json, so this is not a finished artifact",
            where=str(folder),
            fix="run the step that writes it again",
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"the manifest cannot be read ({error.error_count()} problems)",
            where=str(path),
            fix="run the step that writes it again",
        ) from error
    if kinds and manifest.kind not in kinds:
        raise DataError(
            f"this is a {manifest.kind!r} artifact; wanted {' or '.join(map(repr, kinds))}",
            where=str(folder),
        )
    if verify:
        _verify(folder, manifest)
    return manifest


def _verify(folder: Path, manifest: Manifest) -> None:
    present = {path.relative_to(folder).as_posix(): path for path in sealed_files(folder)}
    for name in sorted(present.keys() ^ manifest.files.keys()):
        state = "is missing" if name in manifest.files else "was added after sealing"
        raise DataError(f"a file {state}", where=str(folder / name), fix="restore the artifact")
    for name, entry in manifest.files.items():
        if present[name].stat().st_size != entry.size or sha256_file(present[name]) != entry.sha256:
            raise DataError(
                "the file is not the one that was sealed (its sha256 differs)",
                where=str(folder / name),
                fix="restore it, or run the step that writes it again",
            )


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = text.encode() if isinstance(text, str) else text
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def link_tree(source: str | Path, target: str | Path) -> None:
    """Copy a directory by hard links, or by bytes where the file system refuses."""

    def copy(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)


def is_encoder(folder: str | Path) -> bool:
    """Return whether a model folder is an encoder: it gives vectors, not text."""
    return (Path(folder) / ENCODING).is_file()
