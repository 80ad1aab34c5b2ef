"""Schedules: what is due, what is made up for, and a scheduler that really runs."""

import configparser
import shlex
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.pipelines.triggers import cron
from assay.pipelines.triggers.launch import Job
from assay.pipelines.triggers.once import Trigger

RECIPE = Recipe(name="lamps")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "a home"))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def planned(expression: str, since: str) -> cron.Schedule:
    return cron.Schedule(recipe=RECIPE, cron=expression, data="", since=at(since))


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-11-01 01:59:59", None),
        ("2026-11-01 02:00:00", "2026-11-01 02:00:00"),
        ("2026-11-01 02:00:00.500000", "2026-11-01 02:00:00"),
        ("2026-11-01 23:00:00", "2026-11-01 02:00:00"),
        ("2026-11-05 01:00:00", "2026-11-04 02:00:00"),  # four nights asleep: the last one is made up for
    ],
)
def test_the_latest_planned_time_is_due(now: str, due: str | None) -> None:
    schedule = planned("0 2 * * *", since="2026-10-31 12:00:00")
    assert schedule.due(at(now)) == (at(due) if due else None)


def test_a_time_before_it_was_scheduled_is_not_made_up_for() -> None:
    assert planned("0 2 * * *", since="2026-11-01 02:00:01").due(at("2026-11-01 12:00:00")) is None


@pytest.mark.parametrize("night", ["2026-03-29", "2026-10-25"])
def test_no_night_is_lost_or_doubled_when_clocks_change(night: str) -> None:
    schedule = planned("30 1 * * *", since="2026-01-01 00:00:00")
    start = at(f"{night} 00:00:00")
    moments = {schedule.due(start + timedelta(minutes=10 * step)) for step in range(36 * 6)}
    assert len(moments) == 3  # the night before, this one, the next


@pytest.mark.parametrize("expression", ["", "0 2 * *", "61 * * * *", "at night", "0 2 31 2 *", "* * * * * * *"])
def test_an_expression_that_cannot_be_read_is_told(expression: str) -> None:
    with pytest.raises(RecipeError):
        cron.schedule(RECIPE, expression, "")
    assert cron.schedules() == []


def test_a_deploy_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no deploy profile"):
        cron.schedule(RECIPE, "0 2 * * *", "", tmp_path / "deploy.yaml")


def test_scheduling_twice_changes_nothing_and_another_time_replaces() -> None:
    words = cron.schedule(RECIPE, "0 2 * * *", "rows")
    assert words.startswith("lamps is scheduled at '0 2 * * *' (UTC); next at ")
    (first,) = cron.schedules()
    cron.schedule(RECIPE, "0  2 * * *", "rows")
    assert cron.schedules() == [first]
    cron.schedule(RECIPE, "0 3 * * *", "rows")
    (second,) = cron.schedules()
    assert (second.cron, second.recipe) == ("0 3 * * *", RECIPE)
    assert second.since > first.since


def test_the_same_planned_time_is_the_same_trigger_from_any_machine() -> None:
    fired: list[Trigger] = []
    cron.schedule(RECIPE, "0 2 * * *", "rows")
    (schedule,) = cron.schedules()
    cron._path("lamps").write_text(schedule.model_copy(update={"since": at("2026-01-01 00:00:00")}).model_dump_json())
    for now in ("2026-11-01 02:00:00", "2026-11-01 02:00:07", "2026-11-02 01:59:59", "2026-11-02 02:00:00"):
        cron.run_due(lambda trigger, job: fired.append(trigger), at(now))
    assert [trigger.what for trigger in fired] == ["2026-11-01T02:00:00+00:00"] * 3 + ["2026-11-02T02:00:00+00:00"]
    assert len({trigger.id for trigger in fired}) == 2


def test_the_scheduler_fires_at_its_seconds_and_sees_a_new_schedule() -> None:
    """Real time, two schedules of which one comes later: every planned second fires."""
    fired: list[tuple[str, str]] = []

    def fire(trigger: Trigger, job: Job) -> None:
        if (job.recipe.name, trigger.what) not in fired:
            fired.append((job.recipe.name, trigger.what))
        if len(fired) == 1:
            cron.schedule(Recipe(name="late"), "* * * * * *", "")

    cron.schedule(RECIPE, "* * * * * *", "")
    start = time.monotonic()
    cron.run_scheduler(fire, until=datetime.now(UTC) + timedelta(seconds=3.2))
    assert time.monotonic() - start < 8
    assert len([name for name, _ in fired if name == "lamps"]) >= 3
    assert len([name for name, _ in fired if name == "late"]) >= 1


def test_the_cron_lines_call_what_is_due(tmp_path: Path) -> None:
    cron.schedule(RECIPE, "0 2 * * 1-5", "rows")
    zone, home, line = cron.printed("cron").splitlines()
    assert (zone, home) == ("CRON_TZ=UTC", f"ASSAY_HOME={tmp_path / 'a home'}")
    assert line.startswith("0 2 * * 1-5  ")
    assert shlex.split(line)[-3:] == ["trigger", "cron", "--due"]


def test_the_systemd_unit_keeps_the_scheduler_alive(tmp_path: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(cron.printed("systemd"))
    assert parser["Service"]["Environment"] == f'"ASSAY_HOME={tmp_path / "a home"}"'
    assert parser["Service"]["ExecStart"].endswith('/assay" trigger cron')
    assert parser["Service"]["Restart"] == "always"
