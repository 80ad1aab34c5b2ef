"""The ledger's file: append-only, one JSON line per entry, each chained to the one before by its hash.

Beside `NAME.jsonl` stands `NAME.head.json`, the sequence number and hash of the last entry that was acknowledged; it is
written after the line is on the disk. So every reader can tell a changed, removed, inserted or reordered line, an end
that was cut off, and the one harmless case: a line that a crash left half written was never acknowledged, readers
leave it out, and the next writer removes it. The chain is not a signature: who may write the folder may write a whole
new history. Guard the folder.
"""

import fcntl
import getpass
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from ..contracts.artifacts import digest_of, write_atomically
from ..contracts.errors import RegistryError
from ..runtime.context import registry_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
Event = Literal["registered", "promoted", "held", "rolled_back"]

log = logging.getLogger(__name__)


class Entry(BaseModel):
    """One line of a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    """1 for the first entry; also its line number."""
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
    """User name as the operating system tells it; not authenticated."""
    reason: str
    prev: str
    """Hash of the entry before; of the first one, the digest of the ledger's name."""
    hash: str = ""
    """sha256 over all of the above in canonical JSON."""

    def sealed(self) -> "Entry":
        """Return the entry with its hash."""
        return self.model_copy(update={"hash": digest_of(self.model_dump(mode="json", exclude={"hash"}))})

    def line(self) -> bytes:
        """Return the entry as it stands in the file, without the newline."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode()


class Head(BaseModel):
    """The last acknowledged entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    hash: str


class Ledger:
    """A verified ledger, held under its lock by one writer."""

    def __init__(self, name: str, entries: list[Entry]) -> None:
        self.name, self.entries = name, entries

    def append(
        self, event: Event, *, version: int, content: str, decision: str, reason: str, replaces: int = 0
    ) -> Entry:
        """Add an entry; when this returns, it is on the disk."""
        now = datetime.now(UTC)
        last = self.entries[-1] if self.entries else None
        entry = Entry(
            seq=len(self.entries) + 1,
            time=max(now, last.time) if last else now,
            event=event,
            name=self.name,
            version=version,
            content=content,
            decision=decision,
            replaces=replaces,
            actor=_actor(),
            reason=reason,
            prev=last.hash if last else _genesis(self.name),
        ).sealed()
        with ledger_path(self.name).open("ab") as file:
            file.write(entry.line() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)
        _acknowledge(self.name, entry)
        return entry


def ledger_path(name: str) -> Path:
    """Return the path of a model's ledger.

    Raises:
        RegistryError: The name cannot be the name of a registered model.
    """
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot name a registered model", fix="use letters, digits, '-' and '_'; at most 128"
        )
    return registry_folder() / "ledger" / f"{name}.jsonl"


def read(name: str) -> list[Entry]:
    """Return a ledger's entries, verified; an empty list when there is no ledger.

    Raises:
        RegistryError: The ledger is not what was written; names the line.
    """
    path = ledger_path(name)
    if not path.exists() and not _head_path(name).exists():
        return []
    with _locked(path.with_suffix(".lock"), fcntl.LOCK_SH):
        entries, torn = _read(name)
    if torn:
        log.warning("%s: the last line is half written (a crash); it was never acknowledged and is left out", path)
    return entries


@contextmanager
def writing(name: str) -> Iterator[Ledger]:
    """Hold a ledger alone, verified and free of a half-written end.

    Raises:
        RegistryError: The ledger is not what was written.
    """
    path = ledger_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock"), fcntl.LOCK_EX):
        entries, torn = _read(name)
        if torn:
            log.warning("%s: removed %d bytes of a line that a crash left half written", path, torn)
            os.truncate(path, path.stat().st_size - torn)
        if entries and _read_head(name) != _head_of(entries[-1]):
            _acknowledge(name, entries[-1])  # the crash came between the line and the head
        yield Ledger(name, entries)


@contextmanager
def registering(name: str) -> Iterator[None]:
    """Let one process at a time register versions of `name`; readers of the ledger do not wait."""
    path = ledger_path(name).with_suffix(".register.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, fcntl.LOCK_EX):
        yield


def _read(name: str) -> tuple[list[Entry], int]:
    """Return the entries and the number of bytes of a half-written last line."""
    path = ledger_path(name)
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entries.append(_verify(name, number, line, entries[-1] if entries else None))
    _verify_end(name, entries)
    return entries, len(rest)


def _verify(name: str, number: int, line: bytes, last: Entry | None) -> Entry:
    try:
        entry = Entry.model_validate_json(line)
    except ValidationError:
        raise _broken(name, number, "this is not an entry") from None
    if entry.line() != line or entry.sealed().hash != entry.hash:
        raise _broken(name, number, "the entry was changed after it was written (its hash differs)")
    if entry.prev != (last.hash if last else _genesis(name)) or entry.seq != number or entry.name != name:
        raise _broken(name, number, "the entry does not follow the one before: a line was removed, added or moved")
    return entry


def _verify_end(name: str, entries: list[Entry]) -> None:
    head = _read_head(name)
    acknowledged = head.seq if head else 0
    if len(entries) < acknowledged:
        missing = f"line {len(entries) + 1}" + (f" to {acknowledged}" if acknowledged > len(entries) + 1 else "")
        raise _broken(name, len(entries) + 1, f"the end was cut off: {missing} of {acknowledged} is missing")
    if head and entries[head.seq - 1].hash != head.hash:
        raise _broken(name, head.seq, "the entry is not the one that the head file names")
    if len(entries) > acknowledged + 1:  # a crash can leave one line ahead of the head, not two
        raise _broken(name, acknowledged + 2, f"the head file acknowledges {acknowledged} entries only")


def _broken(name: str, line: int, what: str) -> RegistryError:
    return RegistryError(
        what,
        where=f"{ledger_path(name)}, line {line}",
        fix="restore the ledger folder from a backup; nothing is promoted or served from a ledger that was altered",
    )


def _head_path(name: str) -> Path:
    return ledger_path(name).with_suffix(".head.json")


def _read_head(name: str) -> Head | None:
    path = _head_path(name)
    if not path.exists():
        return None
    try:
        return Head.model_validate_json(path.read_bytes())
    except ValidationError:
        raise RegistryError(
            "the ledger's head file cannot be read", where=str(path), fix="restore the ledger folder from a backup"
        ) from None


def _head_of(entry: Entry) -> Head:
    return Head(seq=entry.seq, hash=entry.hash)


def _acknowledge(name: str, entry: Entry) -> None:
    path = _head_path(name)
    write_atomically(path, _head_of(entry).model_dump_json() + "\n")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a rename is on the disk only when its folder is
    finally:
        os.close(folder)


def _genesis(name: str) -> str:
    return digest_of({"ledger": name})


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


@contextmanager
def _locked(path: Path, mode: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, mode)
        yield  # closing the file releases the lock
