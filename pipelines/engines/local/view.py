"""What a person sees of a run: a live table in a terminal, plain lines elsewhere, JSON lines for machines.

A view is a callable that takes the engine's events. The estimate is honest about what it is: the seconds each step
took when it last ran (or, before that, as the recipe measured them), scaled by how this run compares so far.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .events import Event

Watcher = Callable[[Event], None]

ICONS = {
    "PENDING": ("·", "dim"),
    "RUNNING": ("▶", "cyan"),
    "SUCCEEDED": ("✔", "green"),
    "CACHED": ("✔", "blue"),
    "SKIPPED": ("–", "dim"),
    "FAILED": ("✘", "red"),
    "CANCELLED": ("■", "yellow"),
}
FINAL = {"SUCCEEDED", "CACHED", "SKIPPED", "FAILED", "CANCELLED"}
PLAIN_PROGRESS_SECONDS = 20.0
"""Without a terminal, a running step says how far it is this often."""


@dataclass
class Step:
    """One task as the view knows it."""

    title: str
    expected: float = 0.0
    """Seconds it is thought to take; 0 when nothing is known."""
    state: str = "PENDING"
    started: float = 0.0
    seconds: float = 0.0
    first: dict[str, Any] = field(default_factory=dict)
    """Its first report of progress: what came before was imports and loading."""
    progress: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    def elapsed(self) -> float:
        """Return seconds so far, or in all."""
        return time.monotonic() - self.started if self.state == "RUNNING" else self.seconds

    def remaining(self, pace: float) -> float:
        """Return the seconds still to go, from the step's own progress where it reports any."""
        if self.state in FINAL:
            return 0.0
        made = self.progress.get("done", 0) - self.first.get("done", 0)
        if self.state == "RUNNING" and made > 0:
            each = (self.progress["time"] - self.first["time"]) / made
            return float(each * (self.progress["total"] - self.progress["done"]))
        return max(self.expected * pace - (self.elapsed() if self.state == "RUNNING" else 0), 0)


class Board:
    """The state of a run as events tell it; what the views draw."""

    def __init__(self, expected: dict[str, float]) -> None:
        self.expected = expected
        self.steps: dict[str, Step] = {}
        self.started = time.monotonic()

    def take(self, event: Event) -> Step | None:
        """Update the step an event is about, and return it; None when a person need not see it."""
        if event.kind == "run_started":
            for task in event.tasks:
                if task.kind != "dag":
                    self._add(task.path, task.title)
            return None
        step = self.steps.get(event.task)
        if step is None and "[" in event.task and event.kind == "task_progress":
            step = self._add(event.task, event.task.rpartition("/")[2])  # an iteration of a loop shows once it reports
            step.state, step.started = "RUNNING", time.monotonic()
        if step is None:
            return None
        if event.kind == "task_progress":
            step.progress = event.progress
            step.first = step.first or event.progress
        elif event.kind == "task_state":
            if event.state == "RUNNING":
                step.started = time.monotonic()
            step.state, step.seconds, step.message = event.state, event.seconds, event.message
        return step

    def _add(self, path: str, title: str) -> Step:
        self.steps[path] = Step(title, self.expected.get(path, 0.0))
        return self.steps[path]

    def remaining(self) -> float:
        """Return the estimated seconds to the end, as if steps ran one after the other."""
        return sum(step.remaining(self.pace()) for step in self.steps.values())

    def pace(self) -> float:
        """Return how slow this run is against what was expected: 1 as expected, 2 twice as slow."""
        done = [step for step in self.steps.values() if step.state == "SUCCEEDED" and step.expected > 1]
        expected = sum(step.expected for step in done)
        return sum(step.seconds for step in done) / expected if expected > 10 else 1.0


def duration(seconds: float) -> str:
    """Write seconds as a person says them: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def describe(progress: dict[str, Any]) -> str:
    """Write a progress report as a phrase: `48/128 steps, loss 0.31`."""
    if not progress:
        return ""
    values = [
        f"{name} {value:.3g}" for name, value in progress.items() if name not in ("time", "done", "total", "unit")
    ]
    return ", ".join([f"{progress['done']:g}/{progress['total']:g} {progress.get('unit', '')}".strip(), *values])


def plain(board: Board, out: Any = None) -> Watcher:
    """Return a view that prints one line per event worth one."""
    last: dict[str, float] = {}
    out = out or sys.stdout

    def watch(event: Event) -> None:
        step = board.take(event)
        if step is None:
            return
        clock = duration(time.monotonic() - board.started)
        if event.kind == "task_progress":
            if time.monotonic() - last.get(event.task, 0) < PLAIN_PROGRESS_SECONDS:
                return
            last[event.task] = time.monotonic()
            left = f"; about {duration(board.remaining())} left" if board.remaining() else ""
            print(f"[{clock}]   {step.title}: {describe(step.progress)}{left}", file=out, flush=True)
        elif event.kind == "task_state" and event.state != "PENDING":
            took = f" in {duration(step.seconds)}" if event.state == "SUCCEEDED" else ""
            why = f": {step.message}" if step.message and event.state not in ("SUCCEEDED", "CACHED") else ""
            print(f"[{clock}] {step.title}: {event.state.lower()}{took}{why}", file=out, flush=True)

    return watch


def json_lines(board: Board, out: Any = None) -> Watcher:
    """Return a view that prints every event as one JSON object per line."""
    out = out or sys.stdout

    def watch(event: Event) -> None:
        board.take(event)
        print(json.dumps(asdict(event), default=str), file=out, flush=True)

    return watch


class LiveView:
    """A table that redraws itself: steps, states, progress inside a step, elapsed time, an estimate."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board = board
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self.render, transient=False)

    def __enter__(self) -> "LiveView":
        self.live.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self.live.__exit__(*reason)

    def __call__(self, event: Event) -> None:
        """Take an event; the table redraws itself four times a second."""
        self.board.take(event)

    def render(self) -> Group:
        """Return the table and the line under it."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        for column in ("icon", "step", "took", "how"):
            table.add_column(column, justify="right" if column == "took" else "left", overflow="ellipsis", no_wrap=True)
        for step in self.board.steps.values():
            icon, style = ICONS[step.state]
            took = duration(step.elapsed()) if step.state in ("RUNNING", "SUCCEEDED", "FAILED") else ""
            table.add_row(Text(icon, style), Text(step.title, style), took, Text(_how(step), "dim"))
        finished = sum(step.state in FINAL for step in self.board.steps.values())
        left = self.board.remaining()
        foot = f"  {finished}/{len(self.board.steps)} steps, {duration(time.monotonic() - self.board.started)}"
        return Group(table, Text(foot + (f", about {duration(left)} left" if left else ""), "bold"))


def _how(step: Step) -> str:
    if step.state == "RUNNING":
        return _bar(step.progress) + describe(step.progress)
    if step.state == "CACHED":
        return "cached"
    return step.message.splitlines()[0] if step.message and step.state != "SUCCEEDED" else ""


def _bar(progress: dict[str, Any], width: int = 16) -> str:
    if not progress.get("total"):
        return ""
    filled = min(width, round(width * float(progress["done"]) / float(progress["total"])))
    return "━" * filled + "╌" * (width - filled) + " "
