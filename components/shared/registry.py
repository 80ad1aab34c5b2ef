"""The registry: which version of a model is champion, since when, on what evidence, and where its bytes lie.

    $ASSAY_REGISTRY/                   a folder, or s3://bucket/prefix
      ledger/NAME/                     the promotion ledger; the truth
      models/CONTENT/                  a model's files with their manifest, by content digest; read-only, never a cache
      decisions/SHA256.json            the decision records that the ledger names
      dossiers/, lineage/              what each version was made from, back to the rows (`dossier.py`)
      deployments/NAME/VERSION.json    how a version was checked before it was deployed
      people/NAME.json                 who may decide (`people.py`)
      triggers/                        what was triggered, and the run that came of it
      mlflow.db, artifacts/            the embedded MLflow store of a folder, unless MLFLOW_TRACKING_URI names a server

MLflow's aliases are a view of the ledger: they keep no history and anyone may move them, so nothing here reads one to
decide. Only `sync_alias` imports MLflow (two seconds); every question about the champion is answered without it.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..contracts.artifacts import digest_of, read_manifest
from ..contracts.errors import RegistryError
from ..contracts.recipe import GateSettings
from ..runtime.context import registry_address
from . import announce, approval, ledger, looks, people
from .approval import REACHES_CHAMPION as REACHES_CHAMPION
from .approval import Candidate
from .dossier import read_dossier
from .ledger import Draft, Entry
from .people import Person
from .storage import open_storage, read_hashed
from .vault import keep_model as keep_model  # the registry's face: callers ask it, not the vault
from .vault import model_folder as model_folder
from .vault import read_model as read_model

DECISION = "decision.json"

log = logging.getLogger(__name__)


class Deployment(BaseModel):
    """How a version was checked before it became champion: `deployments/NAME/VERSION.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int
    content: str
    prompts: int
    """Held-out prompts that the served model answered exactly as the trained one did."""
    tokens: int
    """Generated tokens that were compared; of an encoder, tokens of the texts whose vectors were."""
    command: str
    """Serves whichever version is champion."""


# --- questions ------------------------------------------------------------------------------------------------------


def history(name: str) -> list[Entry]:
    """Return every entry of a model's ledger, oldest first, verified.

    Raises:
        RegistryError: The ledger was altered.
    """
    return ledger.read(name)


def champion(name: str, at: datetime | None = None) -> Entry | None:
    """Return the entry that made the champion, or None when there is none.

    Args:
        name: The registered model.
        at: What was champion at this moment (UTC if it has no zone); now when left out.

    Raises:
        RegistryError: The ledger was altered.
    """
    entries = history(name)
    if at is not None:
        moment = at if at.tzinfo else at.replace(tzinfo=UTC)
        entries = [entry for entry in entries if entry.time <= moment]
    return _champion(entries)


def registered(name: str, *, version: int | None = None, content: str | None = None) -> Entry | None:
    """Return the newest registration of a version, or of a content digest; None when there is none."""
    return _registered(history(name), version, content)


def predecessor(name: str, version: int) -> Entry | None:
    """Return the registration of the version that `version` replaced when it was last promoted, or None."""
    return _predecessor(history(name), version)


def deployment(name: str, version: int) -> Deployment | None:
    """Return the record of a version's last successful deployment, or None."""
    data = open_storage(registry_address()).read(_deployment_key(name, version))
    return Deployment.model_validate_json(data) if data is not None else None


def read_decision(digest: str) -> dict[str, Any]:
    """Return a decision record that the ledger names.

    Raises:
        RegistryError: It is missing, or not the one that was recorded.
    """
    storage = open_storage(registry_address())
    decision: dict[str, Any] = json.loads(read_hashed(storage, _decision_key(digest), digest, "the decision record"))
    return decision


def decisions(name: str) -> list[dict[str, Any]]:
    """Return every decision on record about a model's candidates, whatever it was, each once and oldest first.

    Raises:
        RegistryError: The ledger or a decision record was altered, or a record is missing.
    """
    return _decisions(history(name))


# --- events ---------------------------------------------------------------------------------------------------------


def require_promotion(decision: dict[str, Any], content: str) -> None:
    """Refuse a model without a decision to promote exactly it.

    Raises:
        RegistryError: The decision is another one, or about another model.
    """
    if decision.get("decision") != "promote":
        raise RegistryError(
            f"the gate decided {decision.get('decision')!r}, not 'promote': {decision.get('reason', '')}",
            fix="only a model that passes the gate is registered; see the run's report for what is missing",
        )
    _require_candidate(decision, content)


def require_turn(name: str, decision: dict[str, Any]) -> None:
    """Refuse a decision that counted too few looks, of which it took a larger part of α than was left.

    Raises:
        RegistryError: Another run decided on the same held-out examples meanwhile.
    """
    _require_turn(history(name), decision)


def keep_decision(folder: str | Path) -> str:
    """Keep a decision artifact's record in the registry, and return its sha256.

    Raises:
        DataError: The artifact is not a decision, or was altered.
    """
    digest = read_manifest(folder, "decision").files[DECISION].sha256
    open_storage(registry_address()).create(_decision_key(digest), (Path(folder) / DECISION).read_bytes())
    return digest


def register(name: str, version: int, content: str, decision: str, dossier: str = "") -> Entry:
    """Record that a version of the MLflow registry holds this content, on the strength of a decision.

    Of two runs that register the same bytes at once the first keeps its version, and the second is given that one.

    Args:
        name: The registered model.
        version: Number that MLflow gave it.
        content: Content digest of the model.
        decision: sha256 of a kept decision record.
        dossier: sha256 of a kept dossier; empty where there is none.

    Raises:
        RegistryError: The decision does not allow it or counted too few looks, or the ledger knows the version with
            other content.
    """
    evidence = read_decision(decision)
    require_promotion(evidence, content)

    def rule(entries: Sequence[Entry]) -> Draft | Entry:
        same = _registered(entries, None, content) or _registered(entries, version, None)
        if same and same.content != content:
            raise RegistryError(
                f"version {version} of {name!r} is another model in the ledger",
                where=f"{registry_address()}/{ledger.folder(name)}",
                fix="the MLflow registry was reset: point MLFLOW_TRACKING_URI at the one this ledger belongs to",
            )
        if same and same.decision == decision and _approvals(same.evidence) == _approvals(dossier):
            return same  # the code that registers may have changed since; what was decided on has not
        _require_turn(entries, evidence)
        number = same.version if same else version
        return Draft("registered", number, content, decision, reason=evidence.get("reason", ""), evidence=dossier)

    return ledger.append(name, rule)


def hold(name: str, content: str, decision: str) -> Entry:
    """Record an attempt that was not promoted; the same attempt again adds nothing.

    Raises:
        RegistryError: The decision is to promote, or about another model.
    """
    evidence = read_decision(decision)
    if evidence.get("decision") not in ("hold", "inconclusive"):
        raise RegistryError(f"the gate decided {evidence.get('decision')!r}; that is not an attempt to hold")
    _require_candidate(evidence, content)

    def rule(entries: Sequence[Entry]) -> Draft | Entry:
        for entry in entries:
            if (entry.event, entry.content, entry.decision) == ("held", content, decision):
                return entry
        return Draft("held", 0, content, decision, reason=f"{evidence['decision']}: {evidence.get('reason', '')}")

    return ledger.append(name, rule)


def promote(name: str, version: int, person: Person | None = None) -> Entry:
    """Make a registered version the champion; does nothing when it is.

    The decision that the version was registered with must be to promote exactly its bytes, and must have compared them
    with today's champion: of two runs that end at once, one wins and the other is told. Where people must approve, all
    of them have, and have seen exactly this evidence.

    Args:
        name: The registered model.
        version: Of a registration.
        person: Whose act it is; who runs this process when left out.

    Raises:
        RegistryError: No such registration, no such decision, altered bytes, another champion meanwhile, approvals
            missing, or the version was rolled back or rejected.
    """

    def rule(entries: Sequence[Entry]) -> Draft | Entry:
        current = _champion(entries)
        if current and current.version == version:
            return current
        entry = _promotable(name, entries, version, approved=True)
        replaces = current.version if current else 0
        actor, proof = (person.name, person.proof) if person else ("", "")
        return Draft(
            "promoted", version, entry.content, entry.decision, entry.reason, replaces, actor=actor, proof=proof
        )

    return ledger.append(name, rule)


def check_promotion(name: str, version: int) -> Entry:
    """Return a version's registration if `promote` would take it now, approvals aside; changes nothing.

    Raises:
        RegistryError: As `promote`.
    """
    entries = history(name)
    current = _champion(entries)
    return current if current and current.version == version else _promotable(name, entries, version)


def candidate(name: str, entries: Sequence[Entry], version: int) -> Candidate:
    """Return a registered version with all there is to see of it, for the people who approve.

    Raises:
        RegistryError: There is no such version, or a record of it was altered.
    """
    entry = _registered(entries, version, None)
    if entry is None:
        raise RegistryError(f"{name!r} has no version {version}", fix="only a version that the gate let in is promoted")
    checked, current = deployment(name, version), _champion(entries)
    return Candidate(
        registration=entry,
        required=approval.required(entries, entry),
        check=digest_of(checked.model_dump(mode="json")) if checked and checked.content == entry.content else "",
        compared=read_decision(entry.decision).get("champion"),
        champion=current.content if current else None,
        listed=bool(people.names()),
        entries=approval.of_registration(entries, entry),
    )


def rollback(name: str, reason: str, to: int | None = None, person: Person | None = None) -> Entry:
    """Make an earlier champion the champion again, then move MLflow's aliases.

    Args:
        name: The registered model.
        reason: Why; required.
        to: Version of an earlier champion; the one that today's champion replaced when left out.
        person: Whose act it is; who runs this process when left out.

    Raises:
        RegistryError: There is nothing to go back to, no reason, or the earlier champion's files were altered.
    """
    if not reason.strip():
        raise RegistryError("a rollback needs a reason", fix="say why: --reason '…'")

    def rule(entries: Sequence[Entry]) -> Draft:
        current = _champion(entries)
        if current is None:
            raise RegistryError(f"{name!r} has no champion, so there is nothing to roll back")
        target = _rollback_target(name, entries, current, to)
        read_model(target.content)
        return Draft(
            "rolled_back",
            target.version,
            target.content,
            target.decision,
            reason.strip(),
            replaces=current.version,
            actor=person.name if person else "",
            proof=person.proof if person else "",
        )

    entry = ledger.append(name, rule)
    sync_or_warn(name)
    return entry


def sync_or_warn(name: str) -> None:
    """Set MLflow's aliases and tell others; the ledger has moved, so neither of them being down may undo it."""
    try:
        sync_alias(name)
    except Exception as error:
        log.warning("MLflow's alias was not moved (%s); `assay verify %s` repairs it", error, name)
    announce.announce(name)


def record_deployment(record: Deployment) -> None:
    """Write down that a version passed its check and is deployed."""
    data = record.model_dump_json(indent=1) + "\n"
    open_storage(registry_address()).write(_deployment_key(record.name, record.version), data.encode())


def sync_alias(name: str) -> dict[str, tuple[int, int]]:
    """Set MLflow's aliases `champion` and `candidate` from the ledger; imports MLflow.

    `candidate` is the newest registered version while it has not been promoted.

    Returns:
        What was repaired: alias → (version it had, version it has), 0 for none.
    """
    from . import tracking

    entries = history(name)
    current = _champion(entries)
    steps = [entry for entry in entries if entry.event in ("registered", "rejected", *REACHES_CHAMPION)]
    reigning = current.version if current else 0
    newest = steps[-1] if steps else None
    waiting = newest.version if newest and newest.event == "registered" and newest.version != reigning else 0
    wanted = {"champion": reigning, "candidate": waiting}
    return tracking.set_aliases(name, wanted)


# --- rules ----------------------------------------------------------------------------------------------------------


def _decisions(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    digests = dict.fromkeys(entry.decision for entry in entries if entry.event in ("registered", "held"))
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read_decision, digests))


def _require_turn(entries: Sequence[Entry], decision: dict[str, Any]) -> None:
    if not {"look", "measurement"} <= decision.keys():
        return  # of a version that did not count, or counted otherwise
    policy, held_out = (
        GateSettings.model_validate(decision["policy"]),
        looks.HeldOut.model_validate(decision["held_out"]),
    )
    asked = decision["candidate"], decision["champion"], policy, decision["measurement"]
    found = looks.count(_decisions(entries), *asked, held_out)
    if len(found.earlier) >= decision["look"]:
        raise RegistryError(
            f"the gate took this for look {decision['look']} at its held-out examples, and it is look "
            f"{len(found.earlier) + 1}: another run decided on them meanwhile",
            fix="run the recipe again: only the gate decides anew, all else comes from the cache",
        )


def _champion(entries: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in reversed(entries) if entry.event in REACHES_CHAMPION), None)


def _promotable(name: str, entries: Sequence[Entry], version: int, approved: bool = False) -> Entry:
    """Return a version's registration, or refuse; with `approved` also while people have to approve it."""
    entry = _registered(entries, version, None)
    if entry is None:
        raise RegistryError(f"{name!r} has no version {version}", fix="only a version that the gate let in is promoted")
    decision = read_decision(entry.decision)
    require_promotion(decision, entry.content)
    _require_not_rolled_back(entries, version)
    approval.refuse_rejected(entries, entry)
    if approved and approval.required(entries, entry):
        approval.require(candidate(name, entries, version))  # they saw who is champion, and whom it was compared with
    else:
        _require_champion(decision, _champion(entries), version)
    read_model(entry.content)
    return entry


def _registered(entries: Sequence[Entry], version: int | None, content: str | None) -> Entry | None:
    for entry in reversed(entries):
        if entry.event == "registered" and version in (None, entry.version) and content in (None, entry.content):
            return entry
    return None


def _predecessor(entries: Sequence[Entry], version: int) -> Entry | None:
    for entry in reversed(entries):
        if entry.event == "promoted" and entry.version == version:
            return _registered(entries, entry.replaces, None)
    return None


def _rollback_target(name: str, entries: Sequence[Entry], current: Entry, to: int | None) -> Entry:
    if to is None:
        target = _predecessor(entries, current.version)
        if target is None:
            raise RegistryError(
                f"version {current.version} of {name!r} replaced no other: there is no earlier champion"
            )
        return target
    earlier = sorted({entry.version for entry in entries if entry.event in REACHES_CHAMPION} - {current.version})
    target = _registered(entries, to, None)
    if to not in earlier or target is None:
        raise RegistryError(
            f"version {to} of {name!r} is the champion"
            if to == current.version
            else f"version {to} was never champion",
            fix=f"choose one of {earlier}" if earlier else "there is no earlier champion",
        )
    return target


def _require_candidate(decision: dict[str, Any], content: str) -> None:
    if decision.get("candidate") != content:
        raise RegistryError(
            f"the decision is about another model ({str(decision.get('candidate'))[:16]}…, not {content[:16]}…)",
            fix="run the gate on the model that is to be registered",
        )


def _require_champion(decision: dict[str, Any], current: Entry | None, version: int) -> None:
    compared, today = decision.get("champion"), current.content if current else None
    if compared == today:
        return
    now = f"version {current.version}" if current else "none"
    raise RegistryError(
        f"version {version} was compared with another champion than today's ({now}); another run was faster",
        fix="run the recipe again: it compares with today's champion, and everything else comes from the cache",
    )


def _require_not_rolled_back(entries: Sequence[Entry], version: int) -> None:
    for entry in reversed(entries):
        if entry.event in REACHES_CHAMPION and entry.version == version:
            return
        if entry.event == "rolled_back" and entry.replaces == version:
            raise RegistryError(
                f"version {version} was rolled back on {entry.time:%Y-%m-%d} ({entry.reason}); a run cannot undo it",
                fix=f"to make it champion again: assay rollback {entry.name} --to {version} --reason '…'",
            )


def _approvals(dossier: str) -> int:
    return read_dossier(dossier).approvals if dossier else 0


def _decision_key(digest: str) -> str:
    return f"decisions/{digest}.json"


def _deployment_key(name: str, version: int) -> str:
    return f"deployments/{name}/{version}.json"
