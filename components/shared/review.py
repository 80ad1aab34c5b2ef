"""What people do with a candidate: see the queue, approve, reject. The last approval that is needed promotes.

The order is the one of a run without approval: the served model was checked first (`deploy_model`), the ledger moves
next, MLflow's alias last.
"""

import logging
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ..contracts.errors import RegistryError
from ..runtime.context import registry_address
from . import announce, approval, ledger, registry
from .approval import Candidate
from .ledger import Draft, Entry
from .people import Person
from .storage import open_storage

log = logging.getLogger(__name__)


class Waiting(BaseModel):
    """One candidate in the queue."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int
    content: str
    decision: str
    evidence: str
    """Digest of what is to be seen now; an approval names it."""
    required: int
    approved: list[str]
    """Who approved exactly this evidence."""
    submitter: str
    since: str
    reason: str
    """The gate's sentence."""
    stale: bool
    """The gate compared it with another champion than today's."""


def queue(name: str = "") -> list[Waiting]:
    """Return what awaits people, oldest first.

    Args:
        name: The registered model; every one when empty.

    Raises:
        RegistryError: A ledger was altered.
    """
    found = [waiting for one in ([name] if name else names()) for waiting in _queue(one)]
    return sorted(found, key=lambda waiting: waiting.since)


def names() -> list[str]:
    """Return every model that has a ledger."""
    keys = open_storage(registry_address()).keys("ledger")
    return sorted({key.split("/")[1] for key in keys if key.count("/") > 1})


def waiting(name: str, version: int) -> Waiting:
    """Return one candidate of the queue.

    Raises:
        RegistryError: It is not there.
    """
    for found in queue(name):
        if found.version == version:
            return found
    raise RegistryError(f"version {version} of {name!r} awaits no approval", fix=f"see: assay queue {name}")


def submit(name: str, version: int) -> Entry:
    """Put a version that passed gate and check into the queue; does nothing when it is there.

    Raises:
        RegistryError: It could not be promoted, or was rejected, or its check is not on record.
    """
    registry.check_promotion(name, version)

    def rule(entries: Sequence[Entry]) -> Draft | Entry:
        candidate = registry.candidate(name, entries, version)
        if not candidate.check:
            raise RegistryError(f"version {version} of {name!r} was not checked", fix="run the recipe again")
        for entry in candidate.entries:
            if entry.event == "awaiting":
                return entry
        return _draft("awaiting", candidate, candidate.evidence(), f"needs {candidate.required} approvals")

    entry = ledger.append(name, rule)
    announce.announce(name)
    return entry


def approve(
    name: str, version: int, reason: str, person: Person, *, evidence: str = "", acknowledge: bool = False
) -> Entry:
    """Approve a candidate, and promote it when it was the last approval that is needed.

    Args:
        name: The registered model.
        version: Of a candidate in the queue.
        reason: Why; required.
        person: Who approves; counted once.
        evidence: Digest of what the person saw (`Waiting.evidence`); empty for what is there now.
        acknowledge: The person knows that the gate compared it with another champion than today's.

    Returns:
        The entry of the promotion, or of the approval while more are needed.

    Raises:
        RegistryError: The approval would not count, or what it approves cannot be promoted; nothing is written then.
    """
    said = _require_reason(reason, "an approval")

    def rule(entries: Sequence[Entry]) -> Draft | Entry:
        candidate = registry.candidate(name, entries, version)
        registry.read_decision(candidate.registration.decision)
        registry.read_model(candidate.registration.content)
        approval.check_reviewer(candidate, person, evidence, acknowledge)
        for entry in candidate.approvals:
            if entry.actor == person.name:
                return entry
        seen = candidate.evidence(acknowledged=candidate.is_stale)
        return _draft("approved", candidate, seen, said, person)

    approved = ledger.append(name, rule)
    candidate = registry.candidate(name, registry.history(name), version)
    for entry in candidate.entries:
        if entry.event == "promoted":
            return entry  # another approver, at the same moment, was the one to promote
    if len(candidate.approvals) < candidate.required:
        return approved
    promoted = registry.promote(name, version, person)
    registry.sync_or_warn(name)
    return promoted


def reject(name: str, version: int, reason: str, person: Person, *, evidence: str = "") -> Entry:
    """Reject a candidate; one person is enough, and it is final for this decision.

    Raises:
        RegistryError: It is not in the queue, the evidence is not what the person saw, or there is no reason.
    """
    said = _require_reason(reason, "a rejection")

    def rule(entries: Sequence[Entry]) -> Draft:
        candidate = registry.candidate(name, entries, version)
        if not candidate.is_waiting or (evidence and evidence != candidate.evidence()):
            raise RegistryError(
                f"version {version} of {name!r} awaits no approval, or its evidence changed meanwhile",
                fix=f"see: assay queue {name}",
            )
        return _draft("rejected", candidate, candidate.evidence(), said, person)

    entry = ledger.append(name, rule)
    registry.sync_or_warn(name)
    return entry


def _queue(name: str) -> list[Waiting]:
    entries = registry.history(name)
    versions = sorted({entry.version for entry in entries if entry.event == "awaiting"})
    candidates = [registry.candidate(name, entries, version) for version in versions]
    return [_describe(candidate) for candidate in candidates if candidate.is_waiting]


def _describe(candidate: Candidate) -> Waiting:
    entry = candidate.registration
    return Waiting(
        name=entry.name,
        version=entry.version,
        content=entry.content,
        decision=entry.decision,
        evidence=candidate.evidence(),
        required=candidate.required,
        approved=[approved.actor for approved in candidate.approvals],
        submitter=entry.actor,
        since=next(e.time.isoformat(timespec="seconds") for e in candidate.entries if e.event == "awaiting"),
        reason=entry.reason,
        stale=candidate.is_stale,
    )


def _draft(
    event: ledger.Event, candidate: Candidate, evidence: str, reason: str, person: Person | None = None
) -> Draft:
    entry = candidate.registration
    return Draft(
        event,
        entry.version,
        entry.content,
        entry.decision,
        reason,
        evidence=evidence,
        actor=person.name if person else "",
        proof=person.proof if person else "",
    )


def _require_reason(reason: str, what: str) -> str:
    if not reason.strip():
        raise RegistryError(f"{what} needs a reason", fix="say why: --reason '…'")
    return reason.strip()
