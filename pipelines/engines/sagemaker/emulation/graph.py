"""The walk over a definition: a thread per step, which waits for the steps before it and then does what the step says.

Where the developer guide says nothing, this is what is assumed, and real runs may differ: a failed step ends what
depends on it and nothing else; a `Fail` step stops the execution; a step that depends on another one with the trigger
`Any` runs also when that one never started.
"""

import json
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from assay.components.contracts.errors import AssayError, RunError

from .expressions import Scope, steps_named
from .jobs import JobFailed, JobStopped
from .record import Board, ExecutionState
from .steps import Worker

NESTED = ("IfSteps", "ElseSteps", "ForEachBody")
"""Arguments that hold steps."""
FAILURE_TRIGGERS = ("Failed", "Stopped", "Any")


class Graph:
    """One execution of a definition's steps.

    Args:
        board: Where states are kept.
        worker: Runs the steps that are jobs.
    """

    def __init__(self, board: Board, worker: Worker) -> None:
        self.board, self.worker = board, worker
        self.threads: list[threading.Thread] = []
        self.triggers: dict[str, list[str]] = {}
        """Step → the steps that run when it failed."""
        self.failure = ""
        """What a Fail step said."""

    def run(self, steps: list[dict[str, Any]], scope: Scope) -> tuple[ExecutionState, str]:
        """Run steps to the end; return how the execution ended, and why."""
        self._launch(steps, scope)
        self._join()
        return self._outcome()

    def _launch(self, steps: list[dict[str, Any]], scope: Scope) -> list[threading.Thread]:
        made = [threading.Thread(target=self._run, args=(step, scope), name=step["Name"]) for step in steps]
        for thread in made:
            thread.start()
            self.threads.append(thread)  # only now: who joins may take it from the list at once
        return made

    def _join(self) -> None:
        while self.threads:  # a thread adds those of its branch before it ends
            self.threads.pop().join()

    def _run(self, step: dict[str, Any], scope: Scope) -> None:
        key, kind = scope.key(step["Name"]), step["Type"]
        if self.board.step(key).state == "Succeeded":  # in the execution that is tried again
            if kind == "Condition":
                self._branch(step, scope, bool(self.board.step(key).properties["Outcome"]))
            return
        if not self._may_start(step, scope) or self.board.stopping.is_set():
            self._skip([step], scope)
            return
        try:
            getattr(self, f"_{kind.lower()}")(step, scope, key)
        except JobStopped:
            self.board.end(key, kind, "Stopped", reason="the execution was stopped")
        except JobFailed as failed:
            self.board.end(key, kind, "Failed", reason=failed.reason)
        except AssayError as error:
            self.board.end(key, kind, "Failed", reason=str(error))
        except Exception as error:  # a bug of ours must not leave others waiting for ever
            traceback.print_exc()
            self.board.end(key, kind, "Failed", reason=f"{type(error).__name__}: {error}")
        if self.board.step(key).state != "Succeeded":
            self._skip(list(_nested(step)), scope)

    def _may_start(self, step: dict[str, Any], scope: Scope) -> bool:
        """Wait for the steps before this one, and say whether they ended as it wants."""
        wanted = needs(step)
        for name, trigger in wanted.items():
            if trigger in FAILURE_TRIGGERS:
                with self.board.changed:
                    self.triggers.setdefault(scope.key(name), []).append(scope.key(step["Name"]))
        states = {name: self.board.wait(scope.key(name)) for name in wanted}
        return all(trigger in ("Any", states[name]) for name, trigger in wanted.items())

    def _skip(self, steps: list[dict[str, Any]], scope: Scope) -> None:
        for step in steps:
            self._skip(list(_nested(step)), scope)
            if self.board.step(scope.key(step["Name"])).state == "Waiting":
                self.board.end(scope.key(step["Name"]), step["Type"], "NotStarted")

    def _processing(self, step: dict[str, Any], scope: Scope, key: str) -> None:
        self.worker.run(step, scope, key)

    _training = _processing

    def _condition(self, step: dict[str, Any], scope: Scope, key: str) -> None:
        self.board.begin(key, "Condition")
        holds = all(scope.holds(condition) for condition in step["Arguments"]["Conditions"])
        self.board.end(key, "Condition", "Succeeded", properties={"Outcome": holds})
        self._branch(step, scope, holds)

    def _branch(self, step: dict[str, Any], scope: Scope, holds: bool) -> None:
        taken, other = ("IfSteps", "ElseSteps") if holds else ("ElseSteps", "IfSteps")
        self._skip(step["Arguments"].get(other) or [], scope)
        self._launch(step["Arguments"].get(taken) or [], scope)

    def _fail(self, step: dict[str, Any], scope: Scope, key: str) -> None:
        self.board.begin(key, "Fail")
        self.failure = str(scope.value(step["Arguments"]["ErrorMessage"]))
        self.board.end(key, "Fail", "Failed", reason=self.failure)
        self.board.stopping.set()

    def _foreach(self, step: dict[str, Any], scope: Scope, key: str) -> None:
        self.board.begin(key, "ForEach")
        items, body = _items(scope.value(step["Arguments"]["IterableItems"])), step["Arguments"]["ForEachBody"]
        slots = threading.BoundedSemaphore(int(step["Arguments"].get("MaxConcurrency", 1)))
        rounds = [
            threading.Thread(target=self._round, args=(body, scope, place, item, slots))
            for place, item in enumerate(items)
        ]
        for thread in rounds:
            thread.start()
        for thread in rounds:
            thread.join()
        done = sum(
            all(self.board.step(_round_key(entry, place)).state == "Succeeded" for entry in body)
            for place in range(len(items))
        )
        told = {"InputItemCount": len(items), "SucceededStepCount": done}
        if done < len(items):
            raise JobFailed("ForEach", f"{len(items) - done} of {len(items)} rounds failed")
        self.board.end(key, "ForEach", "Succeeded", properties={**told, "Status": "Succeeded"})

    def _round(
        self, body: list[dict[str, Any]], scope: Scope, place: int, item: Any, slots: threading.BoundedSemaphore
    ) -> None:
        with slots:
            inner = scope.inside(item, {entry["Name"]: _round_key(entry, place) for entry in body})
            for thread in self._launch(body, inner):
                thread.join()

    def _outcome(self) -> tuple[ExecutionState, str]:
        if self.failure:
            return "Failed", self.failure
        if self.board.stopping.is_set():
            return "Stopped", "the execution was stopped"
        steps = self.board.execution.steps
        failed = [step for key, step in steps.items() if step.state == "Failed" and not key.endswith("]")]
        if not failed:
            return "Succeeded", ""
        reason = f"{failed[0].name}: {failed[0].reason}"
        handled = all(any(steps[key].state == "Succeeded" for key in self.triggers.get(one.name, ())) for one in failed)
        return ("CompletedWithFailures" if handled else "Failed"), reason


def needs(step: dict[str, Any]) -> dict[str, str]:
    """Return the steps that a step waits for, each with how it must have ended."""
    body = {entry["Name"] for entry in step["Arguments"].get("ForEachBody") or ()}
    read = {name: value for name, value in step["Arguments"].items() if name not in ("IfSteps", "ElseSteps")}
    found = {name: "Succeeded" for name in steps_named(read) if name not in body and name != step["Name"]}
    for entry in step.get("DependsOn", ()):
        if isinstance(entry, dict):
            found[entry["Step"]] = entry.get("Trigger", "Succeeded")
        else:
            found.setdefault(entry, "Succeeded")
    return found


def _nested(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in NESTED:
        yield from step.get("Arguments", {}).get(name) or ()


def _round_key(step: dict[str, Any], place: int) -> str:
    return f"{step['Name']}[{place}]"


def _items(value: Any) -> list[Any]:
    items = json.loads(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise RunError(f"a loop wants a list, not {str(value)[:80]!r}")
    return items
