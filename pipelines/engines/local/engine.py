"""The local engine: runs a compiled pipeline on this machine with one process per step.

    record = run("pipeline.yaml", home=Path(".assay"), parameters={"rows": 100}, name="demo")
    record = resume("latest", home=Path(".assay"))

What the IR says is what happens, or the run says why not; nothing is skipped silently.
"""

import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from assay.components.contracts.errors import RecipeError, RunError
from assay.pipelines.ir import model, values
from assay.pipelines.ir.model import Pipeline

from . import store
from .cache import StepCache
from .cores import Cores, available
from .events import Event, Planned
from .process import Guard, Stop
from .recorder import Recorder, cannot_write
from .scheduler import Scheduler, Scope
from .step import Outcome, Session
from .store import RunRecord, TaskRecord

Watch = Callable[[Event], None]
LOCAL_SETTINGS = frozenset({"timeout"})
"""What `task.platform_config["local"]` may say: `timeout` in seconds."""


def plan(ir: dict[str, Any] | str | Path) -> list[Planned]:
    """Return every task of a pipeline, in an order in which they can run.

    Raises:
        RecipeError: It is not a pipeline that the engine can run.
    """
    return _plan(model.load(ir))


def run(
    ir: dict[str, Any] | str | Path,
    *,
    home: Path,
    parameters: dict[str, Any] | None = None,
    name: str = "",
    on_event: Watch | None = None,
    cores: int | None = None,
    from_step: str | None = None,
    use_cache: bool = True,
    metadata: dict[str, Any] | None = None,
) -> RunRecord:
    """Run a pipeline to its end and return its record; a failed step is a state of the record, not an exception.

    Args:
        ir: The compiled pipeline: a YAML file, or its first document.
        home: Folder of runs and caches.
        parameters: The pipeline's parameters.
        name: What the run is called; the pipeline's name when left out.
        on_event: Told what happens, from several threads but one at a time.
        cores: The core budget; all there are when left out.
        from_step: A task (path, name or display name) that runs anew with all that depends on it.
        use_cache: Take results of identical steps from earlier runs.
        metadata: Kept in the record.

    Raises:
        RecipeError: The pipeline holds something the engine does not know.
        RunError: A parameter is wrong, the step to start from does not exist, or nothing can be written.
    """
    pipeline = model.load(ir)
    _check_local_settings(pipeline)
    bound = _bind(pipeline, parameters or {})
    chosen = _resolve_step(pipeline, from_step)
    home = Path(home).absolute()
    try:
        folder = store.new_run_folder(home, name or pipeline.pipeline_info.name)
        _keep_definition(ir, folder)
    except OSError as error:
        raise cannot_write(error, home) from error
    record = RunRecord(
        id=folder.name,
        name=name or pipeline.pipeline_info.name,
        digest=pipeline.digest,
        parameters=bound,
        metadata=metadata or {},
        from_step=from_step,
        use_cache=use_cache,
        started=time.time(),
        **store.this_process(),
    )
    return _drive(pipeline, record, home, chosen, on_event, cores)


def resume(
    run_id: str | Path = "latest", *, home: Path, on_event: Watch | None = None, cores: int | None = None
) -> RunRecord:
    """Go on with a run that was killed, stopped or failed; a step that ended well is not run again.

    Args:
        run_id: The run's id or folder.
        home: As for `run`.
        on_event: As for `run`.
        cores: As for `run`.

    Raises:
        RunError: There is no such run, or another process drives it.
    """
    home = Path(home).absolute()
    record = store.load_run(home, str(run_id))
    pipeline = model.load(store.pipeline_path(home, record.id))
    record = record.model_copy(update={"state": "RUNNING", "message": "", "finished": 0.0, "tasks": {}})
    return _drive(pipeline, record, home, _resolve_step(pipeline, record.from_step), on_event, cores)


def _drive(
    pipeline: Pipeline,
    record: RunRecord,
    home: Path,
    from_step: frozenset[str],
    on_event: Watch | None,
    cores: int | None,
) -> RunRecord:
    folder = store.run_folder(home, record.id)
    planned = _plan(pipeline)
    with store.driving(folder):
        record = record.model_copy(update=store.this_process() | {"tasks": _pending(pipeline, planned)})
        recorder, stop = Recorder(record, folder, on_event), Stop()
        recorder.start(planned)
        with _stopped_by_signals(stop), Guard() as guard:
            session = Session(
                pipeline=pipeline,
                home=home,
                run_id=record.id,
                run_values=_run_values(pipeline, record, folder),
                environment=_environment(home),
                recorder=recorder,
                cache=StepCache(home, lambda message: recorder.log("", message)),
                cores=Cores(cores or available()),
                stop=stop,
                guard=guard,
                use_cache=record.use_cache,
                from_step=from_step,
            )
            outcome = _run_root(session, record, recorder)
        recorder.finish(outcome.state, outcome.message, outcome.parameters)
    return record


