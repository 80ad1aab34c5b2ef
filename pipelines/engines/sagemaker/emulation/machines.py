"""Where a job's container runs: in Docker where a daemon answers, else as a process with a private /opt/ml."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from assay.components.contracts.errors import RunError

ROOT = "/opt/ml"
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
"""What a process keeps of our environment: what it takes to start Python at all."""


@dataclass(frozen=True)
class Load:
    """What is to run."""

    name: str
    image: str
    command: list[str]
    """Entry point and arguments."""
    environment: Mapping[str, str]
    ml: Path
    """The folder that is /opt/ml."""
    log: Path


class Machine:
    """A process on this machine."""

    def __init__(self, load: Load) -> None:
        self.load = load
        with load.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    self._line(),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise RunError(f"{load.command[0]!r} cannot be started: {error.strerror}", where=load.name) from error

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; return the exit code, or None while it runs."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Send SIGTERM to the first process alone, as a container runtime does; the rest is its business."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Take the machine away."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _line(self) -> list[str]:
        first, *rest = self.load.command
        return [sys.executable if first in ("python", "python3") else first, *rest]

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _PASSED if name in os.environ}
        given = {name: self._here(value) for name, value in self.load.environment.items()}
        return {**kept, **given, "ASSAY_ML_ROOT": str(self.load.ml)}

    def _here(self, value: str) -> str:
        inside = value == ROOT or value.startswith(f"{ROOT}/")
        return f"{self.load.ml}{value.removeprefix(ROOT)}" if inside else value


class Container(Machine):
    """A container; the network is the host's, so that it reaches moto's server."""

    def __init__(self, load: Load) -> None:
        for path in (load.ml, *load.ml.rglob("*")):  # the image's user need not be ours
            path.chmod(0o777 if path.is_dir() else 0o666)
        super().__init__(load)

    def terminate(self) -> None:
        """Send SIGTERM to the container's first process."""
        self._docker("kill", "--signal", "TERM", self.load.name)

    def kill(self) -> None:
        """Take the container away."""
        self._docker("rm", "--force", self.load.name)
        self.process.wait()

    def _line(self) -> list[str]:
        first, *rest = self.load.command
        variables = [part for name in self.load.environment for part in ("--env", name)]  # values stay out of `ps`
        return [
            *("docker", "run", "--rm", "--name", self.load.name, "--network", "host"),
            *("--volume", f"{self.load.ml}:{ROOT}", *variables, "--entrypoint", first, self.load.image, *rest),
        ]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.load.environment}

    @staticmethod
    def _docker(*arguments: str) -> None:
        subprocess.run(["docker", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def docker_answers() -> bool:
    """Say whether there is a Docker daemon to run containers."""
    if not shutil.which("docker"):
        return False
    asked = subprocess.run(["docker", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return asked.returncode == 0
