"""`assay review`: a small web server on this machine, for people with a token.

    GET  /                        the queue, and what was decided lately
    GET  /NAME/VERSION            the evidence; POST there approves or rejects
    GET  /NAME/VERSION/report     the run's report, in a sandbox without scripts
    POST /login, /logout          a person's token for a session of this process, and its end

It refuses by default: without a person on the list it does not start, without a token every page is 401, and a request
under another host name than a loopback one is 403 (a web page cannot reach it by DNS tricks). A form carries a secret
of its session and what was shown, so no other site and no old tab can decide. Nothing is loaded from elsewhere, there
are no scripts, and all text from models and rows is escaped.
"""

import hmac
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from assay.components.contracts.errors import AssayError, RegistryError
from assay.components.deploy_model.server import listen
from assay.components.shared import people, registry, review
from assay.components.shared.people import Person

from . import evidence

HOST = "127.0.0.1"
HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
COOKIE = "assay-review"
SESSION_SECONDS = 8 * 3600
MAX_BODY = 64 * 1024
LATELY = 12
POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOLDER = Path(__file__).parent
Handler = Callable[[Request, "Session"], Awaitable[Response]]


@dataclass(frozen=True)
class Session:
    """Who asks, and the secret that this person's forms carry; empty for a request that shows the token itself."""

    person: Person
    form_key: str = ""
    ends: float = 0.0


