"""Promotions and rollbacks reach a real HTTP receiver and a real command: in order, signed, at least once."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.errors import RecipeError, RegistryError, RunError
from assay.components.shared import announce, ledger, registry
from assay.components.shared.announce import Command, Webhook, deliver, failure, sign, verify
from assay.components.shared.ledger import Draft, Entry
from fixtures.shelf import Shelf

NAME, SECRET = "lamps", "0123456789abcdef-secret"


def append(event: str, version: int) -> Entry:
    draft = Draft(event, version, f"{version:064d}", "d" * 64, reason=f"because of {version}")
    return ledger.append(NAME, lambda entries: draft)


class Receiver:
    """Keeps what it is sent, and answers what it is told to."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((dict(self.headers), body))
                self.send_response(outer.answers.pop(0) if outer.answers else 204)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hooks?token=hidden"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ignore(entry: Entry) -> None:
    pass


def versions(receiver: Receiver) -> list[tuple[str, int]]:
    return [(entry["event"], entry["version"]) for entry in (json.loads(body) for _, body in receiver.requests)]


def test_each_event_is_told_once_in_order_and_signed(shelf: Shelf, receiver: Receiver) -> None:
    for event, version in (("registered", 1), ("promoted", 1), ("held", 0), ("promoted", 2), ("rolled_back", 1)):
        append(event, version)
    hook = Webhook(receiver.url, SECRET)
    assert deliver(NAME, hook, ignore) == 3
    assert deliver(NAME, hook, ignore) == 0
    assert versions(receiver) == [("promoted", 1), ("promoted", 2), ("rolled_back", 1)]
    headers, body = receiver.requests[0]
    assert verify(SECRET, headers["webhook-id"], headers["webhook-timestamp"], body, headers["webhook-signature"])
    assert headers["webhook-id"] == Entry.model_validate_json(body).hash == ledger.read(NAME)[1].hash
    append("promoted", 3)
    assert deliver(NAME, hook, ignore) == 1
    assert b"secret" not in b"".join(shelf.get(key) for key in shelf.keys(""))
    assert b"hidden" not in b"".join(shelf.get(key) for key in shelf.keys(""))


@pytest.mark.parametrize("answer", [500, 404, 302])
def test_what_was_not_taken_is_told_again(shelf: Shelf, receiver: Receiver, answer: int) -> None:
    append("promoted", 1)
    append("promoted", 2)
    receiver.answers = [204, answer]
    hook = Webhook(receiver.url, SECRET)
    with pytest.raises(RunError, match=f"it answered {answer}") as error:
        deliver(NAME, hook, ignore)
    assert "hidden" not in str(error.value)
    assert deliver(NAME, hook, ignore) == 1
    assert [version for _, version in versions(receiver)] == [1, 2, 2]
    assert receiver.requests[1][0]["webhook-id"] == receiver.requests[2][0]["webhook-id"]


def test_a_crash_after_the_answer_delivers_again_under_the_same_id(shelf: Shelf, receiver: Receiver) -> None:
    append("promoted", 1)

    def crash(entry: Entry) -> None:
        raise KeyboardInterrupt

    hook = Webhook(receiver.url, SECRET)
    with pytest.raises(KeyboardInterrupt):
        deliver(NAME, hook, crash)
    assert deliver(NAME, hook, ignore) == 1
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1


def test_two_receivers_have_a_cursor_each(shelf: Shelf, receiver: Receiver) -> None:
    append("promoted", 1)
    assert deliver(NAME, Webhook(receiver.url, SECRET), ignore) == 1
    assert deliver(NAME, Webhook(f"{receiver.url}&second", SECRET), ignore) == 1


def test_nobody_listens(shelf: Shelf, receiver: Receiver) -> None:
    append("promoted", 1)
    receiver.server.shutdown()
    receiver.server.server_close()
    with pytest.raises(RunError, match="did not take the entry: ConnectError") as error:
        deliver(NAME, Webhook(receiver.url, SECRET), ignore)
    assert "hidden" not in str(error.value)
    assert error.value.where == "127.0.0.1"


