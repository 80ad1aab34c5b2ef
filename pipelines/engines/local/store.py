"""Where runs lie, and what is known of them.

    HOME/runs/<run id>/run.json              the record: state, parameters, every task
                       pipeline.yaml         what runs
                       lock                  held by the process that drives the run
                       tasks/<path>/         status.json (the truth about a task), log.txt, outputs/ …

Every file is replaced as a whole, so a kill at any moment leaves a run that can be read and resumed.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from assay.components.contracts.errors import RunError

INTERRUPTED = "INTERRUPTED"
"""The state of a run whose process is gone before it said how the run ended; `resume` goes on with it."""


class TaskRecord(BaseModel):
    """What became of one task."""

    title: str = ""
    state: str = "PENDING"
    started: float = 0.0
    """Seconds since 1970; 0 when it never started."""
    seconds: float = 0.0
    key: str = ""
    """Cache key: what the task is a function of."""
    exit_code: int = 0
    """Of the step's process: 2 is the input's fault, 75 stopped and resumable."""
    message: str = ""


class RunRecord(BaseModel):
    """What is known of one run."""

    id: str
    name: str
    state: str = "RUNNING"
    message: str = ""
    digest: str
    """Digest of the pipeline's definition."""
    parameters: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    """The pipeline's own output parameters."""
    metadata: dict[str, Any] = {}
    from_step: str | None = None
    use_cache: bool = True
    started: float
    finished: float = 0.0
    pid: int
    pid_started: float
    """When that process was created: a number is used again, a number with its time is not."""
    tasks: dict[str, TaskRecord] = {}


def run_folder(home: Path, run_id: str) -> Path:
    """Return the folder of a run."""
    return Path(home) / "runs" / run_id


def pipeline_path(home: Path, run_id: str) -> Path:
    """Return the path of the pipeline that a run runs."""
    return run_folder(home, run_id) / "pipeline.yaml"


def task_folder(home: Path, run_id: str, task: str) -> Path:
    """Return the folder of a task: `status.json`, `log.txt`, `progress.jsonl`, `outputs/<name>`."""
    return run_folder(home, run_id) / "tasks" / task


def list_runs(home: Path) -> list[RunRecord]:
    """Return every run, newest first."""
    found = [_read(path.parent) for path in (Path(home) / "runs").glob("*/run.json")]
    return sorted(found, key=lambda record: (record.started, record.id), reverse=True)


def load_run(home: Path, run_id: str = "latest") -> RunRecord:
    """Return a run by id or folder; `latest` is the one that started last.

    Raises:
        RunError: There is none.
    """
    if run_id == "latest":
        records = list_runs(home)
        if not records:
            raise RunError("there is no run yet", where=str(home), fix="start one with: assay run RECIPE")
        return records[0]
    folder = Path(run_id) if Path(run_id, "run.json").is_file() else run_folder(home, run_id)
    if not (folder / "run.json").is_file():
        raise RunError(f"there is no run {run_id!r}", where=str(home), fix="list them with: assay runs")
    return _read(folder)


def new_run_folder(home: Path, name: str) -> Path:
    """Make the folder of a new run; its name sorts by time."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for attempt in range(1, 1000):
        folder = run_folder(home, stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RunError("a thousand runs started in this second", where=str(home))


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold the run's lock: one process drives it.

    Raises:
        RunError: Another one does.
    """
    with (folder / "lock").open("a+") as file:
        if not try_lock(file):
            raise RunError(
                "another process drives this run", where=str(folder), fix="wait for it, or stop it with Ctrl-C"
            )
        yield


def try_lock(file: IO[Any]) -> bool:
    """Take the lock of an open file, or return False; closing the file, or a kill, gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Replace a file as a whole; a kill leaves the old or the new one.

    It does not wait for the disk, which costs milliseconds: what a power cut loses is found by its size, and run again.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk needs the room
        raise


def read_json(path: Path) -> Any:
    """Return a file's JSON value, or None when there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def this_process() -> dict[str, Any]:
    """Return the identity of this process for a record."""
    return {"pid": os.getpid(), "pid_started": process_started(os.getpid())}


def process_started(pid: int) -> float:
    """Return when a process was created (seconds since 1970), or 0 when there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _read(folder: Path) -> RunRecord:
    try:
        record = RunRecord.model_validate(read_json(folder / "run.json"))
    except ValidationError as error:
        raise RunError(
            "the run's record cannot be read", where=str(folder / "run.json"), fix="remove the folder"
        ) from error
    alive = abs(process_started(record.pid) - record.pid_started) < 1.0
    if record.state == "RUNNING" and not alive:
        record.state = INTERRUPTED
        for task in record.tasks.values():
            task.state = "CANCELLED" if task.state == "RUNNING" else task.state
    return record