@dataclass
class Review:
    """The pages, and who has signed in since the server started."""

    sessions: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loader = jinja2.FileSystemLoader(FOLDER)
        self.pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        self.pages.filters["number"] = evidence.numbers

    def application(self) -> Starlette:
        """Return the routes."""
        return Starlette(
            routes=[
                Route("/", self._guarded(self.queue), methods=["GET"]),
                Route("/style.css", self.style, methods=["GET"]),
                Route("/login", self.login, methods=["POST"]),
                Route("/logout", self._guarded(self.logout), methods=["POST"]),
                Route("/{name}/{version:int}", self._guarded(self.candidate), methods=["GET"]),
                Route("/{name}/{version:int}", self._guarded(self.decide), methods=["POST"]),
                Route("/{name}/{version:int}/report", self._guarded(self.report), methods=["GET"]),
            ],
            exception_handlers={HTTPException: self._refuse},
        )

    async def style(self, request: Request) -> Response:
        """Send the style sheet, the one thing that needs no token."""
        return Response((FOLDER / "style.css").read_text(encoding="utf-8"), media_type="text/css", headers=HEADERS)

    async def login(self, request: Request) -> Response:
        """Exchange a token for a session."""
        _check_origin(request)
        form = await _form(request)
        person = await run_in_threadpool(people.by_token, form.get("token", ""))
        if person is None:
            raise HTTPException(401, "this is nobody's token")
        key = secrets.token_urlsafe(32)
        self.sessions = {one: session for one, session in self.sessions.items() if session.ends > time.monotonic()}
        self.sessions[key] = Session(person, secrets.token_urlsafe(32), time.monotonic() + SESSION_SECONDS)
        answer = RedirectResponse("/", 303, headers=HEADERS)
        answer.set_cookie(COOKIE, key, max_age=SESSION_SECONDS, httponly=True, samesite="strict")
        return answer

    async def logout(self, request: Request, session: Session) -> Response:
        """End the session."""
        await self._checked_form(request, session)
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        answer = RedirectResponse("/", 303, headers=HEADERS)
        answer.delete_cookie(COOKIE)
        return answer

    async def queue(self, request: Request, session: Session) -> Response:
        """Show what waits, and what was decided lately."""

        def look() -> dict[str, Any]:
            entries = [entry for name in review.names() for entry in registry.history(name)]
            done = [entry for entry in entries if entry.event in ("approved", "rejected", "promoted", "rolled_back")]
            lately = sorted(done, key=lambda entry: entry.time, reverse=True)[:LATELY]
            return {"waiting": review.queue(), "lately": lately}

        return self._page("queue.html.j2", session, **await run_in_threadpool(look))

    async def candidate(self, request: Request, session: Session) -> Response:
        """Show the evidence for one candidate."""
        return await self._candidate(request, session)

    async def report(self, request: Request, session: Session) -> Response:
        """Send the run's report."""
        seen = await run_in_threadpool(evidence.see, request.path_params["name"], request.path_params["version"])
        if seen.report is None:
            raise HTTPException(404, "the run of this candidate is not on this machine")
        text = seen.report.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": REPORT_POLICY})

    async def decide(self, request: Request, session: Session) -> Response:
        """Approve or reject what was shown."""
        form = await self._checked_form(request, session)
        name, version = request.path_params["name"], request.path_params["version"]
        reason, shown = form.get("reason", ""), form.get("evidence", "")
        if not shown:
            raise HTTPException(400, "the form does not say what was shown")
        try:
            if form.get("verdict") == "approve":
                known = form.get("acknowledge") == "yes"
                entry = await run_in_threadpool(
                    review.approve, name, version, reason, session.person, evidence=shown, acknowledge=known
                )
            elif form.get("verdict") == "reject":
                entry = await run_in_threadpool(review.reject, name, version, reason, session.person, evidence=shown)
            else:
                raise HTTPException(400, "the form says neither approve nor reject")
        except RegistryError as error:
            return await self._candidate(request, session, error=error, reason=reason, status=409)
        return RedirectResponse(f"/{name}/{version}" if entry.event == "approved" else "/", 303, headers=HEADERS)

    async def _candidate(
        self, request: Request, session: Session, error: AssayError | None = None, reason: str = "", status: int = 200
    ) -> Response:
        seen = await run_in_threadpool(evidence.see, request.path_params["name"], request.path_params["version"])
        return self._page("candidate.html.j2", session, status, seen=seen, error=error, reason=reason)

    def _page(self, name: str, session: Session | None, status: int = 200, **values: Any) -> Response:
        text = self.pages.get_template(name).render(session=session, **values)
        return HTMLResponse(text, status, headers=HEADERS)

    def _guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            _check_host(request)
            session = await self._session(request)
            if session is None:
                raise HTTPException(401, "who are you?")
            try:
                return await handler(request, session)
            except AssayError as error:
                raise HTTPException(404, str(error)) from error

        return guarded

    async def _session(self, request: Request) -> Session | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme:
            person = await run_in_threadpool(people.by_token, token) if scheme.lower() == "bearer" else None
            return Session(person) if person else None
        found = self.sessions.get(request.cookies.get(COOKIE, ""))
        if found is None or found.ends < time.monotonic():
            return None
        # The token may have been taken away since.
        listed = await run_in_threadpool(people.is_active, found.person.name)
        return found if listed else None

    async def _checked_form(self, request: Request, session: Session) -> dict[str, str]:
        """Return a form that this person's own page sent; a request with the token itself needs no such proof."""
        form = await _form(request)
        if session.form_key:
            _check_origin(request)
            if not hmac.compare_digest(form.get("key", "").encode(), session.form_key.encode()):
                raise HTTPException(403, "the form is not of this session: load the page again")
        return form

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        template = "login.html.j2" if error.status_code == 401 else "refused.html.j2"
        wrong = request.url.path == "/login" or "authorization" in request.headers
        return self._page(template, None, error.status_code, message=error.detail, wrong=wrong)


def serve(port: int) -> None:
    """Answer on loopback until the process is told to stop; prints the address as one JSON line.

    Args:
        port: 0 takes a free one.

    Raises:
        RegistryError: Nobody is on the list of people.
        RunError: The port is in use.
    """
    if not people.names():
        raise RegistryError(
            "nobody may review: the registry has no list of people", fix="add one: assay review --add-person NAME"
        )
    with listen(HOST, port) as listener:
        config = uvicorn.Config(
            Review().application(), lifespan="off", log_level="warning", access_log=False, server_header=False
        )
        sys.stdout.write(json.dumps({"url": f"http://{HOST}:{listener.getsockname()[1]}/"}) + "\n")
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[listener])


def _check_host(request: Request) -> None:
    if (request.url.hostname or "") not in HOSTS:
        raise HTTPException(403, "this server answers to loopback names only")


def _check_origin(request: Request) -> None:
    """Refuse a form that another site sent; browsers say where a form comes from."""
    _check_host(request)
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    here = request.headers.get("host", "")
    if site not in ("same-origin", "none") or (origin is not None and urlsplit(origin).netloc != here):
        raise HTTPException(403, "the form comes from another site")


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise HTTPException(413, "the form is too large")
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise HTTPException(400, "this is no form") from None
    return {name: values[-1] for name, values in fields.items()}
