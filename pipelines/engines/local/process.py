"""One step as one process group: start it, follow its progress, stop it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from assay.components.contracts.errors import RunError

from . import guard

GRACE_SECONDS = 20.0
"""How long a step may take to save what it has after SIGTERM."""
_POLL_SECONDS = 0.2

Progress = Callable[[dict[str, Any]], None]


@dataclass
class Stop:
    """The wish that a run end now; every wait in the engine listens to it."""

    event: threading.Event = field(default_factory=threading.Event)
    reason: str = ""
    at_once: bool = False
    """Do not wait for steps to save."""

    def request(self, reason: str) -> None:
        """Ask for the end; asked again, steps are killed."""
        self.at_once = self.event.is_set()
        self.reason = self.reason or reason
        self.event.set()

    @property
    def wanted(self) -> bool:
        """Whether the run is to end."""
        return self.event.is_set()


class Guard:
    """The engine's end of the pipe to `guard.py`; started with the first step."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *reason: object) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()

    def tell(self, number: int) -> None:
        """Add a process group, or with a minus take it away."""
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", guard.__file__, str(GRACE_SECONDS)],
                    stdin=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{number}\n")
                self.process.stdin.flush()


@dataclass(frozen=True)
class Command:
    """What to start."""

    line: list[str]
    environment: Mapping[str, str]
    log: Path
    progress: Path
    """File to which the step appends JSON lines."""
    timeout: float | None
    """Seconds it may run."""
    keep_open: IO[Any]
    """A lock that the step and its children hold too: it is free only when all of them are gone."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    exit_code: int
    seconds: float
    timed_out: bool = False


def run(command: Command, stop: Stop, guard_: Guard, on_progress: Progress) -> Ended:
    """Run a process group to its end, or stop it when the run is to end or its time is up.

    Raises:
        RunError: The program cannot be started.
        OSError: The log cannot be written.
    """
    started = time.monotonic()
    deadline = started + command.timeout if command.timeout else None
    command.progress.unlink(missing_ok=True)
    process = _start(command)
    guard_.tell(process.pid)
    follow = _Follower(command.progress, on_progress)
    try:
        timed_out = _wait(process, stop, deadline, follow)
    finally:
        _end(process, stop)
        guard_.tell(-process.pid)
    follow()
    return Ended(process.returncode, time.monotonic() - started, timed_out)


def _start(command: Command) -> subprocess.Popen[bytes]:
    with command.log.open("ab") as log:
        try:
            return subprocess.Popen(
                command.line,
                env=dict(command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(command.keep_open.fileno(),),
            )
        except OSError as error:
            raise RunError(
                f"the program {command.line[0]!r} cannot be started: {error.strerror}",
                fix="install it; or, if the arguments are too long, pass the large one as an artifact",
            ) from error


def _wait(process: subprocess.Popen[bytes], stop: Stop, deadline: float | None, follow: Callable[[], None]) -> bool:
    """Wait for the end of a process; return whether its time was up first."""
    while not stop.wanted:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            return False
        follow()
        if deadline and time.monotonic() > deadline:
            return True
    return False


def _end(process: subprocess.Popen[bytes], stop: Stop) -> None:
    """Stop what is left of a process group: politely when its leader still runs, then by force."""
    group = process.pid
    if process.poll() is None:
        _signal(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not stop.at_once:
            time.sleep(0.02)
    _signal(group, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class _Follower:
    """Reads the lines that a step appends to its progress file, and passes on the last one."""

    def __init__(self, path: Path, on_progress: Progress) -> None:
        self.path, self.on_progress, self.position = path, on_progress, 0

    def __call__(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in reversed(whole.splitlines()):
            with contextlib.suppress(ValueError):
                self.on_progress(json.loads(line))
                return
