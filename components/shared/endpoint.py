"""Asks a model behind an OpenAI-compatible server: many questions at a time, none twice, and within a budget.

As many workers as the endpoint may have requests at a time take questions from one list, so that the server is never
idle while one of them waits, retries or writes. Answers are kept on disk as they come (`responses.py`): a killed
evaluation asks again only what was on its way. A server that says to wait is believed, by all workers at once.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ..contracts.artifacts import digest_of
from ..contracts.errors import ModelError
from ..contracts.recipe import EndpointSettings
from ..contracts.rows import Message
from ..runtime import context
from .responses import ResponseStore

if TYPE_CHECKING:
    import httpx

RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
BACKOFF = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LONGEST_WAIT = 60.0
"""Seconds, whatever a server's Retry-After says."""
FLUSH = 1.0
"""Seconds of answers that a kill may cost."""
REPORTED = 0.2
"""Seconds between reports of progress."""

Key = tuple[int, ...]


class Reply(NamedTuple):
    """An answer, and what it cost."""

    text: str
    tokens: int
    """Of prompt and answer, as the server counts them; 0 where it does not say."""


class Endpoint:
    """A model behind a server.

    Args:
        settings: Where it is, and what may be asked of it. The key is read from the environment and kept nowhere.
        max_new_tokens: Longest answer.
    """

    def __init__(self, settings: EndpointSettings, max_new_tokens: int) -> None:
        self.settings = settings
        self.address = f"{settings.url.rstrip('/')}/chat/completions"
        self.body = {
            "model": settings.model,
            "max_completion_tokens": max_new_tokens,
            "temperature": 0,
            **settings.body,
        }
        self.digest = digest_of([self.address, self.body])
        self.store = ResponseStore(self.digest, {"endpoint": 1})

    def ask(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """Return the reply to each conversation.

        Raises:
            ModelError: The server refuses, does not answer after all attempts, or the budget is spent. What was
                answered is kept.
        """
        bodies = [self._encode(conversation) for conversation in conversations]
        keys = [tuple(hashlib.sha256(body).digest()) for body in bodies]
        known = self.store.find(keys)
        left = {key: body for key, body in zip(keys, bodies, strict=True) if key not in known}
        if left:
            known |= _Round(self, known, left).run()
        return [Reply(str(known[key]["text"]), int(known[key]["tokens"])) for key in keys]

    def _encode(self, conversation: Sequence[Message]) -> bytes:
        body = {**self.body, "messages": [turn.model_dump() for turn in conversation]}
        return json.dumps(body, ensure_ascii=False).encode()


class _Round:
    """One asking of what is not known yet."""

    def __init__(self, endpoint: Endpoint, known: Mapping[Key, dict[str, Any]], left: Mapping[Key, bytes]) -> None:
        self.endpoint, self.settings = endpoint, endpoint.settings
        self.left: Iterator[tuple[Key, bytes]] = iter(left.items())
        self.total, self.before = len(left), len(known)
        self.requests, self.tokens = len(known), sum(int(answer["tokens"]) for answer in known.values())
        self.answers: dict[Key, dict[str, Any]] = {}
        self.unsaved: dict[Key, dict[str, Any]] = {}
        self.problem: ModelError | None = None
        self.over: tuple[str, int] | None = None
        """What of the budget is spent, and how much it was."""
        self.where = f"{self.settings.name} ({endpoint.address})"
        self.next_start = self.saved = self.reported = 0.0

    def run(self) -> dict[Key, dict[str, Any]]:
        """Return the new answers.

        Raises:
            ModelError: As `Endpoint.ask` says.
        """
        try:
            asyncio.run(self._run())
        finally:
            self.endpoint.store.add(self.unsaved)
        if self.problem:
            raise self.problem
        if self.over:
            raise self._over(*self.over)
        return self.answers

    async def _run(self) -> None:
        import httpx

        key = os.environ.get(self.settings.key_variable, "").strip()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        most = self.settings.concurrency
        self.stopped, self.starting = asyncio.Event(), asyncio.Lock()
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=self.settings.timeout) as client:
            await asyncio.gather(*(self._work(client) for _ in range(min(most, self.total))))

    async def _work(self, client: "httpx.AsyncClient") -> None:
        for key, body in self.left:
            answer = await self._ask(client, body)
            if answer is None:
                return
            self.answers[key] = self.unsaved[key] = answer
            self.tokens += int(answer["tokens"])
            await self._keep()

    def _may_ask(self) -> bool:
        """Tell whether another request may be sent; where the budget is spent, stop."""
        for what, spent in (("requests", self.requests), ("tokens", self.tokens)):
            most = getattr(self.settings, f"max_{what}")
            if most and spent >= most:
                self.over = self.over or (what, most)
                self.stopped.set()
        return not self.stopped.is_set()

    def _over(self, what: str, most: int) -> ModelError:
        done = self.before + len(self.answers)
        return ModelError(
            f"the budget of {most:,} {what} is spent: {done:,} of {self.before + self.total:,} answered",
            where=self.where,
            fix=f"raise evaluate.endpoints.{self.settings.name}.max_{what}, or lower evaluate.max_rows, and run again: "
            "what was answered is kept",
        )

    async def _ask(self, client: "httpx.AsyncClient", body: bytes) -> dict[str, Any] | None:
        """Return an answer, or None where the round has stopped."""
        import httpx

        problem = ""
        for attempt in range(self.settings.attempts):
            await self._turn()
            if not self._may_ask():
                return None
            self.requests += 1
            wait = BACKOFF * 2**attempt
            try:
                response = await client.post(self.endpoint.address, content=body)
            except httpx.TransportError as error:
                problem = type(error).__name__
            else:
                if response.status_code not in RETRIED:
                    return self._read(response)
                problem = f"HTTP {response.status_code}"
                if asked := seconds_to_wait(response.headers.get("Retry-After", "")):
                    wait = min(asked, LONGEST_WAIT)
                    self.next_start = max(self.next_start, time.monotonic() + wait)  # for every worker
            if attempt + 1 < self.settings.attempts:
                await self._sleep(wait)
        self._stop(
            f"no answer in {self.settings.attempts} attempts; the last ended with {problem}",
            "check the url and the server's limits (requests_per_minute), then run again: what was answered is kept",
        )
        return None

    async def _turn(self) -> None:
        """Wait until a request may start: at the pace that was agreed, and when the server said."""
        async with self.starting:
            while not self.stopped.is_set() and (left := self.next_start - time.monotonic()) > 0:
                await self._sleep(left)
            if pace := self.settings.requests_per_minute:
                self.next_start = time.monotonic() + 60 / pace

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or wake when the round stops."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self.stopped.wait(), seconds)
            except TimeoutError:
                return

    def _read(self, response: "httpx.Response") -> dict[str, Any] | None:
        """Return an answer; the body of a refusal is not shown, for it may repeat a part of the key."""
        status = response.status_code
        if status in (401, 403):
            variable = self.settings.key_variable
            self._stop(f"the server refuses the key (HTTP {status})", f"set the environment variable {variable}")
            return None
        if status != 200:
            self._stop(
                f"the server refuses (HTTP {status})",
                "check that url ends in /v1, that the server knows the model, and that the questions fit into it",
            )
            return None
        try:
            value = response.json()
            usage = value.get("usage") or {}
            return {
                "text": str(value["choices"][0]["message"]["content"] or ""),
                "tokens": int(usage.get("total_tokens") or 0),
            }
        except (ValueError, LookupError, TypeError, AttributeError):
            self._stop("the reply is no OpenAI chat completion", "check the url")
            return None

    async def _keep(self) -> None:
        """Write answers to disk once a second, off the loop, and report progress."""
        now = time.monotonic()
        if now - self.saved > FLUSH:
            self.saved, batch, self.unsaved = now, self.unsaved, {}
            await asyncio.to_thread(self.endpoint.store.add, batch)
        if now - self.reported > REPORTED or len(self.answers) == self.total:
            self.reported = now
            done = self.before + len(self.answers)
            context.progress(done, self.before + self.total, f"answers of {self.settings.name}")

    def _stop(self, what: str, fix: str) -> None:
        self.problem = self.problem or ModelError(what, where=self.where, fix=fix)
        self.stopped.set()


def seconds_to_wait(value: str) -> float:
    """Return the seconds of a Retry-After header, which is a number or a date; 0 for none, or one that is past."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
