"""The ledger: append-only, one object per entry, each chained to the one before by its hash.

    ledger/NAME/entries/00000001.json      an entry, in canonical JSON
                acknowledged/00000001      its hash, written once the entry is there

An entry is created under its number or not at all, so of two writers one is told, looks again, and decides anew. Every
reader can tell a changed, removed, inserted or reordered entry, and an end that was cut off: a number that was
acknowledged must be there, and a writer acknowledges the last entry before it adds the next. The chain is not a
signature: who may write the storage may write a whole new history. Guard it (infra/aws/assay.yaml has a bucket policy
that lets nobody overwrite or delete an entry).
"""

import getpass
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from ..contracts.artifacts import digest_of
from ..contracts.errors import RegistryError
from ..runtime.context import registry_address
from .storage import Storage, open_storage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
TURNS = 100
"""Entries that others may add while one writer tries to."""
Event = Literal["registered", "awaiting", "approved", "rejected", "promoted", "held", "rolled_back"]
LATER = ("evidence", "proof")
"""Fields that entries did not have from the beginning; left out where empty, so that older entries keep their hash."""


class Entry(BaseModel):
    """One entry of a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    """1 for the first entry; also the number in its key."""
    time: AwareDatetime
    """UTC; never earlier than the entry before, even if the machine's clock was set back."""
    event: Event
    name: str
    version: int
    """Of the MLflow registry; 0 for an attempt that was held."""
    content: str
    """Content digest of the model's files (`Manifest.content`)."""
    decision: str
    """sha256 of the decision record."""
    replaces: int = 0
    """The version that was champion before; 0 for none. Only of `promoted` and `rolled_back`."""
    actor: str
    """Who: `ASSAY_PERSON`, or the user name as the operating system tells it; believed, unless `proof` says more."""
    reason: str
    evidence: str = ""
    """Of `registered`: sha256 of the version's dossier. Of what waits or is approved or rejected: digest of what was
    seen (`approval.py`)."""
    proof: Literal["", "token"] = ""
    """`token`: the actor showed the secret that was given to that person alone (`people.py`)."""
    prev: str
    """Hash of the entry before; of the first one, the digest of the ledger's name."""
    hash: str = ""
    """sha256 over all of the above in canonical JSON."""

    def sealed(self) -> "Entry":
        """Return the entry with its hash."""
        said = {name: value for name, value in self._said().items() if name != "hash"}
        return self.model_copy(update={"hash": digest_of(said)})

    def line(self) -> bytes:
        """Return the entry as it is stored."""
        return json.dumps(self._said(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def _said(self) -> dict[str, Any]:
        said = self.model_dump(mode="json")
        return {name: value for name, value in said.items() if value or name not in LATER}


@dataclass(frozen=True)
class Draft:
    """What an entry says, before it has a place in the chain."""

    event: Event
    version: int
    content: str
    decision: str
    reason: str
    replaces: int = 0
    evidence: str = ""
    actor: str = ""
    """Empty for who runs this process (`identity`)."""
    proof: Literal["", "token"] = ""

    def after(self, name: str, last: Entry | None) -> Entry:
        """Return the entry that follows `last`."""
        now = datetime.now(UTC)
        return Entry(
            seq=last.seq + 1 if last else 1,
            time=max(now, last.time) if last else now,
            event=self.event,
            name=name,
            version=self.version,
            content=self.content,
            decision=self.decision,
            replaces=self.replaces,
            actor=self.actor or identity(),
            reason=self.reason,
            evidence=self.evidence,
            proof=self.proof,
            prev=last.hash if last else _genesis(name),
        ).sealed()


Rule = Callable[[Sequence[Entry]], Draft | Entry]
"""Looks at a verified ledger and says what to add, or returns the entry that says it already; or raises."""


def read(name: str) -> list[Entry]:
    """Return a ledger's entries, verified; an empty list when there is no ledger.

    Raises:
        RegistryError: The ledger is not what was written; names the entry.
    """
    return _read(_storage(), folder(name), name)


def append(name: str, rule: Rule) -> Entry:
    """Add the entry that a rule asks for, and return it once it is durable.

    The rule is asked again, with a fresh ledger, whenever somebody else added an entry meanwhile.

    Args:
        name: The registered model.
        rule: Decides on the entries; what it raises is passed on.

    Raises:
        RegistryError: The ledger is not what was written.
    """
    storage, place = _storage(), folder(name)
    for _ in range(TURNS):
        entries = _read(storage, place, name)
        asked = rule(entries)
        if isinstance(asked, Entry):
            return asked
        last = entries[-1] if entries else None
        if last:
            _acknowledge(storage, place, last)  # a crash may have come between the entry and this
        entry = asked.after(name, last)
        if storage.create(_entry_key(place, entry.seq), entry.line()):
            _acknowledge(storage, place, entry)
            return entry
    raise RegistryError(f"the ledger of {name!r} is too busy", where=f"{storage.address}/{place}", fix="try again")


def identity() -> str:
    """Return who acts: `ASSAY_PERSON` where it is set, else the user name of the operating system; nobody checks it."""
    given = os.environ.get("ASSAY_PERSON", "").strip()
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def folder(name: str) -> str:
    """Return the key below which a model's ledger lies.

    Raises:
        RegistryError: The name cannot be the name of a registered model.
    """
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot name a registered model", fix="use letters, digits, '-' and '_'; at most 128"
        )
    return f"ledger/{name}"


def _read(storage: Storage, place: str, name: str) -> list[Entry]:
    acknowledged = storage.keys(f"{place}/acknowledged")  # before the entries: each of these must be there
    keys = storage.keys(f"{place}/entries")
    entries: list[Entry] = []
    with ThreadPoolExecutor(8) as pool:
        for key, data in zip(keys, pool.map(storage.read, keys), strict=True):
            entries.append(_verify(f"{storage.address}/{key}", name, data, entries[-1] if entries else None))
    _verify_end(storage, place, entries, acknowledged)
    return entries


def _verify(where: str, name: str, data: bytes | None, last: Entry | None) -> Entry:
    number = last.seq + 1 if last else 1
    try:
        entry = Entry.model_validate_json(data or b"")
    except ValidationError:
        raise _broken(where, "this is not an entry") from None
    if entry.line() != data or entry.sealed().hash != entry.hash:
        raise _broken(where, "the entry was changed after it was written (its hash differs)")
    chained = entry.prev == (last.hash if last else _genesis(name)) and entry.seq == number and entry.name == name
    if not chained or not where.endswith(_entry_key("", number)):
        raise _broken(where, "the entry does not follow the one before: an entry was removed, added or moved")
    return entry


def _verify_end(storage: Storage, place: str, entries: list[Entry], acknowledged: list[str]) -> None:
    count = int(acknowledged[-1].rpartition("/")[2]) if acknowledged else 0
    if len(entries) < count:
        where = f"{storage.address}/{_entry_key(place, len(entries) + 1)}"
        raise _broken(where, f"the end was cut off: {len(entries)} of {count} acknowledged entries are there")
    if count and storage.read(acknowledged[-1]) != entries[count - 1].hash.encode():
        where = f"{storage.address}/{_entry_key(place, count)}"
        raise _broken(where, "the entry is not the one that was acknowledged")
    if len(entries) > count + 1:  # others went on while we read, or the acknowledgements were removed
        now = storage.keys(f"{place}/acknowledged")
        if len(now) + 1 < len(entries):
            where = f"{storage.address}/{_entry_key(place, len(now) + 2)}"
            raise _broken(where, f"{len(now)} entries are acknowledged, {len(entries)} are there")


def _acknowledge(storage: Storage, place: str, entry: Entry) -> None:
    storage.create(f"{place}/acknowledged/{entry.seq:08d}", entry.hash.encode())


def _entry_key(place: str, number: int) -> str:
    return f"{place}/entries/{number:08d}.json"


def _broken(where: str, what: str) -> RegistryError:
    return RegistryError(
        what,
        where=where,
        fix="restore the ledger from a backup; nothing is promoted or served from a ledger that was altered",
    )


def _storage() -> Storage:
    return open_storage(registry_address())


def _genesis(name: str) -> str:
    return digest_of({"ledger": name})
