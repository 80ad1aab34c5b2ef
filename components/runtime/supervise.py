"""A step as the child of a small process that outlives it: signals go down, the reason of a death comes up.

The child may be killed for want of memory; who watches it can still say so.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

from .context import RESUME_EXIT

TAIL_LINES = 20


class Child:
    """One child process; SIGTERM to us is SIGTERM to it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = False
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines that it wrote to standard error."""

    def stop(self, signum: int = signal.SIGTERM, frame: object = None) -> None:
        """Ask the child to save and end; a child that has not started never does."""
        self.stopping = True
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end and return its exit code, `RESUME_EXIT` when it was stopped."""
        if self.stopping:
            return RESUME_EXIT
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        reader = threading.Thread(target=self._read, args=[self.process.stderr], daemon=True)
        reader.start()
        if self.stopping:  # the signal came between the question and the start
            self.stop()
        code = self.process.wait()
        reader.join(timeout=2)  # a grandchild may hold the pipe open
        if self.stopping and code in (-signal.SIGTERM, 1, RESUME_EXIT):  # torchrun ends with 1
            return RESUME_EXIT
        return code if code >= 0 else 128 - code

    def words(self, code: int) -> str:
        """Say how the child ended, in one line."""
        last = next((line.strip() for line in reversed(self.tail) if line.strip()), "it said nothing")
        if code > 128:
            name = signal.Signals(code - 128).name
            return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}: {last}"
        return f"exit code {code}: {last}"

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            self.tail.append(text)
