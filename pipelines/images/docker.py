"""The docker command line, with BuildKit, and what its errors mean to a user."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from assay.components.contracts.errors import RunError

CLIENT_WITH_BUILDKIT = 23
"""Clients older than this one carry BuildKit themselves; from it on the plugin buildx does."""

MEANINGS = (
    (
        r"Cannot connect to the Docker daemon|error during connect|docker\.sock: connect: no such",
        "the Docker daemon does not answer",
        "start it (`systemctl start docker`), or point DOCKER_HOST at one",
    ),
    (
        r"permission denied while trying to connect",
        "this user may not talk to the Docker daemon",
        "join the group `docker`, or use rootless Docker",
    ),
    (
        r"no space left on device",
        "the Docker daemon's disk is full",
        "free some: `docker system df`, then `docker builder prune`",
    ),
    (
        r"buildx component is missing|BuildKit is enabled but",
        "this docker client has no BuildKit",
        "install docker-buildx",
    ),
    (
        r"pull access denied|manifest unknown|failed to resolve source|failed to do request",
        "the base image cannot be had",
        "give another one with --base; containers/local-base.sh makes one where there is no registry",
    ),
    (
        r"no basic auth credentials|unauthorized|authentication required|access to the resource is denied|denied: ",
        "the registry does not know you, or you may not write there",
        "log in with `docker login REGISTRY` and try again",
    ),
    (
        r"name unknown|repository .* does not exist",
        "the registry has no such repository",
        "create it first; some registries do not at the first push",
    ),
    (
        r"this torch is built for",
        "no torch of this accelerator was found",
        "give --torch-index or --wheels with torch's CPU wheels",
    ),
    (
        r"connection refused|no such host|i/o timeout|TLS handshake|certificate signed by unknown",
        "the registry cannot be reached",
        "check its name and the network",
    ),
)
"""What a line of docker's error output says, what that means, and what to do; the first that matches counts."""


def find_client() -> str:
    """Return the path of the first docker client on the path that has BuildKit.

    Raises:
        RunError: There is none.
    """
    clients = [found for folder in os.get_exec_path() if (found := shutil.which("docker", path=folder))]
    if not clients:
        raise RunError(
            "there is no docker client on the path", fix="install Docker (on Debian: apt-get install docker.io)"
        )
    able = next((client for client in clients if _has_buildkit(client)), None)
    if able is None:
        raise RunError("this docker client has no BuildKit", where=clients[0], fix="install docker-buildx")
    return able


def run(client: str, arguments: Sequence[str], *, stdin: IO[bytes] | None = None, shown: bool = False) -> str:
    """Run docker and return its standard output, without the last line break.

    Args:
        client: Path of the client.
        arguments: After the word `docker`.
        stdin: What it reads.
        shown: Let the user see its progress, which docker writes to standard error.

    Raises:
        RunError: It failed; says why as far as that is known, and quotes docker.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    tail: deque[str] = deque(maxlen=40)
    with (
        tempfile.TemporaryFile("w+") as output,  # a pipe could fill while the other one is read
        subprocess.Popen(
            [client, *arguments], stdin=stdin, stdout=output, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
    ):
        for line in process.stderr or ():
            tail.append(line.rstrip())
            if shown:
                sys.stderr.write(line)
        process.wait()
        output.seek(0)
        told = output.read().rstrip("\n")
    if process.returncode:
        raise explain("\n".join(tail) or told, arguments[0])
    return told


def explain(message: str, command: str) -> RunError:
    """Return docker's error in a user's words."""
    for pattern, what, fix in MEANINGS:
        found = re.search(pattern, message, re.IGNORECASE)
        if found:
            line = next(line for line in message.splitlines() if found.group().splitlines()[0] in line)
            return RunError(f"{what} ({line.strip()[:200]})", where=f"docker {command}", fix=fix)
    end = " | ".join(line.strip() for line in message.splitlines()[-5:] if line.strip())
    return RunError(f"failed: {end[:800]}", where=f"docker {command}", fix="see docker's output above")


def import_folder(client: str, folder: Path, name: str) -> str:
    """Make an image that holds a folder's files and nothing else, and return its name.

    Raises:
        RunError: There is no such folder, or docker fails.
    """
    if not folder.is_dir():
        raise RunError("there is no such folder", where=str(folder), fix="give the folder that holds the wheels")
    with subprocess.Popen(["tar", "-C", str(folder), "-cf", "-", "."], stdout=subprocess.PIPE) as packing:
        assert packing.stdout is not None
        run(client, ["import", "-", name], stdin=packing.stdout)
    return name


def _has_buildkit(client: str) -> bool:
    """Tell without asking the daemon, which may not run."""
    version = subprocess.run([client, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.", version)
    if found is None:
        return False
    plugin = subprocess.run([client, "buildx", "version"], capture_output=True)
    return int(found.group(1)) < CLIENT_WITH_BUILDKIT or plugin.returncode == 0
