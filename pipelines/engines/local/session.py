"""A run as a person watches it: which view, and what is known beforehand of how long it takes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from assay.components.contracts.recipe import Recipe

from . import store, view
from .events import DONE, Event


@contextmanager
def watching(recipe: Recipe, home: Path | None, *, as_json: bool) -> Iterator[view.Watcher]:
    """Yield the view that fits where the output goes: JSON lines, a live table, or plain lines.

    Args:
        recipe: Holds the seconds each step once took.
        home: Holds earlier runs, whose seconds are better known; None for a run elsewhere, of which nothing is known.
        as_json: JSON lines for machines.
    """
    board = view.Board({**recipe.seconds, **last_seconds(home, recipe.name)} if home else {})
    if as_json:
        yield view.json_lines(board)
        return
    console = Console()
    if not console.is_terminal:
        yield _announced(board, view.plain(board))
        return
    with view.LiveView(board, console) as live:
        yield _announced(board, live, console)


def last_seconds(home: Path, name: str) -> dict[str, float]:
    """Return the seconds each step took when it last really ran, by its path, over the runs of a recipe."""
    seconds: dict[str, float] = {}
    for record in reversed(store.list_runs(home)):
        if record.name == name:
            ran = {path: task.seconds for path, task in record.tasks.items() if task.state == "SUCCEEDED"}
            seconds |= ran
    return seconds


def _announced(board: view.Board, watch: view.Watcher, console: Console | None = None) -> view.Watcher:
    """Say before the first step how long it may take, then pass events on."""

    def first_words(event: Event) -> None:
        watch(event)
        if event.kind == "run_started":
            left = board.remaining()
            about = f"about {view.duration(left)} if nothing is cached" if left else "no earlier run to estimate from"
            finished = sum(step.state in DONE for step in board.steps.values())
            words = f"Run {event.run_id}: {len(board.steps)} steps, {finished} done; {about}."
            (console.print if console else _line)(words)

    return first_words


def _line(words: str) -> None:
    sys.stdout.write(words + "\n")
    sys.stdout.flush()
