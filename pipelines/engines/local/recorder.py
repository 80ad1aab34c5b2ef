"""Keeps a run's record on disk up to date, and tells the watcher."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RunError

from .events import Event, Planned
from .store import RunRecord, TaskRecord, write_json

_WRITE_SECONDS = 0.2
"""The record is written at most this often: the truth about a task is its own status.json."""

Watch = Callable[[Event], None]


class Recorder:
    """The one writer of `run.json`; used by every thread of the engine."""

    def __init__(self, record: RunRecord, folder: Path, watch: Watch | None) -> None:
        self.record, self.folder, self.watch = record, folder, watch
        self.lock = threading.RLock()
        self.written = 0.0
        self.dirty = False
        self.trouble: OSError | None = None

    def start(self, tasks: list[Planned]) -> None:
        """Record that the run is going, and tell every task there is.

        Raises:
            RunError: The record cannot be written, so the run does not start.
        """
        self.flush(now=True)
        if self.trouble:
            raise cannot_write(self.trouble, self.folder)
        self._tell(Event("run_started", self.record.id, state="RUNNING", tasks=tuple(tasks)))

    def task(self, path: str, title: str, state: str, **fields: Any) -> None:
        """Record a task's state; `fields` are those of `TaskRecord`."""
        with self.lock:
            known = self.record.tasks.get(path, TaskRecord(title=title))
            self.record.tasks[path] = known.model_copy(update={"title": title, "state": state, **fields})
            self.dirty = True
            self.flush()
            now = self.record.tasks[path]
            self._tell(Event("task_state", self.record.id, path, state, now.seconds, message=now.message))

    def progress(self, path: str, report: dict[str, Any]) -> None:
        """Pass on what a step reports."""
        self._tell(Event("task_progress", self.record.id, path, "RUNNING", progress=report))

    def log(self, path: str, message: str) -> None:
        """Pass on a remark of the engine."""
        self._tell(Event("log", self.record.id, path, message=message))

    def finish(self, state: str, message: str, outputs: dict[str, Any]) -> None:
        """Record how the run ended.

        Raises:
            RunError: The record cannot be written.
        """
        with self.lock:
            self.record.state, self.record.message, self.record.outputs = state, message, outputs
            self.record.finished = time.time()
            self.flush(now=True)
        seconds = self.record.finished - self.record.started
        self._tell(Event("run_finished", self.record.id, state=state, seconds=seconds, message=message))
        if self.trouble:
            raise cannot_write(self.trouble, self.folder, self.record.id)

    def flush(self, *, now: bool = False) -> None:
        """Write the record, if it changed and the last time is long enough ago."""
        with self.lock:
            if not now and (not self.dirty or time.monotonic() - self.written < _WRITE_SECONDS):
                return
            try:
                write_json(self.folder / "run.json", self.record.model_dump(mode="json"))
            except OSError as error:
                self.trouble = error
                return
            self.trouble, self.dirty, self.written = None, False, time.monotonic()

    def _tell(self, event: Event) -> None:
        with self.lock:
            if self.watch is None:
                return
            try:
                self.watch(replace(event))
            except Exception:  # a view that breaks must not take a training with it
                self.watch = None
                traceback.print_exc(file=sys.stderr)


def cannot_write(error: OSError, folder: Path, run_id: str = "") -> RunError:
    """Return the error that tells a person why nothing can be written, and that nothing finished is lost."""
    go_on = f"; then: assay resume {run_id}" if run_id else ""
    return RunError(
        f"cannot write: {error.strerror or error}",
        where=str(error.filename or folder),
        fix=f"free space or choose another --home{go_on}. What is finished stays finished.",
    )
