"""What a person and a machine see of a run, from events."""

import io
import json

import pytest
from rich.console import Console

from assay.pipelines.engines.local import view
from assay.pipelines.engines.local.events import Event, Planned

TASKS = (
    Planned("data", "Generate rows", "container"),
    Planned("train", "Train: SFT", "container"),
    Planned("judge", "Judge", "container"),
    Planned("branch", "promote", "dag"),
)
EXPECTED = {"data": 20.0, "train": 100.0, "judge": 40.0}


def state(task: str, name: str, seconds: float = 0.0, message: str = "") -> Event:
    return Event("task_state", "run", task, name, seconds, message=message)


def progress(task: str, time: float, done: int, total: int = 10, **values: float) -> Event:
    report = {"time": time, "done": done, "total": total, "unit": "steps", **values}
    return Event("task_progress", "run", task, "RUNNING", progress=report)


@pytest.fixture
def board():
    made = view.Board(EXPECTED)
    made.take(Event("run_started", "run", tasks=TASKS))
    return made


def drawn(board: view.Board) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(view.LiveView(board, console).render())
    return console.export_text()


def test_the_estimate_falls_as_steps_finish(board):
    assert board.remaining() == 160
    board.take(state("data", "SUCCEEDED", 20.0))
    assert board.remaining() == 140
    board.take(state("train", "CACHED"))
    assert board.remaining() == 40
    board.take(state("judge", "FAILED", 1.0))
    assert board.remaining() == 0


def test_the_estimate_is_scaled_by_the_pace_of_this_run(board):
    board.take(state("data", "SUCCEEDED", 40.0))
    assert board.pace() == 2
    assert board.remaining() == 280


def test_a_cached_step_says_nothing_about_the_pace(board):
    board.take(state("data", "CACHED"))
    assert board.pace() == 1


def test_a_running_step_is_estimated_from_its_own_progress(board):
    board.take(state("train", "RUNNING"))
    board.take(progress("train", 50.0, 1))  # fifty seconds of imports and loading do not count
    board.take(progress("train", 54.0, 3))
    assert board.steps["train"].remaining(1) == pytest.approx(14)


def test_the_table_shows_states_progress_and_time_left(board):
    board.take(state("data", "CACHED"))
    board.take(state("train", "RUNNING"))
    board.take(progress("train", 1.0, 5, loss=0.3123))
    shown = drawn(board)
    assert "✔ Generate rows" in " ".join(shown.split())
    assert "cached" in shown
    assert "━" * 8 + "╌" * 8 + " 5/10 steps, loss 0.312" in shown
    assert "1/3 steps" in shown
    assert "left" in shown
    assert "promote" not in shown  # a branch is no step


def test_a_failed_step_shows_the_first_line_of_its_message(board):
    board.take(state("data", "FAILED", 2.0, "rows.jsonl: 2 bad rows [line 1]\n  → correct them"))
    board.take(state("train", "SKIPPED", message="Generate rows failed"))
    shown = drawn(board)
    assert "rows.jsonl: 2 bad rows [line 1]" in shown
    assert "correct them" not in shown
    assert "✘" in shown
    assert "2/3 steps" in shown


def test_a_narrow_table_keeps_a_line_per_step(board):
    board.take(state("data", "FAILED", 2.0, "x" * 500))
    assert all(len(line) <= 100 for line in drawn(board).splitlines())
    assert len(drawn(board).strip().splitlines()) == 4


def test_an_iteration_of_a_loop_shows_running_once_it_reports(board):
    board.take(state("for-loop-2[0]/train", "RUNNING"))
    board.take(progress("for-loop-2[0]/train", 1.0, 2))
    assert board.steps["for-loop-2[0]/train"].state == "RUNNING"
    assert "2/10 steps" in drawn(board)
    board.take(state("for-loop-2[0]/train", "SUCCEEDED", 3.0))
    assert board.steps["for-loop-2[0]/train"].state == "SUCCEEDED"


def test_plain_lines(board, monkeypatch):
    out = io.StringIO()
    watch = view.plain(board, out)
    watch(state("data", "PENDING"))
    watch(state("data", "SUCCEEDED", 75.0))
    watch(state("branch", "SKIPPED"))
    watch(state("train", "RUNNING"))
    watch(progress("train", 1.0, 1, loss=2.0))
    watch(progress("train", 2.0, 2, loss=1.0))  # too soon for another line
    watch(state("train", "FAILED", 3.0, "no memory"))
    lines = [line.partition("] ")[2].strip() for line in out.getvalue().splitlines()]
    assert lines[:2] == ["Generate rows: succeeded in 1 min 15 s", "Train: SFT: running"]
    assert lines[2].startswith("Train: SFT: 1/10 steps, loss 2; about ")
    assert lines[3:] == ["Train: SFT: failed: no memory"]


def test_json_lines_hold_every_event(board):
    out = io.StringIO()
    watch = view.json_lines(board, out)
    watch(Event("run_started", "run", tasks=TASKS))
    watch(progress("train", 1.0, 1, loss=2.0))
    watch(Event("run_finished", "run", state="SUCCEEDED", seconds=4.0))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["kind"] for line in lines] == ["run_started", "task_progress", "run_finished"]
    assert lines[0]["tasks"][3] == {"path": "branch", "title": "promote", "kind": "dag"}
    assert lines[1]["progress"]["loss"] == 2.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.24, "4.2 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, words):
    assert view.duration(seconds) == words
