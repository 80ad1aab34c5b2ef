"""What awaits people: the queue, the page on which they see it, and their word."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .options import HOME, AsPerson, Home, Json, ModelName, Reason, use

Version = Annotated[int, typer.Option(min=1, help="The candidate's version.")]


def queue(
    name: Annotated[str, typer.Argument(help="A registered model's name; every one when left out.")] = "",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """List the candidates that passed the gate and the check, and await people."""
    from assay.components.shared import review as reviewing

    use(home)
    found = reviewing.queue(name)
    if as_json:
        for waiting in found:
            print(waiting.model_dump_json())
        return
    table = Table("model", "version", "since", "approved", "by", "the gate says", box=None)
    for waiting in found:
        said = "compared with another champion than today's; " * waiting.stale + waiting.reason
        count = f"{len(waiting.approved)} of {waiting.required}"
        cells = [waiting.name, str(waiting.version), waiting.since, count, ", ".join(waiting.approved), said]
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table if found else "Nothing awaits approval.")


def approve(
    name: ModelName,
    version: Version,
    reason: Reason,
    person: AsPerson = "",
    acknowledge: Annotated[
        bool, typer.Option("--acknowledge-champion", help="You know that it was compared with an earlier champion.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Approve a candidate; the last approval that is needed makes it the champion."""
    from assay.components.shared import people
    from assay.components.shared import review as reviewing

    use(home)
    entry = reviewing.approve(name, version, reason, people.who(person), acknowledge=acknowledge)
    if entry.event == "promoted":
        print(f"{name}: version {version} is champion, approved by {entry.actor}")
        return
    waiting = reviewing.waiting(name, version)
    print(f"{name}: version {version} has {len(waiting.approved)} of {waiting.required} approvals")


def reject(name: ModelName, version: Version, reason: Reason, person: AsPerson = "", home: Home = HOME) -> None:
    """Reject a candidate; it is final for this decision of the gate."""
    from assay.components.shared import people
    from assay.components.shared import review as reviewing

    use(home)
    entry = reviewing.reject(name, version, reason, people.who(person))
    print(f"{name}: version {version} was rejected by {entry.actor}")


def review(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8090,
    add_person: Annotated[str, typer.Option(help="Let a person decide; prints the token, once, and stops.")] = "",
    remove_person: Annotated[str, typer.Option(help="Let a person decide no more, and stop.")] = "",
    home: Home = HOME,
) -> None:
    """Open the review page: the queue, the evidence, approve or reject. For people with a token."""
    from assay.components.shared import people

    use(home)
    if add_person:
        print(people.add(add_person))
    elif remove_person:
        people.remove(remove_person)
    else:
        from ..review import server

        server.serve(port)
