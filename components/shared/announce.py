"""Tell others what the registry did: each ledger entry, in order, to a command or a signed webhook, at least once.

How far a receiver is, is a cursor beside the ledger; it moves only after the receiver took an entry (exit code 0, or a
2xx answer). A crash between the two delivers the entry again, under the same delivery id (the entry's hash): a receiver
that keeps the ids it has seen acts once. The signature covers id, time and body, so an old request cannot be played
back; it is that of standardwebhooks.com, for which most languages have a library.

`ASSAY_WEBHOOK_URL` names who is told at once, by whoever promotes, rolls back, or puts a version into the queue. The
ledger has moved by then: a receiver that is down delays nothing but itself. What failed is noted beside the cursor, and
delivered at the next event, or by `assay trigger registry NAME`.

MLflow's own webhooks (`model_version_alias.created`) fire besides, where a tracking server has them configured: the
alias is set from the ledger after each of these events, and the signature is of the same scheme. They need a server
with an SQL store, not the embedded one, and MLflow tries them from memory: what a restart loses is in our cursor.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar
from urllib.parse import urlsplit

from ..contracts.artifacts import digest_of
from ..contracts.errors import RecipeError, RegistryError, RunError
from ..runtime.context import registry_address
from . import ledger
from .ledger import Entry
from .storage import open_storage

SECRET = "ASSAY_WEBHOOK_SECRET"
TOLERANCE = 300
"""Seconds by which a request's time may differ from the receiver's clock."""
TIMEOUT = 10.0
URL = "ASSAY_WEBHOOK_URL"
PAUSES = (0.5, 2.0)
"""Seconds before each further try of an announcement."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Webhook:
    """A receiver over HTTP; the address may hold a secret, so only its host is ever shown."""

    url: str
    secret: str
    events: ClassVar = ("awaiting", "promoted", "rolled_back")

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
            "webhook-id": entry.hash,
            "webhook-timestamp": now,
            "webhook-signature": sign(self.secret, entry.hash, now, body),
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
    """A program that reads the entry as JSON on its standard input; it acts on what is champion."""

    line: str
    events: ClassVar = ("promoted", "rolled_back")

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
        if entry.event in receiver.events:
            receiver.deliver(entry)
            on_delivered(entry)
            count += 1
        storage.write(key, json.dumps({"seq": entry.seq, "hash": entry.hash}).encode())
    return count


def payload(entry: Entry) -> bytes:
    """Return the body of a delivery: the entry's JSON, by which it can be checked against the ledger."""
    return entry.line()


def announce(name: str) -> None:
    """Tell the receiver of `ASSAY_WEBHOOK_URL` what is new, with a few tries; never raises: the act itself stands.

    What is not delivered is logged and noted beside the receiver's cursor (`failure`).
    """
    url = os.environ.get(URL, "").strip()
    if not url:
        return
    try:
        receiver = Webhook(url, os.environ.get(SECRET, ""))
    except RecipeError as error:
        log.warning("nobody was told of %s: %s", name, error)
        return
    for pause in (*PAUSES, None):
        try:
            deliver(name, receiver, lambda entry: None)
            return
        except RunError as error:
            if pause is None:
                _note_failure(name, receiver, error)
                log.warning("%s was not told of %s: %s", error.where, name, error.what)
                return
            time.sleep(pause)
        except Exception as error:  # the act itself is done and stands
            log.warning("nobody was told of %s: %s", name, error)
            return


def failure(name: str, receiver: Webhook | Command) -> dict[str, str] | None:
    """Return when and why the last announcement failed; None when it did not, or was made up for."""
    data = open_storage(registry_address()).read(_cursor_key(name, receiver))
    failed: dict[str, str] | None = json.loads(data).get("failed") if data else None
    return failed


def sign(secret: str, identity: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a delivery: HMAC-SHA256 over id, time and body, with dots between them.

    Args:
        secret: Text; `whsec_` and base64 where the receiver's library made it.
        identity: Of the delivery.
        timestamp: Seconds since 1970.
        body: As it is sent.
    """
    signed = f"{identity}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(_key(secret), signed, hashlib.sha256).digest()).decode()


def verify(secret: str, identity: str, timestamp: str, body: bytes, signature: str, now: float | None = None) -> bool:
    """Return whether a delivery is ours and recent; for receivers written in Python."""
    if not timestamp.isdigit() or abs((time.time() if now is None else now) - int(timestamp)) > TOLERANCE:
        return False
    good = sign(secret, identity, timestamp, body).encode()
    return any(hmac.compare_digest(good, one.encode()) for one in signature.split(" "))


def _key(secret: str) -> bytes:
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise RecipeError("the webhook's secret is not base64 behind whsec_", where=SECRET) from None


def _note_failure(name: str, receiver: Webhook | Command, error: RunError) -> None:
    storage, key = open_storage(registry_address()), _cursor_key(name, receiver)
    data = storage.read(key)
    cursor = json.loads(data) if data else {"seq": 0, "hash": ""}
    failed = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": error.what}
    storage.write(key, json.dumps({**cursor, "failed": failed}).encode())


def _cursor_key(name: str, receiver: Webhook | Command) -> str:
    return f"triggers/cursors/{digest_of([name, receiver.name])[:32]}.json"


def _cursor(data: bytes | None, entries: list[Entry], name: str) -> int:
    if data is None:
        return 0
    cursor = json.loads(data)
    if cursor["seq"] == 0:
        return 0
    if cursor["seq"] > len(entries) or entries[cursor["seq"] - 1].hash != cursor["hash"]:
        raise RegistryError(
            f"the ledger of {name!r} is another one than this receiver was told from",
            fix="check ASSAY_REGISTRY; a ledger is never cut or rewritten",
        )
    return int(cursor["seq"])
