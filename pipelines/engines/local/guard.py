"""A process that outlives a killed engine just long enough to stop the steps it left behind.

It is started as a script, in a session of its own. The engine writes `+GROUP` when a step starts and `-GROUP` when it
ended; when the pipe closes with groups left, the engine was killed, and the groups are told to stop (they save what
they have), then killed. Groups, not processes: a step's own children must not go on either.
"""

import contextlib
import os
import signal
import sys
import time


def stop(groups: set[int], grace: float) -> None:
    """Tell process groups to stop, and kill what is left of them after `grace` seconds."""
    _signal(groups, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(alive(group) for group in groups):
        time.sleep(0.05)
    _signal(groups, signal.SIGKILL)


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _signal(groups: set[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def main() -> None:
    """Follow the engine's lines to their end."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        number = int(line)
        if number > 0:
            groups.add(number)
        else:
            groups.discard(-number)
    if groups:
        stop(groups, float(sys.argv[1]))


if __name__ == "__main__":
    main()