def test_a_ledger_that_was_exchanged_is_not_told(shelf: Shelf, receiver: Receiver) -> None:
    append("promoted", 1)
    hook = Webhook(receiver.url, SECRET)
    deliver(NAME, hook, ignore)
    for key in shelf.keys("ledger/"):
        shelf.delete(key)
    with pytest.raises(RegistryError, match="another one than this receiver was told from"):
        deliver(NAME, hook, ignore)
    append("promoted", 7)
    with pytest.raises(RegistryError, match="another one"):
        deliver(NAME, hook, ignore)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("url", "secret", "words"),
    [
        ("http://example.com/hook", SECRET, "needs https"),
        ("ftp://127.0.0.1/hook", SECRET, "needs https"),
        ("https://example.com/hook", "", "at least 16"),
        ("https://example.com/hook", "short", "at least 16"),
    ],
)
def test_an_unsafe_webhook_is_refused(url: str, secret: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        Webhook(url, secret)
    assert SECRET not in str(error.value)


def test_what_a_receiver_must_not_believe() -> None:
    now, body = str(int(time.time())), b'{"version":1}'
    signature = sign(SECRET, "id", now, body)
    assert verify(SECRET, "id", now, body, signature)
    assert verify(SECRET, "id", now, body, f"v1,older {signature}")
    assert not verify(SECRET, "id", now, body + b" ", signature)
    assert not verify(SECRET, "other", now, body, signature)
    assert not verify("another secret, as long", "id", now, body, signature)
    assert not verify(SECRET, "id", str(int(now) + 1), body, signature)
    assert not verify(SECRET, "id", now, body, signature, now=float(now) + 301)
    for wrong in ("", "v1,", "v1,é", signature.removeprefix("v1,")):
        assert not verify(SECRET, "id", now, body, wrong)
    assert not verify(SECRET, "id", "soon", body, signature)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of the specification's libraries (standardwebhooks.com)."""
    secret, identity, timestamp = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330"
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign(secret, identity, timestamp, b'{"test": 2432232314}') == expected


# --- announcements ----------------------------------------------------------------------------------------------------


@pytest.fixture
def told(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    monkeypatch.setenv("ASSAY_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("ASSAY_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(announce, "PAUSES", (0.0, 0.0))
    return receiver


def test_an_announcement_is_tried_again(shelf: Shelf, told: Receiver) -> None:
    append("promoted", 1)
    told.answers = [500, 503]
    announce.announce(NAME)
    assert versions(told) == [("promoted", 1)] * 3
    assert failure(NAME, Webhook(told.url, SECRET)) is None


def test_a_receiver_that_is_down_is_noted_and_told_later(shelf: Shelf, told: Receiver, caplog) -> None:
    append("promoted", 1)
    append("promoted", 2)
    told.answers = [204, 500, 500, 500]
    announce.announce(NAME)
    assert "was not told of lamps: the webhook did not take the entry: it answered 500" in caplog.text
    assert "hidden" not in caplog.text
    failed = failure(NAME, Webhook(told.url, SECRET))
    assert failed is not None
    assert "it answered 500" in failed["what"]
    append("awaiting", 3)
    announce.announce(NAME)
    assert versions(told)[-2:] == [("promoted", 2), ("awaiting", 3)]
    assert failure(NAME, Webhook(told.url, SECRET)) is None


def test_nothing_that_goes_wrong_reaches_whoever_promotes(shelf: Shelf, told: Receiver, monkeypatch, caplog) -> None:
    append("promoted", 1)
    told.answers = [500] * 3
    announce.announce(NAME)
    monkeypatch.setenv("ASSAY_WEBHOOK_SECRET", "short")
    announce.announce(NAME)
    assert "at least 16" in caplog.text
    monkeypatch.delenv("ASSAY_WEBHOOK_URL")
    announce.announce(NAME)
    assert len(told.requests) == 3


def test_a_rollback_tells_by_itself(shelf: Shelf, told: Receiver, tmp_path: Path, monkeypatch) -> None:
    from fixtures.attempts import Attempt

    monkeypatch.setattr(registry, "sync_alias", lambda name: {})
    first = Attempt(tmp_path / "1", "one")
    second = Attempt(tmp_path / "2", "two", champion=first.content)
    for version, attempt in ((1, first), (2, second)):
        attempt.register_in_ledger(NAME, version)
        registry.promote(NAME, version)
    registry.rollback(NAME, "doses were wrong")
    assert versions(told) == [("promoted", 1), ("promoted", 2), ("rolled_back", 1)]


def test_a_command_reads_the_entry_and_never_the_secret(shelf: Shelf, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ASSAY_WEBHOOK_SECRET", SECRET)
    append("awaiting", 4)  # not champion yet, so nothing for a program that acts on champions
    append("promoted", 4)
    script = tmp_path / "told.py"
    script.write_text(
        "import json, os, sys, pathlib\n"
        "entry = json.load(sys.stdin)\n"
        f"path = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "path.open('a').write(f\"{entry['version']} {os.environ.get('ASSAY_WEBHOOK_SECRET')}\\n\")\n"
        f"sys.exit(not pathlib.Path({str(tmp_path / 'ready')!r}).exists())\n"
    )
    command = Command(f"{sys.executable} {script}")
    with pytest.raises(RunError, match="exit code 1"):
        deliver(NAME, command, ignore)
    (tmp_path / "ready").touch()
    assert deliver(NAME, command, ignore) == 1
    assert (tmp_path / "log").read_text() == "4 None\n4 None\n"


def test_a_command_that_is_not_there_is_told(shelf: Shelf) -> None:
    append("promoted", 4)
    with pytest.raises(RunError, match="cannot be run: No such file"):
        deliver(NAME, Command("no-such-program-anywhere"), ignore)
