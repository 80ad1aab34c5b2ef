"""The connection to a Kubeflow Pipelines server: log in once, ask with a time limit, and say in a sentence what failed.

`kfp.Client` is made here; the calls go through the service APIs that it carries, because its own methods print to
standard output, have no time limit, and lead errors through as stacks of HTTP headers.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from assay.components.contracts.errors import RecipeError, RunError

from .profile import Profile

TIMEOUT = (5, 60)
"""Seconds to connect, and to wait for an answer."""
_PAGE = 100
_SECRET = re.compile(r"(Bearer\s+|authservice_session=|oauth2_proxy\S*=)\S+", re.IGNORECASE)


class Refused(RunError):
    """The server answered, and not as wished."""

    def __init__(self, what: str, *, where: str, fix: str, status: int) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status = status
        """Of HTTP."""


class Server:
    """A server that answered, and the profile it was reached by."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        with talking(profile, "reach the server"):
            self.client = _client(profile)
            health = self.client.healthzs.healthz_service_get_healthz(_request_timeout=TIMEOUT)
        _check(health, profile)

    def call(self, what: str, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call one of the service APIs.

        Args:
            what: What is being done, to complete "cannot …".
            function: For example `client.runs.run_service_get_run`.
            arguments: Its arguments.

        Raises:
            RunError: The server cannot be reached, or refuses.
        """
        with talking(self.profile, what):
            return function(**arguments, _request_timeout=TIMEOUT)

    def listed(self, what: str, function: Callable[..., Any], field: str, name: str, **arguments: Any) -> list[Any]:
        """Return everything of a display name, page by page."""
        found: list[Any] = []
        token = ""
        while True:
            page = self.call(
                what,
                function,
                page_size=_PAGE,
                page_token=token,
                sort_by="created_at asc",
                filter=_named(name),
                **arguments,
            )
            found += getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return found

    def url(self, run_id: str) -> str:
        """Return where a person can look at a run."""
        return f"{(self.profile.ui or self.profile.host).rstrip('/')}/#/runs/details/{run_id}"


@contextmanager
def talking(profile: Profile, what: str) -> Iterator[None]:
    """Turn what can go wrong between here and the server into one sentence.

    Raises:
        RunError: With what, where and what to do.
    """
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise refusal(profile, what, error.status, error.body or error.reason) from None
    except urllib3.exceptions.HTTPError as error:
        raise _unreachable(profile, error) from None


def refusal(profile: Profile, what: str, status: int, body: Any) -> RunError:
    """Return the error for an answer that is none of the good ones.

    Args:
        profile: Of the server.
        what: What was being done.
        status: Of HTTP; 0 when TLS failed before there was one.
        body: The server's words, JSON or not.
    """
    words = _SECRET.sub(r"\1…", _words(body))
    if status == 0:
        return _untrusted(profile, words)
    fixes = {
        401: ("the login was refused: the token or cookie has expired, or is not for this server", _renew(profile)),
        403: (
            f"this login may not {what}" + (f" in namespace {profile.namespace!r}" if profile.namespace else ""),
            "ask for the role kubeflow-edit in that namespace, or name another namespace in the deploy profile",
        ),
        404: (
            f"cannot {what}: {words}",
            "check host, namespace and experiment in the deploy profile",
        ),
    }
    what, fix = fixes.get(status, (f"cannot {what}: {words} (HTTP {status})", "look into the log of ml-pipeline"))
    return Refused(what, where=profile.host, fix=fix, status=status)


def _client(profile: Profile) -> Any:
    if not profile.host:
        raise RecipeError(
            "no host is given",
            where="deploy profile",
            fix="name the address of Kubeflow Pipelines' API with --deploy FILE",
        )
    from kfp.client import Client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it wants a server of version 2
        return Client(
            host=profile.host,
            # Any name but `kubeflow` keeps the constructor from asking the server, five times; calls name their own.
            namespace=profile.namespace if profile.namespace != "kubeflow" else "unused",
            credentials=_credentials(profile),
            cookies=_cookie(profile),
            ssl_ca_cert=str(profile.ca_file) if profile.ca_file else None,
        )


def _credentials(profile: Profile) -> Any:
    """Return credentials that read the token's file at each request: the cluster renews it there."""
    path = profile.auth.token_file
    if path is None:
        return None
    try:
        empty = not path.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path), fix="correct auth.token_file") from None
    if empty:
        raise RecipeError("the token file is empty", where=str(path), fix="log in again")
    from kfp.client import ServiceAccountTokenVolumeCredentials

    return ServiceAccountTokenVolumeCredentials(str(path.expanduser()))


def _cookie(profile: Profile) -> str | None:
    name = profile.auth.cookie_env
    if not name:
        return None
    if not os.environ.get(name):
        raise RecipeError("the variable of the session cookie is not set", where=f"${name}", fix="log in and export it")
    return os.environ[name]


def _check(health: Any, profile: Profile) -> None:
    """Refuse a server that is none, and a namespace where there are none (or the other way round)."""
    if health.multi_user is None:
        raise RunError(
            "what answers there is not the API of Kubeflow Pipelines; it may be a login page",
            where=profile.host,
            fix="give the API's address (often ending in /pipeline), and auth.token_file or auth.cookie_env",
        )
    if health.multi_user and not profile.namespace:
        raise RecipeError(
            "this server has users, and the deploy profile names no namespace",
            where=profile.host,
            fix="add namespace: …",
        )
    if not health.multi_user and profile.namespace:
        raise RecipeError(
            "this server has no users", where=profile.host, fix="leave namespace out of the deploy profile"
        )


def _named(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _words(body: Any) -> str:
    """Return the server's message: one line of it."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        answer = json.loads(text)
        text = str(answer.get("message") or answer.get("error") or text)
    except (ValueError, AttributeError):
        pass
    return text.strip().partition("\n")[0][:300]


def _renew(profile: Profile) -> str:
    if profile.auth.token_file:
        return f"renew the token in {profile.auth.token_file}"
    if profile.auth.cookie_env:
        return f"log in again and export ${profile.auth.cookie_env}"
    return "give auth.token_file or auth.cookie_env in the deploy profile"


def _unreachable(profile: Profile, error: Exception) -> RunError:
    import urllib3

    cause = getattr(error, "reason", None) or error
    if isinstance(cause, urllib3.exceptions.SSLError):
        return _untrusted(profile, str(cause))
    kinds = {
        urllib3.exceptions.NameResolutionError: "there is no host of this name",
        urllib3.exceptions.NewConnectionError: "the connection is refused",  # a child of the next one
        urllib3.exceptions.ConnectTimeoutError: f"nothing answers within {TIMEOUT[0]} s",
        urllib3.exceptions.ReadTimeoutError: f"the server did not answer within {TIMEOUT[1]} s",
    }
    words = next((text for kind, text in kinds.items() if isinstance(cause, kind)), "the connection broke")
    return RunError(
        f"Kubeflow Pipelines cannot be reached: {words}",
        where=profile.host,
        fix="check host in the deploy profile, the VPN, or the port-forward",
    )


def _untrusted(profile: Profile, words: str) -> RunError:
    reason = "the name in it is another" if "mismatch" in words or "doesn't match" in words else "its issuer is unknown"
    if "expired" in words:
        reason = "it has expired"
    return RunError(
        f"the server's TLS certificate is not trusted: {reason}",
        where=profile.host,
        fix="name the certificate authority's file with ca_file in the deploy profile",
    )
