"""Where a step's checkpoints lie on a cluster: on a shared volume, in a folder named by what the step is a function of.

A pod that was evicted starts again, or the whole run does, and the step goes on where it was. The local engine gives
each step its folder itself (`ASSAY_WORK`); elsewhere `ASSAY_WORK_ROOT` names the folder of these folders.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..contracts.artifacts import digest_of

ROOT = "ASSAY_WORK_ROOT"


def work_key(component: str, code_digest: str, executor_input: dict[str, Any]) -> str:
    """Return the name of a step's folder: the same code on the same inputs is the same step."""
    return digest_of({"component": component, "code": code_digest, "inputs": executor_input["inputs"]})


@contextmanager
def kept(component: str, code_digest: str, executor_input: dict[str, Any]) -> Iterator[None]:
    """Give a step a work folder that survives a kill, and remove it after success.

    Of two identical steps at once, the second gets none: it starts from the beginning, and disturbs nobody.
    """
    root = os.environ.get(ROOT)
    if not root or os.environ.get("ASSAY_WORK"):
        yield
        return
    folder = Path(root) / work_key(component, code_digest, executor_input)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.with_suffix(".lock")).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield
            return
        os.environ["ASSAY_WORK"] = str(folder)
        try:
            yield
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.environ.pop("ASSAY_WORK", None)