def _run_root(session: Session, record: RunRecord, recorder: Recorder) -> Outcome:
    """Run the root in a thread of its own: this one stays free for signals."""
    ended: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            ended.put(Scheduler(session).run_dag(session.pipeline.root, Scope(record.parameters), "", False))
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=work, name="root", daemon=True).start()
    deadline = _deadline(session.pipeline)
    while True:
        try:
            outcome = ended.get(timeout=0.2)
        except queue.Empty:
            recorder.flush()
            if time.monotonic() > deadline and not session.stop.wanted:
                session.stop.request("the pipeline's time limit is over")
            continue
        if isinstance(outcome, BaseException):
            recorder.finish("FAILED", f"the engine failed: {outcome!r}", {})
            raise outcome
        return outcome


def _deadline(pipeline: Pipeline) -> float:
    """Return when (`time.monotonic`) the pipeline's own time limit is over."""
    platform = pipeline.platforms.get("kubernetes")
    limit = platform.pipeline_config.get("activeDeadlineSeconds") if platform else None
    return time.monotonic() + float(limit) if limit else float("inf")


@contextmanager
def _stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end the run in order; a second one kills the steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: object) -> None:
        stop.request(f"stopped by {signal.Signals(number).name}")

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(home: Path) -> dict[str, str]:
    """Return what every step's environment has (runtime/context.py says what for)."""
    registry = os.environ.get("ASSAY_REGISTRY") or str(home / "registry")
    python = str(Path(sys.executable).parent)
    embedded = {} if registry.startswith("s3://") else {"MLFLOW_TRACKING_URI": f"sqlite:///{registry}/mlflow.db"}
    return {
        **embedded,
        # Threads that spin while they wait bring a busy machine to a halt; threads that sleep at once cost a quarter of
        # a training on a quiet one. GNU's OpenMP, which torch brings, spins for half a millisecond, others sleep.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "20000",
        **os.environ,
        "PATH": python + os.pathsep + os.environ.get("PATH", os.defpath),
        "ASSAY_HOME": str(home),
        "ASSAY_REGISTRY": registry,
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
    }


def _run_values(pipeline: Pipeline, record: RunRecord, folder: Path) -> dict[str, str]:
    started = datetime.fromtimestamp(record.started, UTC).isoformat(timespec="seconds")
    return {
        "pipeline_job_name": record.id,
        "pipeline_job_uuid": record.id,
        "pipeline_job_resource_name": f"{pipeline.pipeline_info.name}/{record.id}",
        "pipeline_job_create_time_utc": started,
        "pipeline_job_schedule_time_utc": started,
        "pipeline_root": str(folder / "tasks"),
        "workspace_path": str(folder / "workspace"),
    }


def _plan(pipeline: Pipeline) -> list[Planned]:
    planned = []
    for path, task, component in pipeline.walk():
        kind: Any = "dag"
        if component.dag is None:
            kind = "importer" if pipeline.executor(component).importer else "container"
        planned.append(Planned(path, task.task_info.name or path, kind))
    return planned


def _pending(pipeline: Pipeline, planned: list[Planned]) -> dict[str, TaskRecord]:
    """Return the records of the tasks that will be there whatever happens: not those inside loops."""
    loops = [path for path, task, _ in pipeline.walk() if task.parameter_iterator or task.artifact_iterator]
    inside = tuple(f"{path}/" for path in loops)
    return {task.path: TaskRecord(title=task.title) for task in planned if not task.path.startswith(inside or ("/",))}


def _bind(pipeline: Pipeline, given: dict[str, Any]) -> dict[str, Any]:
    declared = pipeline.root.input_definitions.parameters
    if unknown := sorted(given.keys() - declared.keys()):
        raise RunError(
            f"the pipeline has no parameter {unknown[0]!r}", where="parameters", fix=f"choose of {sorted(declared)}"
        )
    return values.bind(given, declared, "parameters")


def _resolve_step(pipeline: Pipeline, name: str | None) -> frozenset[str]:
    if name is None:
        return frozenset()
    planned = _plan(pipeline)
    wanted = name.replace("_", "-")
    found = [task.path for task in planned if task.path in (name, wanted)] or [
        task.path for task in planned if task.path.rpartition("/")[2] == wanted or task.title == name
    ]
    if not found:
        known = ", ".join(task.path.rpartition("/")[2] for task in planned if task.is_container)
        raise RunError(f"there is no step {name!r}", where="from_step", fix=f"choose one of: {known}")
    return frozenset(found)


def _check_local_settings(pipeline: Pipeline) -> None:
    platform = pipeline.platforms.get("local")
    for label, settings in platform.deployment_spec.executors.items() if platform else ():
        if unknown := sorted(settings.keys() - LOCAL_SETTINGS):
            raise RecipeError(
                f"the local engine has no setting {unknown[0]!r}",
                where=f"platforms.local: {label}",
                fix=f"choose of {sorted(LOCAL_SETTINGS)}",
            )


def _keep_definition(ir: dict[str, Any] | str | Path, folder: Path) -> None:
    target = folder / "pipeline.yaml"
    if isinstance(ir, dict):
        target.write_text(yaml.safe_dump(ir, sort_keys=False), encoding="utf-8")
    else:
        shutil.copyfile(ir, target)
