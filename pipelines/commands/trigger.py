"""`assay trigger`: what starts runs without a person. Each command parses, calls, and prints."""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer

from assay.components.contracts.errors import AssayError, RecipeError
from assay.components.shared import announce
from assay.components.shared.ledger import Entry

from ..triggers import arrivals, ci, cron, once
from ..triggers.launch import Job, launch
from ..triggers.once import Trigger
from .options import HOME, Data, Deploy, Engine, Home, ModelName, Profile, RecipeName, load, use

app = typer.Typer(help="Start runs by schedule, new data or CI, once each; tell others.", no_args_is_help=True)

Wait = Annotated[bool, typer.Option(help="Wait for the end of a run on a distributed engine.")]
RETRY = timedelta(minutes=5)
"""Between two launches that a scheduler or a watcher tries and an engine refuses."""

Every = Annotated[float, typer.Option(min=0, help="Look again after so many seconds; 0 looks once.")]


@app.command("cron")
def cron_(
    due: Annotated[bool, typer.Option("--due", help="Run what is due now, and stop.")] = False,
    print_: Annotated[
        Literal["systemd", "cron"] | None, typer.Option("--print", help="Print the lines for this machine's scheduler.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Run this folder's schedules in the foreground (`assay schedule` notes them)."""
    use(home)
    if print_:
        typer.echo(cron.printed(print_))
    elif due:
        cron.run_due(_fire, datetime.now(UTC))
    else:
        cron.run_scheduler(_fire)


@app.command()
def watch(
    recipe: RecipeName,
    source: Annotated[str, typer.Argument(help="A folder or s3://bucket/prefix; batches end with a marker file.")],
    engine: Engine = "local",
    deploy: Deploy = None,
    profile: Profile = "",
    wait: Wait = False,
    every: Every = 60,
    home: Home = HOME,
) -> None:
    """Run a recipe on every batch of new rows that is complete (_MANIFEST.json or _SUCCESS), once each."""
    use(home)
    loaded = load(recipe, profile)

    def look() -> None:
        for batch in arrivals.batches(source):
            job = Job(loaded, engine, batch.uri, deploy, wait)
            _fire(Trigger.of("data", batch.digest, job), job)

    _again(look, every)


@app.command("ci")
def ci_(
    recipe: RecipeName,
    identity: Annotated[str, typer.Option("--id", help="Names the trigger; GITHUB_SHA when left out.")] = "",
    data: Data = "",
    engine: Engine = "local",
    deploy: Deploy = None,
    profile: Profile = "",
    wait: Wait = True,
    result: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    comment: Annotated[Path | None, typer.Option(help="Write the pull request's comment (Markdown).")] = None,
    home: Home = HOME,
) -> None:
    """Run a recipe from CI: exits with the decision (0 promote, 1 hold, 3 inconclusive, 2 the input's fault)."""
    use(home)
    job = Job(load(recipe, profile), engine, _absolute(data), deploy, wait)
    trigger = Trigger.of("ci", ci.identity(identity), job)
    record, _ = once.once(trigger, lambda: launch(job, trigger.id, lambda event: None), wait=wait)
    told = ci.result(record, job.recipe.approval.required)
    ci.write(told, result, comment)
    typer.echo(json.dumps({key: value for key, value in told.items() if key != "record"}))
    raise typer.Exit(ci.exit_code(told))


@app.command("registry")
def registry_(
    name: ModelName,
    command: Annotated[str, typer.Option("--run", help="A command that reads the event as JSON.")] = "",
    webhook: Annotated[
        str, typer.Option(envvar="ASSAY_WEBHOOK_URL", help="An https:// address; ASSAY_WEBHOOK_SECRET signs.")
    ] = "",
    every: Every = 0,
    home: Home = HOME,
) -> None:
    """Tell a command or a webhook of every promotion and rollback, in order, at least once; a webhook of the queue."""
    use(home)
    receiver = _receiver(command, webhook)

    def told(entry: Entry) -> None:
        typer.echo(f"told: {entry.name} version {entry.version} {entry.event.replace('_', ' ')}")

    _again(lambda: announce.deliver(name, receiver, told), every)


@app.command("list")
def list_(home: Home = HOME) -> None:
    """List what was triggered, newest first, and the run that came of it."""
    from rich.console import Console
    from rich.table import Table

    use(home)
    table = Table("time", "kind", "what", "recipe", "engine", "state", "run", box=None)
    for record in once.records():
        claim, outcome = record.claim, record.outcome
        cells = [claim.trigger.kind, claim.trigger.what[:25], claim.trigger.recipe, claim.trigger.engine, record.state]
        table.add_row(f"{claim.time:%Y-%m-%d %H:%M}", *cells, outcome.run if outcome else "")
    Console().print(table)


def _receiver(command: str, webhook: str) -> announce.Command | announce.Webhook:
    if bool(command) == bool(webhook):
        raise RecipeError("who is to be told?", fix="give either --run COMMAND or --webhook URL")
    if command:
        return announce.Command(command)
    return announce.Webhook(webhook, os.environ.get(announce.SECRET, ""))


def _fire(trigger: Trigger, job: Job) -> None:
    """Run a trigger's job once, and say so; what the engine refuses is told, and tried again after a pause."""
    try:
        record, now = once.once(
            trigger, lambda: launch(job, trigger.id, lambda event: None), wait=job.wait, pause=RETRY
        )
    except once.Busy:
        return
    except AssayError as error:
        typer.echo(f"assay: {trigger.recipe}: {error}", err=True)
        return
    if now and record.outcome:
        ended = record.outcome.decision or record.outcome.state.lower()
        typer.echo(f"{trigger.kind} {trigger.what[:25]}: {trigger.recipe} run {record.outcome.run}: {ended}")


def _again(look: Callable[[], object], every: float) -> None:
    """Look once, or until the process is stopped; then trouble is told and the next look tries again."""
    while True:
        try:
            look()
        except AssayError as error:
            if not every:
                raise
            typer.echo(f"assay: {error}", err=True)
        if not every:
            return
        time.sleep(every)


def _absolute(data: str) -> str:
    return data if not data or "://" in data else str(Path(data).absolute())
