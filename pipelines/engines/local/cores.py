"""The core budget: what runs at once never asks for more cores than there are."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from .process import Stop

_EPSILON = 1e-9


def available() -> int:
    """Return the cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Cores:
    """Grants cores in the order of asking, so that a wide step is never passed over for ever."""

    def __init__(self, total: float) -> None:
        self.total = total
        self.free = total
        self.queue: deque[object] = deque()
        self.changed = threading.Condition()

    @contextmanager
    def hold(self, wanted: float, stop: Stop) -> Iterator[float]:
        """Wait for cores and hold them; yield how many: a step that asks for more than there are gets all.

        When the run is to end the wait ends too, with nothing granted (0).
        """
        ticket, granted = object(), min(wanted, self.total)
        with self.changed:
            self.queue.append(ticket)
            while not stop.wanted and (self.queue[0] is not ticket or self.free + _EPSILON < granted):
                self.changed.wait(0.5)
            self.queue.remove(ticket)
            granted = 0.0 if stop.wanted else granted
            self.free -= granted
            self.changed.notify_all()
        try:
            yield granted
        finally:
            with self.changed:
                self.free += granted
                self.changed.notify_all()
