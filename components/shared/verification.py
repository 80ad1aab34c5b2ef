"""Was anything altered since the decision? Everything is computed again, from the ledger down to the rows.

    the chain of the ledger → each decision record, dossier and approval → each version's bytes
    → MLflow's versions, files and aliases → the artifacts a version was made from, back to the rows

What was altered is an error. What is gone (a cache that was emptied) is told and is none: a proof that cannot be made
is not a proof of the contrary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from pydantic import BaseModel, ConfigDict

from ..contracts.artifacts import sha256_file
from ..contracts.errors import RegistryError
from . import registry, tracking
from .dossier import Dossier, code, read_dossier, walk
from .ledger import Entry

BAD = ("altered", "repaired")
FROM_BACKUP = "restore it from a backup; do not serve this model before that"


class Finding(BaseModel):
    """One thing that was looked at."""

    model_config = ConfigDict(frozen=True)

    state: Literal["ok", "altered", "repaired", "gone", "note"]
    """`altered` and `repaired` (an alias that somebody had moved) mean that something was touched."""
    what: str
    where: str = ""
    fix: str = ""


def verify(name: str) -> list[Finding]:
    """Return what was found, in the order in which it was looked at; stops at a ledger that cannot be believed.

    An alias of MLflow that differs from the ledger is set right, and told.

    Args:
        name: The registered model.

    Raises:
        RegistryError: There is no such model.
    """
    try:
        entries = registry.history(name)
    except RegistryError as error:
        return [Finding(state="altered", what=error.what, where=error.where, fix=error.fix)]
    if not entries:
        raise RegistryError(f"{name!r} has no history", fix="run its recipe first")
    versions = _versions(entries)
    return [
        Finding(state="ok", what=f"the ledger: {len(entries)} entries, each chained to the one before"),
        *_records(entries),
        *_models(versions),
        *_approvals(name, entries),
        *_champion(name, entries),
        *_mlflow(name, entries),
        *_lineage(versions),
    ]


def is_sound(findings: Sequence[Finding]) -> bool:
    """Return whether nothing was altered."""
    return not any(finding.state in BAD for finding in findings)


def _versions(entries: Sequence[Entry]) -> list[Entry]:
    """Return the last registration of every version."""
    return list({entry.version: entry for entry in entries if entry.event == "registered"}.values())


def _records(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Check every decision record and dossier that an entry names."""
    good = 0
    for entry in entries:
        try:
            decision = registry.read_decision(entry.decision)
            if entry.event == "registered":
                registry.require_promotion(decision, entry.content)
            if entry.event == "registered" and entry.evidence:
                _require_dossier(read_dossier(entry.evidence), entry)
            good += 1
        except RegistryError as error:
            yield Finding(state="altered", what=f"entry {entry.seq}: {error.what}", where=error.where, fix=error.fix)
    yield Finding(state="ok", what=f"decision records: {good} of {len(entries)} entries name one that is unchanged")


def _require_dossier(dossier: Dossier, entry: Entry) -> None:
    if (dossier.content, dossier.decision) != (entry.content, entry.decision):
        raise RegistryError("the dossier is of another version", fix=FROM_BACKUP)


def _models(versions: Sequence[Entry]) -> Iterator[Finding]:
    for entry in versions:
        try:
            manifest = registry.read_model(entry.content)
        except RegistryError as error:
            what = f"version {entry.version}: {error.what}"
            yield Finding(state="altered", what=what, where=error.where, fix=error.fix)
        else:
            size = sum(file.size for file in manifest.files.values())
            what = f"version {entry.version}: {len(manifest.files)} files, {size:,} bytes, content {entry.content[:16]}"
            yield Finding(state="ok", what=what)


def _approvals(name: str, entries: Sequence[Entry]) -> Iterator[Finding]:
    """Count again, for each promotion, who had approved exactly the evidence that is there."""
    for index, entry in enumerate(entries):
        if entry.event != "promoted":
            continue
        try:
            then = replace(registry.candidate(name, entries[:index], entry.version), listed=False)
        except RegistryError:
            continue  # told already
        counted = {approved.actor for approved in then.approvals}
        if len(counted) < then.required:
            what = f"entry {entry.seq} promotes version {entry.version}, which needed {then.required} approvals"
            fix = "see the ledger, and the record of its check below deployments/: one of them is not what people saw"
            yield Finding(state="altered", what=f"{what} of what is there now; {len(counted)} are", fix=fix)
        elif then.required:
            who = " and ".join(sorted(counted))
            what = f"version {entry.version} was approved by {who}, on the evidence that is there"
            yield Finding(state="ok", what=what)


def _champion(name: str, entries: Sequence[Entry]) -> Iterator[Finding]:
    """Check that whoever became champion was registered with these bytes, and that its service was checked."""
    registered = {(entry.version, entry.content, entry.decision) for entry in entries if entry.event == "registered"}
    for entry in entries:
        if entry.event == "promoted" and (entry.version, entry.content, entry.decision) not in registered:
            what = f"entry {entry.seq} promotes version {entry.version}, which was never registered so"
            yield Finding(state="altered", what=what, fix=FROM_BACKUP)
    champion = registry.champion(name)
    if champion is None:
        yield Finding(state="note", what="there is no champion")
        return
    checked = registry.deployment(name, champion.version)
    if checked is None:
        fix = "run the recipe again: it repeats the check of the served model"
        yield Finding(state="note", what=f"version {champion.version} is champion; its check is not on record", fix=fix)
    elif checked.content != champion.content:
        what = f"the record of how version {champion.version} was checked is of another model"
        yield Finding(state="altered", what=what, fix=FROM_BACKUP)
    else:
        what = f"version {champion.version} is champion since {champion.time:%Y-%m-%d %H:%M} UTC"
        yield Finding(state="ok", what=f"{what}; served, it repeated {checked.tokens} tokens of what was measured")


