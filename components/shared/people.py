"""Who may decide. A registry without a list of people believes the given name; one with a list asks for a token.

    people/NAME.json    salt and sha256 of the person's token; the token itself is shown once and kept nowhere

On one machine without a list, the operating system is the authority: whoever may write the registry's folder may act
under any name, and two names are two people only by trust. With a list, an approval needs the token that was given to
one person. What protects the list is what protects the ledger: who may write the storage may write both.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..contracts.errors import RegistryError
from ..runtime.context import registry_address
from .ledger import identity
from .storage import open_storage

TOKEN = "ASSAY_REVIEW_TOKEN"
PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Person:
    """Who acts, and how that is known."""

    name: str
    proof: Literal["", "token"] = ""


class Secret(BaseModel):
    """What the registry keeps of a token: 256 random bits need no slow hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str
    sha256: str
    """Empty when the person may no longer decide."""


def add(name: str) -> str:
    """Let a person decide, and return the token to give to that person; an older one is void.

    Raises:
        RegistryError: The name cannot be one.
    """
    if not PERSON.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name a person", fix="use letters, digits, '.', '-' and '_'; at most 64")
    token = f"{name}:{secrets.token_urlsafe(32)}"
    salt = secrets.token_hex(16)
    _write(name, Secret(salt=salt, sha256=_hash(salt, token)))
    return token


def remove(name: str) -> None:
    """Let a person decide no more; the list stays a list even when nobody is left on it.

    Raises:
        RegistryError: There is no such person.
    """
    if name not in names():
        raise RegistryError(f"{name!r} is not on the list", fix=f"choose one of {names()}")
    _write(name, Secret(salt="", sha256=""))


def names() -> list[str]:
    """Return everybody who is or was on the list."""
    keys = open_storage(registry_address()).keys("people")
    return [key.removeprefix("people/").removesuffix(".json") for key in keys]


def is_active(name: str) -> bool:
    """Return whether a person is on the list today."""
    data = open_storage(registry_address()).read(f"people/{name}.json")
    return data is not None and bool(Secret.model_validate_json(data).sha256)


def by_token(token: str) -> Person | None:
    """Return whose token this is; None when it is nobody's."""
    name, _, rest = token.strip().partition(":")
    if not rest or not PERSON.fullmatch(name):
        return None
    data = open_storage(registry_address()).read(f"people/{name}.json")
    secret = Secret.model_validate_json(data) if data else Secret(salt="", sha256="")
    if not secret.sha256 or not hmac.compare_digest(_hash(secret.salt, token.strip()), secret.sha256):
        return None
    return Person(name, "token")


def who(given: str = "") -> Person:
    """Return who acts on the command line.

    Args:
        given: The name that was given; `ASSAY_PERSON`, or the user of the operating system, when empty.

    Raises:
        RegistryError: The registry has a list of people, and `ASSAY_REVIEW_TOKEN` holds no token of one.
    """
    if not names():
        return Person(given or identity())
    person = by_token(os.environ.get(TOKEN, ""))
    if person is None or given not in ("", person.name):
        raise RegistryError(
            "this registry has a list of people, so who decides must show a token",
            fix=f"put yours into {TOKEN} (assay review --add-person NAME makes one)",
        )
    return person


def _write(name: str, secret: Secret) -> None:
    open_storage(registry_address()).write(f"people/{name}.json", secret.model_dump_json().encode())


def _hash(salt: str, token: str) -> str:
    return hashlib.sha256(f"{salt}:{token}".encode()).hexdigest()
