"""Build images, push them, and name them by digest.

A tag is the digest of what the image is made of, so a build that changed nothing is the same image, and a registry
that has the tag has the image. Graphs name an image by the digest that the registry gave it: `ASSAY_IMAGE_<ROLE>`.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from assay.components.contracts.errors import RunError
from assay.components.runtime.step import IMAGES

from . import docker
from .roles import Accelerator, Role, image_digest, root

BASE = "python:3.11-slim-bookworm"
WHEELS_IMAGE = "assay-wheels:local"
TAG_DIGITS = 16


@dataclass(frozen=True)
class Build:
    """What the images of one build have in common."""

    base: str = BASE
    accelerator: Accelerator = "cpu"
    torch_index: str = ""
    """Package index with torch's CPU wheels."""
    wheels: Path | None = None
    """Folder of wheels, for a machine that reaches no such index."""

    def tag(self, role: Role) -> str:
        """Return the local name of a role's image: repository and digest of what it is made of."""
        digest = image_digest(role, self.accelerator, self.base)[:TAG_DIGITS]
        variant = "-cuda" if self.accelerator == "cuda" and role != "data" else ""
        return f"{IMAGES[role]}:{digest}{variant}"


def build(role: Role, settings: Build) -> str:
    """Build a role's image and return its name; `latest` names it too, so a graph without digests finds it here.

    Raises:
        RunError: Docker is missing or fails.
    """
    client, name = docker.find_client(), settings.tag(role)
    wheels = "scratch"  # the empty image
    if settings.wheels and role != "data":
        wheels = docker.import_folder(client, settings.wheels, WHEELS_IMAGE)
    given = {
        "BASE": settings.base,
        "ACCELERATOR": settings.accelerator,
        "TORCH_INDEX": settings.torch_index,
        "WHEELS": wheels,
    }
    labels = {
        "org.opencontainers.image.version": name.partition(":")[2],
        "org.opencontainers.image.revision": _revision(),
        "org.opencontainers.image.base.name": settings.base,
        "assay.role": role,
        "assay.code-digest": image_digest(role, settings.accelerator, settings.base),
    }
    arguments = ["build", "--progress", "plain", "--file", str(root() / "containers" / "Dockerfile"), "--target", role]
    arguments += [f"--build-arg={key}={value}" for key, value in given.items()]
    arguments += [f"--label={key}={value}" for key, value in labels.items()]
    arguments += ["--tag", name, "--tag", f"{IMAGES[role]}:latest", str(root())]
    docker.run(client, arguments, shown=True)
    return name


def push(role: Role, settings: Build, registry: str) -> str:
    """Push a built image below a registry's prefix and return its reference by digest.

    Raises:
        RunError: It is not built, stands on this machine's own base, or the registry refuses.
    """
    client, name = docker.find_client(), settings.tag(role)
    _check_shippable(client, name)
    remote = f"{registry.rstrip('/')}/{name}"
    docker.run(client, ["tag", name, remote])
    docker.run(client, ["push", remote], shown=True)
    return reference(role, settings, registry)


def reference(role: Role, settings: Build, registry: str) -> str:
    """Return `repository@sha256:…` of an image that was pushed from this machine.

    Raises:
        RunError: It was not.
    """
    repository = f"{registry.rstrip('/')}/{IMAGES[role]}"
    name = f"{registry.rstrip('/')}/{settings.tag(role)}"
    listed = _inspect(docker.find_client(), name, '{{join .RepoDigests "\\n"}}', f"assay images push --role {role}")
    found = [line for line in listed.splitlines() if line.startswith(f"{repository}@sha256:")]
    if not found:
        raise RunError("this image was not pushed yet", where=name, fix=f"run `assay images push --role {role}`")
    return found[0]


def images_file(references: dict[Role, str]) -> str:
    """Return the lines of an images file: what `compile` reads, and what a shell can source."""
    return "".join(f"{variable(role)}={name}\n" for role, name in references.items())


def read_images_file(path: Path) -> dict[str, str]:
    """Return the variables of an images file.

    Raises:
        RunError: It cannot be read, or a line is not `ASSAY_IMAGE_<ROLE>=reference`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(
            f"cannot be read: {error.strerror}", where=str(path), fix="run `assay images digest -o`"
        ) from error
    known, found = {variable(role) for role in IMAGES}, {}
    for number, line in enumerate(lines, start=1):
        name, _, value = line.strip().partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if name not in known or not value:
            raise RunError(
                f"not an image: {line!r}", where=f"{path}:{number}", fix=f"write one of {', '.join(sorted(known))}=…"
            )
        found[name] = value
    return found


def use_images_file(path: Path) -> None:
    """Let the graph name the images of a file; call it before a graph is imported, which is when steps learn theirs.

    Raises:
        RunError: As for `read_images_file`.
    """
    os.environ.update(read_images_file(path))


def variable(role: str) -> str:
    """Return the environment variable that names a role's image."""
    return f"ASSAY_IMAGE_{role.upper()}"


def _check_shippable(client: str, name: str) -> None:
    """Refuse an image that trusts this machine's certificate authorities."""
    local = _inspect(client, name, '{{index .Config.Labels "assay.local-base"}}', "assay images build")
    if local == "true":
        raise RunError(
            "this image stands on a base made for this machine only",
            where=name,
            fix="build it on a base that others can have: `assay images build --base …@sha256:…`",
        )


def _inspect(client: str, name: str, template: str, fix: str) -> str:
    try:
        return docker.run(client, ["image", "inspect", "--format", template, name])
    except RunError as error:
        if "No such image" not in error.what:
            raise
        raise RunError("there is no such image here", where=name, fix=f"run `{fix}` first") from error


def _revision() -> str:
    """Return git's commit of the source tree; `unknown` where there is no git."""
    try:
        told = subprocess.run(["git", "-C", str(root()), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return told.stdout.strip() or "unknown"
