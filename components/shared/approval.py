"""Approval: after the gate and the check of the served model, people decide; the rules, on the entries of a ledger.

    registered → awaiting → approved … → promoted      or rejected, which is final for that decision

An approval names the digest of what its author saw: the decision record, the dossier, the check, and who was champion.
When any of these is another one later, the approval no longer counts. A candidate that was compared with another
champion than today's is let in only by people who say that they know it (`acknowledged`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..contracts.artifacts import digest_of
from ..contracts.errors import RegistryError
from .dossier import read_dossier
from .ledger import Entry
from .people import Person

REACHES_CHAMPION = ("promoted", "rolled_back")


@dataclass(frozen=True)
class Candidate:
    """A registered version, and what there is to see of it today."""

    registration: Entry
    required: int
    """People who must approve it; 0 for none."""
    check: str
    """Digest of the record of how it was checked; empty while it was not."""
    compared: str | None
    """Content of the champion that the gate compared it with."""
    champion: str | None
    """Content of today's champion."""
    listed: bool
    """The registry has a list of people: only what was proven by a token counts."""
    entries: Sequence[Entry]
    """What the ledger says of this decision: of this version, since it was registered with it."""

    @property
    def is_stale(self) -> bool:
        """Whether the gate compared it with another champion than today's."""
        return self.compared != self.champion

    def evidence(self, acknowledged: bool = False) -> str:
        """Return the digest of what a person decides on."""
        return digest_of(
            {
                "version": self.registration.version,
                "content": self.registration.content,
                "decision": self.registration.decision,
                "dossier": self.registration.evidence,
                "check": self.check,
                "champion": self.champion,
                "acknowledged": acknowledged,
            }
        )

    @property
    def is_waiting(self) -> bool:
        """Whether it was put into the queue and nobody has rejected or promoted it."""
        events = [entry.event for entry in self.entries]
        return "awaiting" in events and not {"rejected", "promoted"} & set(events)

    @property
    def approvals(self) -> list[Entry]:
        """Approvals that count: of different people, of exactly this evidence, acknowledged where it is stale."""
        wanted = self.evidence(acknowledged=self.is_stale)
        good = [entry for entry in self.entries if entry.event == "approved" and entry.evidence == wanted]
        counted = [entry for entry in good if self.may_approve(entry.actor) and (entry.proof or not self.listed)]
        return list({entry.actor: entry for entry in counted}.values())

    def may_approve(self, person: str) -> bool:
        """Return whether a person's approval counts: of two, neither submitted it."""
        return self.required < 2 or person != self.registration.actor


def required(entries: Sequence[Entry], registration: Entry) -> int:
    """Return how many people a version needs.

    That is what its recipe asks for, and never fewer than today's champion, or any candidate since it, was registered
    with: to ask for fewer, a version with such a recipe must become champion under the old rule first.
    """
    made = next((entry for entry in reversed(entries) if entry.event in REACHES_CHAMPION), None)
    known = [entry for entry in entries if entry.event == "registered"]
    counted = [entry for entry in known if made is None or entry.version == made.version or entry.seq > made.seq]
    dossiers = {entry.evidence for entry in [*counted, registration] if entry.evidence}
    return max((read_dossier(digest).approvals for digest in dossiers), default=0)


def of_registration(entries: Sequence[Entry], registration: Entry) -> list[Entry]:
    """Return the entries about a version since it was registered with this decision."""
    since = [entry for entry in entries if entry.seq > registration.seq and entry.version == registration.version]
    return [entry for entry in since if entry.decision == registration.decision]


def require(candidate: Candidate) -> None:
    """Refuse to promote what not enough people approved.

    Raises:
        RegistryError: Says how many are missing.
    """
    missing = candidate.required - len(candidate.approvals)
    if missing > 0:
        version, name = candidate.registration.version, candidate.registration.name
        raise RegistryError(
            f"version {version} of {name!r} needs {candidate.required} approvals, and {missing} are missing",
            fix=f"see it with: assay queue {name}; then: assay approve {name} --version {version} --reason '…'",
        )


def refuse_rejected(entries: Sequence[Entry], registration: Entry) -> None:
    """Refuse what a person rejected.

    Raises:
        RegistryError: Says who, when and why.
    """
    for entry in entries:
        same = (entry.version, entry.decision) == (registration.version, registration.decision)
        if entry.event == "rejected" and same:
            raise RegistryError(
                f"version {entry.version} was rejected on {entry.time:%Y-%m-%d} by {entry.actor} ({entry.reason})",
                fix="change the recipe or the data: another model, or new evidence for this one, is another decision",
            )


def check_reviewer(candidate: Candidate, person: Person, evidence: str, acknowledge: bool) -> None:
    """Refuse an approval that would not count.

    Args:
        candidate: As the ledger has it now.
        person: Who approves.
        evidence: Digest of what the person saw; empty for what is there now.
        acknowledge: The person knows that the gate compared with another champion than today's.

    Raises:
        RegistryError: Not in the queue, other evidence, a stale comparison, or the one who submitted it.
    """
    version, name = candidate.registration.version, candidate.registration.name
    if not candidate.is_waiting:
        raise RegistryError(f"version {version} of {name!r} awaits no approval", fix=f"see: assay queue {name}")
    if evidence and evidence != candidate.evidence():
        raise RegistryError(
            f"the evidence for version {version} is not what you saw: something changed meanwhile",
            fix="look at it again, then decide",
        )
    if candidate.is_stale and not acknowledge:
        raise RegistryError(
            f"version {version} was compared with another champion than today's",
            fix="run the recipe again, which compares with today's; or acknowledge it: --acknowledge-champion",
        )
    if not candidate.may_approve(person.name):
        raise RegistryError(
            f"{person.name} submitted version {version}, and it needs two other people",
            fix="ask two others; who submits may reject, not approve",
        )