def _mlflow(name: str, entries: Sequence[Entry]) -> Iterator[Finding]:
    try:
        repaired = registry.sync_alias(name)
        with tracking.connected() as client:
            for entry in _versions(entries):
                same = [other for other in entries if (other.event, other.version) == ("registered", entry.version)]
                yield from _mlflow_version(client, name, entry, _described(same))
    except Exception as error:  # a view that cannot be asked says nothing about the truth
        what = f"MLflow was not compared: {getattr(error, 'what', type(error).__name__)}"
        yield Finding(state="note", what=what, where=getattr(error, "where", ""), fix=getattr(error, "fix", ""))
        return
    for alias, (had, has) in repaired.items():
        yield Finding(
            state="repaired",
            what=f"MLflow's alias {alias!r} was at {_number(had)}, and the ledger says {_number(has)}: it was set back",
            fix="see in MLflow's log who moved it; an alias promotes nothing, but people may have read it",
        )
    if not repaired:
        yield Finding(state="ok", what="MLflow's aliases say what the ledger says")


def _described(registrations: Sequence[Entry]) -> dict[str, set[str]]:
    """Return what each file that describes a version may hash to: it may have been registered on several decisions."""
    found: dict[str, set[str]] = {}
    for entry in registrations:
        for name, sha256 in (read_dossier(entry.evidence).files if entry.evidence else {}).items():
            found.setdefault(name, set()).add(sha256)
    return found


def _mlflow_version(client: Any, name: str, entry: Entry, described: dict[str, set[str]]) -> Iterator[Finding]:
    from mlflow.exceptions import MlflowException

    place = f"models:/{name}/{entry.version}"
    try:
        version = client.get_model_version(name, str(entry.version))
        model = client.get_logged_model(version.source.removeprefix("models:/"))
    except MlflowException as error:
        what = f"MLflow has no version {entry.version}: {str(error).partition(chr(10))[0]}"
        yield Finding(
            state="altered", what=what, where=place, fix="restore MLflow's store; the ledger stands without it"
        )
        return
    content = version.tags.get("content")
    if content != entry.content:
        what = (
            f"MLflow says that version {entry.version} has content {str(content)[:16]}, the ledger {entry.content[:16]}"
        )
        yield Finding(state="altered", what=what, where=place, fix="set the tag back, and ask who changed it")
        return
    folder = _local_folder(model.artifact_location)
    changed = list(_changed(folder, entry, described)) if folder else []
    for path in changed:
        fix = f"serve from the registry, or restore the file from models/{entry.content}"
        yield Finding(state="altered", what="MLflow's copy of a file is another one", where=str(path), fix=fix)
    if not changed:
        seen = "" if folder else "; its files are on the server and were not read"
        yield Finding(state="ok", what=f"version {entry.version} in MLflow is the registered one{seen}")


def _changed(folder: Path, entry: Entry, described: dict[str, set[str]]) -> Iterator[Path]:
    """Yield the files of MLflow's folder that are not those of the registry."""
    try:
        wanted = {name: {file.sha256} for name, file in registry.read_model(entry.content).files.items()}
    except RegistryError:
        return  # told already, and there is nothing to compare with
    for name, allowed in (wanted | described).items():
        path = folder / name
        if not path.is_file() or sha256_file(path) not in allowed:
            yield path


def _local_folder(location: str) -> Path | None:
    address = urlparse(location)
    return Path(unquote(address.path)) if address.scheme in ("", "file") else None


def _lineage(versions: Sequence[Entry]) -> Iterator[Finding]:
    """Walk back to the rows from every version that has a dossier."""
    for entry in versions:
        if not entry.evidence:
            yield Finding(state="note", what=f"version {entry.version} was registered without a dossier")
            continue
        try:
            dossier = read_dossier(entry.evidence)
        except RegistryError:
            continue  # told already
        yield from _back_to_the_rows(entry, dossier)
        if dossier.code != code():
            what = f"version {entry.version} was registered by other code than runs here (digest {dossier.code[:16]})"
            yield Finding(state="note", what=what)


def _back_to_the_rows(entry: Entry, dossier: Dossier) -> Iterator[Finding]:
    links = list(walk(dossier.manifests))
    for link in links:
        if link.state == "altered":
            what = f"version {entry.version}: {link.path} was changed after it was sealed"
            yield Finding(state="altered", what=what, where=link.where, fix="remove it; the run makes it again")
        elif link.state == "gone":
            what = f"version {entry.version}: {link.path} is not on this machine (digest {link.digest[:16]})"
            yield Finding(state="gone", what=what)
    kept = [link for link in links if link.state == "manifest"]
    if kept:
        names = ", ".join(link.path for link in kept)
        what = f"version {entry.version}: manifests are kept, files are not on this machine: {names}"
        yield Finding(state="gone", what=what)
    whole = [link for link in links if link.state == "whole"]
    what = f"version {entry.version}: lineage of {len(links)} artifacts, {len(whole)} of them hashed again"
    rows = sorted({link.kind for link in whole} & {"raw", "rows", "splits"})
    yield Finding(state="ok", what=what + (f", down to {', '.join(rows)}" if rows else ""))


def _number(version: int) -> str:
    return f"version {version}" if version else "none"
