"""What an engine tells a step beside its inputs: a place to work, a place to report progress.

Every engine sets the same variables; a step that runs without them (in a test) gets temporary ones.

* `ASSAY_HOME`      folder of caches shared between runs (default `.assay`)
* `ASSAY_WORK`      folder of this task that survives a kill: checkpoints go here (or `ASSAY_WORK_ROOT`, see `work.py`)
* `ASSAY_PROGRESS`  file to which `progress` appends JSON lines
* `ASSAY_REGISTRY`  folder or `s3://bucket/prefix` of the promotion ledger (default `$ASSAY_HOME/registry`)
* `ASSAY_WEBHOOK_URL`, `ASSAY_WEBHOOK_SECRET`  who is told of promotions (`shared/announce.py`)
* `ASSAY_CPUS`      cores this task may use
* `MLFLOW_TRACKING_URI`, `MLFLOW_RUN_ID`, `MLFLOW_EXPERIMENT_ID` as Kubeflow Pipelines injects them
"""

import json
import os
import tempfile
import time
from pathlib import Path

RESUME_EXIT = 75
"""Exit code of a step that was told to stop (SIGTERM) and saved: run it again and it goes on (EX_TEMPFAIL)."""


class Stopped(BaseException):
    """The engine asked the step to stop (SIGTERM); a training saves its state and lets this pass."""


def home() -> Path:
    """Return the folder of caches that runs share."""
    return Path(os.environ.get("ASSAY_HOME", ".assay")).absolute()


def cache_folder(name: str) -> Path:
    """Return (and make) a content-addressed cache below the home, for example `models` or `responses`."""
    folder = home() / "cache" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def work_folder() -> Path:
    """Return (and make) the folder of this task that survives a kill and is gone after success."""
    folder = Path(os.environ.get("ASSAY_WORK") or tempfile.mkdtemp(prefix="assay-work-"))
    os.environ["ASSAY_WORK"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def registry_address() -> str:
    """Return where the promotion ledger lies: the absolute path of a folder, or `s3://bucket/prefix`."""
    given = os.environ.get("ASSAY_REGISTRY", "")
    return given if given.startswith("s3://") else str(Path(given or home() / "registry").absolute())


def cpus() -> int:
    """Return the number of cores this task may use."""
    return max(1, int(float(os.environ.get("ASSAY_CPUS") or os.cpu_count() or 1)))


def progress(done: float, total: float, unit: str = "steps", **values: float) -> None:
    """Report progress inside a step; engines show it live, and it costs a line in a file.

    Args:
        done: Units finished.
        total: Units in all.
        unit: What is counted.
        values: Numbers worth a glance, for example `loss`.
    """
    path = os.environ.get("ASSAY_PROGRESS")
    if not path:
        return
    line = {"time": time.time(), "done": done, "total": total, "unit": unit, **values}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
