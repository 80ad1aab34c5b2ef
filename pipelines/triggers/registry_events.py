"""Tell others what the registry did: each ledger entry, in order, to a command or a signed webhook, at least once.

How far a receiver is, is a cursor beside the ledger; it moves only after the receiver took an entry (exit code 0, or a
2xx answer). A crash between the two delivers the entry again, under the same delivery id (the entry's hash): a receiver
that keeps the ids it has seen acts once. The signature covers the time, so an old request cannot be played back.
"""

import hashlib
import hmac
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.errors import RecipeError, RegistryError, RunError
from assay.components.runtime.context import registry_address
from assay.components.shared import ledger
from assay.components.shared.ledger import Entry
from assay.components.shared.storage import open_storage

SECRET = "ASSAY_WEBHOOK_SECRET"
TOLERANCE = 300
"""Seconds by which a request's time may differ from the receiver's clock."""
TIMEOUT = 10.0
EVENTS = ("promoted", "rolled_back")


@dataclass(frozen=True)
class Webhook:
    """A receiver over HTTP; the address may hold a secret, so only its host is ever shown."""

    url: str
    secret: str

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        loopback = address.hostname in ("127.0.0.1", "::1", "localhost")
        if address.scheme != "https" and not (address.scheme == "http" and loopback):
            raise RecipeError("a webhook needs https", where=str(address.hostname), fix="give an https:// address")
        if len(self.secret) < 16:
            raise RecipeError(
                "a webhook needs a secret of at least 16 characters", where=SECRET, fix=f"put one into {SECRET}"
            )

    @property
    def name(self) -> str:
        """What the cursor is kept under."""
        return f"webhook {self.url}"

    def deliver(self, entry: Entry) -> None:
        """Post an entry.

        Raises:
            RunError: No answer, or another one than 2xx.
        """
        import httpx

        body, now = payload(entry), str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "X-Assay-Delivery": entry.hash,
            "X-Assay-Timestamp": now,
            "X-Assay-Signature": sign(self.secret, now, body),
        }
        try:
            answer = httpx.post(self.url, content=body, headers=headers, timeout=TIMEOUT, follow_redirects=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._failed(type(error).__name__) from None  # its text would show the address
        if not answer.is_success:
            raise self._failed(f"it answered {answer.status_code}")

    def _failed(self, what: str) -> RunError:
        return RunError(
            f"the webhook did not take the entry: {what}",
            where=str(urlsplit(self.url).hostname),
            fix="it is delivered again at the next call",
        )


@dataclass(frozen=True)
class Command:
    """A program that reads the entry as JSON on its standard input."""

    line: str

    @property
    def name(self) -> str:
        """What the cursor is kept under."""
        return f"command {self.line}"

    def deliver(self, entry: Entry) -> None:
        """Run the program, without a shell.

        Raises:
            RunError: It cannot be run, or ends with another code than 0.
        """
        secret = {name: value for name, value in os.environ.items() if name != SECRET}
        try:
            done = subprocess.run(shlex.split(self.line), input=payload(entry), env=secret, check=False)
        except OSError as error:
            raise RunError(f"cannot be run: {error.strerror}", where=self.line, fix="correct the command") from error
        if done.returncode:
            raise RunError(
                f"the command did not take the entry (exit code {done.returncode})",
                where=self.line,
                fix="it is called again for this entry at the next call",
            )


def deliver(name: str, receiver: Webhook | Command, on_delivered: Callable[[Entry], None]) -> int:
    """Bring a receiver up to date and return how many entries it took.

    Args:
        name: The registered model.
        receiver: Who is told; the first call begins at the ledger's first entry.
        on_delivered: Called after each entry that was taken.

    Raises:
        RegistryError: The ledger was altered, or is another one than the receiver was told from.
        RunError: The receiver did not take an entry; the next call begins with it.
    """
    storage, key = open_storage(registry_address()), _cursor_key(name, receiver)
    entries = ledger.read(name)
    seen = _cursor(storage.read(key), entries, name)
    count = 0
    for entry in entries[seen:]:
        if entry.event in EVENTS:
            receiver.deliver(entry)
            on_delivered(entry)
            count += 1
        storage.write(key, json.dumps({"seq": entry.seq, "hash": entry.hash}).encode())
    return count


def payload(entry: Entry) -> bytes:
    """Return the body of a delivery: the entry's JSON, by which it can be checked against the ledger."""
    return entry.line()


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a delivery: HMAC-SHA256 over the time, a dot and the body."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def verify(secret: str, timestamp: str, body: bytes, signature: str, now: float | None = None) -> bool:
    """Return whether a delivery is ours and recent; for receivers written in Python."""
    if not timestamp.isdigit() or abs((time.time() if now is None else now) - int(timestamp)) > TOLERANCE:
        return False
    return hmac.compare_digest(sign(secret, timestamp, body).encode(), signature.encode())


def _cursor_key(name: str, receiver: Webhook | Command) -> str:
    return f"triggers/cursors/{digest_of([name, receiver.name])[:32]}.json"


def _cursor(data: bytes | None, entries: list[Entry], name: str) -> int:
    if data is None:
        return 0
    cursor = json.loads(data)
    if cursor["seq"] > len(entries) or entries[cursor["seq"] - 1].hash != cursor["hash"]:
        raise RegistryError(
            f"the ledger of {name!r} is another one than this receiver was told from",
            fix="check ASSAY_REGISTRY; a ledger is never cut or rewritten",
        )
    return int(cursor["seq"])
