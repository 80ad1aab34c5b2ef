"""The registry's own copy of every registered model: `models/CONTENT/`, by content digest, read-only, never a cache.

In a folder a model is used where it lies. On S3 it is fetched into `$ASSAY_HOME/cache/registry` and verified there
before it is used; what is asked before a promotion is always the bytes on S3.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from ..contracts.artifacts import MANIFEST, Manifest, read_manifest
from ..contracts.errors import DataError, RegistryError
from ..runtime.context import cache_folder, registry_address
from .storage import FolderStorage, S3Storage, open_storage


def keep_model(folder: str | Path) -> Path:
    """Keep a copy of a model's files, and return a folder of this machine that holds it; does nothing the second time.

    The copy shares no bytes with the caches of runs: what happens to those does not touch a champion.

    Raises:
        DataError: The folder is not a sealed model, or was altered.
    """
    content = read_manifest(folder, "model", verify=False).content
    storage = open_storage(registry_address())
    copy = _local(storage, content)
    if not copy.is_dir():
        with _arriving(copy) as part:
            for name in (*read_manifest(folder, "model", verify=False).files, MANIFEST):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, part / name)
    if isinstance(storage, S3Storage) and storage.read(_key(content, MANIFEST)) is None:
        for name in read_manifest(copy, "model").files:
            storage.upload(copy / name, _key(content, name))
        storage.create(_key(content, MANIFEST), (copy / MANIFEST).read_bytes())  # last: it says that all is there
    return copy


def model_folder(content: str) -> Path:
    """Return the folder of this machine that holds a kept model; fetches it from S3 when it is not there yet.

    Raises:
        RegistryError: S3 holds no such model, or an altered one.
    """
    storage = open_storage(registry_address())
    copy = _local(storage, content)
    if isinstance(storage, S3Storage) and not copy.is_dir():
        _fetch(storage, content, copy)
    return copy


def read_model(content: str) -> Manifest:
    """Return the manifest of a kept model after hashing every file, on S3 as they are streamed.

    Raises:
        RegistryError: The files are missing, or not the ones that were registered.
    """
    storage = open_storage(registry_address())
    if isinstance(storage, S3Storage):
        return _hash_objects(storage, content)
    folder = _local(storage, content)
    with _refusing(str(folder)):
        manifest = read_manifest(folder, "model")
    return _require(manifest, content, str(folder))


def _local(storage: FolderStorage | S3Storage, content: str) -> Path:
    if isinstance(storage, FolderStorage):
        return storage.folder / "models" / content
    return cache_folder("registry") / content


def _key(content: str, name: str) -> str:
    return f"models/{content}/{name}"


def _fetch(storage: S3Storage, content: str, copy: Path) -> None:
    with _refusing(f"{storage.address}/models/{content}"), _arriving(copy) as part:
        for name in (*_manifest(storage, content).files, MANIFEST):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            with (part / name).open("wb") as file:
                storage.stream(_key(content, name), file.write)


def _hash_objects(storage: S3Storage, content: str) -> Manifest:
    manifest, place = _manifest(storage, content), f"{storage.address}/models/{content}"
    present = {key.removeprefix(_key(content, "")) for key in storage.keys(f"models/{content}")}
    for name in sorted(present ^ {*manifest.files, MANIFEST}):
        state = "is missing" if name in manifest.files else "was added after sealing"
        raise _altered(f"a file {state}", f"{place}/{name}", place)
    for name, entry in manifest.files.items():
        digest = hashlib.sha256()
        storage.stream(_key(content, name), digest.update)
        if digest.hexdigest() != entry.sha256:
            raise _altered("the file is not the one that was sealed (its sha256 differs)", f"{place}/{name}", place)
    return manifest


def _manifest(storage: S3Storage, content: str) -> Manifest:
    place = f"{storage.address}/models/{content}"
    data = storage.read(_key(content, MANIFEST))
    if data is None:
        raise _altered("there is no manifest.json", place, place)
    try:
        return _require(Manifest.model_validate_json(data), content, place)
    except ValidationError:
        raise _altered("the manifest cannot be read", f"{place}/{MANIFEST}", place) from None


def _require(manifest: Manifest, content: str, place: str) -> Manifest:
    if manifest.content != content:
        raise RegistryError(
            "the registered model is another one than its digest says", where=place, fix=_renewal(place)
        )
    return manifest


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """Give a folder to fill; what is sealed in it then appears under its name, read-only, all at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        yield part
        read_manifest(part, "model")
        for path in part.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o444)
        part.chmod(0o755)
        part.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have kept the same bytes meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _refusing(place: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise _altered(error.what, error.where, place) from error


def _altered(what: str, where: str, place: str) -> RegistryError:
    return RegistryError(f"the registered model was altered: {what}", where=where, fix=_renewal(place))


def _renewal(place: str) -> str:
    return f"remove {place} and run the recipe again: the registry then takes a new copy of the same bytes"
