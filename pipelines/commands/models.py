"""What was promoted: the champion, its history, the proof, the way back, and its server."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assay.components.contracts.errors import RecipeError

from .options import HOME, AsPerson, Deploy, Home, Json, ModelName, Reason, use


def serve(
    name: ModelName,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token (or set ASSAY_SERVE_TOKEN).")
    ] = None,
    home: Home = HOME,
) -> None:
    """Serve the champion: OpenAI's /v1/chat/completions (or /v1/embeddings), SageMaker's /ping and /invocations."""
    from assay.components.deploy_model import server

    use(home)
    server.serve(name, host=host, port=port, token_file=token_file)


def champion(
    name: ModelName,
    at: Annotated[
        datetime | None, typer.Option(help="What was champion at this time (UTC unless it says otherwise).")
    ] = None,
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Say which version is champion, now or at an earlier time, and why."""
    from assay.components.shared import registry

    use(home)
    entry = registry.champion(name, at=at)
    if entry is None:
        raise RecipeError(f"{name!r} has no champion" + (f" at {at:%Y-%m-%d %H:%M}" if at else ""))
    if as_json:
        print(entry.model_dump_json())
        return
    print(f"{name} version {entry.version}, since {entry.time}\n  {entry.reason}\n  content {entry.content[:16]}")


def history(name: ModelName, home: Home = HOME) -> None:
    """Print the promotion ledger of a model, verified link by link."""
    from assay.components.shared import registry

    use(home)
    entries = registry.history(name)
    if not entries:
        raise RecipeError(f"{name!r} has no history", fix="run its recipe first")
    table = Table("time", "event", "version", "by", "reason", box=None)
    for entry in entries:
        cells = [str(entry.time), entry.event, str(entry.version or ""), entry.actor, entry.reason]
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)


def verify(name: ModelName, as_json: Json = False, home: Home = HOME) -> None:
    """Prove that nothing was altered since the decision, from the ledger to the rows; exits 1 if something was."""
    from assay.components.shared import verification

    use(home)
    findings = verification.verify(name)
    sound = verification.is_sound(findings)
    if as_json:
        told = [finding.model_dump() for finding in findings]
        print(json.dumps({"kind": "verification", "name": name, "sound": sound, "findings": told}))
        raise typer.Exit(not sound)
    for finding in findings:
        print(f"{finding.state:<9} {finding.what}")
        for line in (finding.where, f"→ {finding.fix}" if finding.fix else ""):
            if line:
                print(f"{'':<9} {line}")
    print(f"{name}: nothing was altered" if sound else f"{name}: ALTERED since the decision; see above")
    raise typer.Exit(not sound)


def rollback(
    name: ModelName,
    reason: Reason,
    to: Annotated[
        int | None, typer.Option(min=1, help="An earlier champion's version; the previous one when left out.")
    ] = None,
    person: AsPerson = "",
    home: Home = HOME,
) -> None:
    """Make an earlier champion the champion again."""
    from assay.components.shared import people, registry

    use(home)
    entry = registry.rollback(name, reason=reason, to=to, person=people.who(person))
    print(f"{name}: version {entry.version} is champion again")


def mirror(
    name: ModelName,
    deploy: Deploy = None,
    version: Annotated[int | None, typer.Option(min=1, help="Which version; the champion's when left out.")] = None,
    home: Home = HOME,
) -> None:
    """Put a version beside SageMaker's models: a model package, pending approval. Approving it promotes nothing."""
    from ..engines.sagemaker import packages

    use(home)
    print(packages.publish(name, version, deploy))
