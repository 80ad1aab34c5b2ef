"""The entry point of every step, in every container: `python -m assay.components.runtime --component MODULE:FUNCTION`.

It runs the function through kfp's own executor, so inputs, outputs and metadata are what a Kubeflow launcher expects.
A user's error (`AssayError`) becomes `error.json` beside the executor's output and exit code 2, without a traceback.
"""

import os

os.environ["_KFP_RUNTIME"] = "true"  # before kfp is imported: it then exports types and no authoring names

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from ..contracts.errors import AssayError
from .context import RESUME_EXIT, Stopped
from .ranks import own_outputs
from .work import kept


def main(argv: list[str] | None = None) -> int:
    """Run one step and return its exit code: 0 done, 2 the input's fault, 75 stopped and resumable."""
    parser = argparse.ArgumentParser(prog="python -m assay.components.runtime")
    parser.add_argument("--component", required=True, help="module:function")
    parser.add_argument("--code_digest", default="", help="part of the cache key, and of the work folder's name")
    parser.add_argument("--executor_input", required=True, help="KFP's ExecutorInput as JSON, or @file")
    arguments = parser.parse_args(argv)
    text = arguments.executor_input
    executor_input = own_outputs(json.loads(Path(text[1:]).read_text() if text.startswith("@") else text))
    signal.signal(signal.SIGTERM, _stop)
    try:
        with kept(arguments.component, arguments.code_digest, executor_input):
            _execute(arguments.component, executor_input)
    except AssayError as error:
        print(f"error: {error}", file=sys.stderr)
        _write_error(executor_input, error)
        return 2
    except Stopped:
        print("stopped; run the step again and it goes on", file=sys.stderr)
        return RESUME_EXIT
    return 0


def _execute(component: str, executor_input: dict[str, Any]) -> None:
    from kfp.dsl import executor

    module, _, name = component.partition(":")
    function = getattr(importlib.import_module(module), name)
    executor.Executor(executor_input=executor_input, function_to_execute=function).execute()


def _write_error(executor_input: dict[str, Any], error: AssayError) -> None:
    path = Path(executor_input["outputs"]["outputFile"]).with_name("error.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    path.write_text(json.dumps(report), encoding="utf-8")


def _stop(signum: int, frame: object) -> None:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
