"""The dossier of a version: by digest, all that it was made and judged from. The ledger names it by its own digest.

    dossiers/SHA256.json    recipe, digests of the inputs' manifests, code, the files that describe the version
    lineage/DIGEST.json     the manifest of every artifact on the way back to the rows, as far as they could be found

The registry keeps manifests, not rows: what they say survives the run, and whoever still has the files can prove that
they are the ones. Artifacts of runs are looked for below this machine's `ASSAY_HOME`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ..contracts.artifacts import MANIFEST, Manifest, digest_of, read_manifest, sha256_file
from ..contracts.errors import DataError
from ..runtime.context import home, registry_address
from .storage import open_storage, read_hashed

State = Literal["whole", "manifest", "gone", "altered"]


class Dossier(BaseModel):
    """What a version is registered on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    content: str
    """Content digest of the model's files."""
    decision: str
    """sha256 of the decision record."""
    manifests: dict[str, str]
    """`Manifest.digest` of `candidate`, `decision`, `data` and `results`: where the walk back to the rows begins."""
    recipe: dict[str, Any]
    code: str
    """Digest of the components' sources that registered it (`code`)."""
    files: dict[str, str] = {}
    """sha256 of what describes the version in MLflow, by name: the model card, the SBOM."""

    @property
    def approvals(self) -> int:
        """People who must approve before the version may become champion."""
        return int(self.recipe.get("approval", {}).get("required", 0))


class Link(NamedTuple):
    """One artifact on the way from a version back to its rows."""

    path: str
    """The names of the inputs on the way, for example `results/data/accepted`."""
    digest: str
    kind: str
    state: State
    """`whole`: its files are here and are the ones that were sealed; `manifest`: only the manifest is kept."""
    where: str
    """The folder, or the changed file."""


def keep_dossier(dossier: Dossier) -> str:
    """Keep a dossier in the registry and return its sha256."""
    data = (dossier.model_dump_json(indent=1) + "\n").encode()
    digest = hashlib.sha256(data).hexdigest()
    open_storage(registry_address()).create(_key(digest), data)
    return digest


def read_dossier(digest: str) -> Dossier:
    """Return the dossier that an entry of the ledger names.

    Raises:
        RegistryError: It is missing, or not the one that was recorded.
    """
    data = read_hashed(open_storage(registry_address()), _key(digest), digest, "the version's dossier")
    return Dossier.model_validate_json(data)


def keep_lineage(roots: Mapping[str, Manifest]) -> None:
    """Keep the manifests that a version was registered with, and of those before them all that this machine has."""
    storage, here = open_storage(registry_address()), sealed_folders()
    waiting, kept = list(roots.values()), set[str]()
    while waiting:
        manifest = waiting.pop()
        if manifest.digest in kept:
            continue
        kept.add(manifest.digest)
        storage.create(f"lineage/{manifest.digest}.json", manifest.model_dump_json(indent=1).encode())
        known = (_load(here[digest][0]) for digest in manifest.parents.values() if digest in here)
        waiting += [parent for parent in known if parent]


def walk(roots: Mapping[str, str]) -> Iterator[Link]:
    """Yield every artifact from a version back to its rows, nearest first, each once, its files hashed again.

    Args:
        roots: Manifest digests by name, as a dossier has them.
    """
    here, waiting, seen = sealed_folders(), list(roots.items()), set[str]()
    while waiting:
        path, digest = waiting.pop(0)
        if digest in seen:
            continue
        seen.add(digest)
        manifest, link = _look(path, digest, here.get(digest, []))
        yield link
        waiting += [(f"{path}/{name}", parent) for name, parent in (manifest.parents if manifest else {}).items()]


def sealed_folders() -> dict[str, list[Path]]:
    """Return where on this machine each sealed artifact lies, by its manifest's digest."""
    found: dict[str, list[Path]] = {}
    for pattern in (f"runs/*/tasks/**/outputs/*/{MANIFEST}", f"cache/steps/*/outputs/*/{MANIFEST}"):
        for path in sorted(home().glob(pattern)):
            manifest = _load(path.parent)
            if manifest:
                found.setdefault(manifest.digest, []).append(path.parent)
    return found


def whole_folder(digest: str) -> Path | None:
    """Return a folder of this machine with exactly this artifact, every file hashed; None when there is none."""
    return next((folder for folder in sealed_folders().get(digest, []) if _flaw(folder) is None), None)


@cache
def code() -> str:
    """Return the digest of the components' sources that run here."""
    root = Path(__file__).parents[1]
    return digest_of({path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*.py"))})


def _look(path: str, digest: str, folders: list[Path]) -> tuple[Manifest | None, Link]:
    flaws = [(folder, _flaw(folder)) for folder in folders]
    for folder, flaw in sorted(flaws, key=lambda pair: pair[1] is not None):
        manifest = _load(folder)
        kind = manifest.kind if manifest else ""
        return manifest, Link(path, digest, kind, "altered" if flaw else "whole", flaw or str(folder))
    storage, key = open_storage(registry_address()), f"lineage/{digest}.json"
    data = storage.read(key)
    if data is None:
        return None, Link(path, digest, "", "gone", "")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        manifest = None
    if manifest is None or manifest.digest != digest:
        return None, Link(path, digest, "", "altered", f"{storage.address}/{key}")
    return manifest, Link(path, digest, manifest.kind, "manifest", f"{storage.address}/{key}")


def _flaw(folder: Path) -> str | None:
    """Return the file that is not what was sealed, or None."""
    try:
        read_manifest(folder)
    except DataError as error:
        return error.where
    return None


def _load(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _key(digest: str) -> str:
    return f"dossiers/{digest}.json"
