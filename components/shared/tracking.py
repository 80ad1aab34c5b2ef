"""The one way to MLflow: its store, and its aliases as a view of the ledger. Importing MLflow costs two seconds."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..contracts.errors import RegistryError
from ..runtime.context import registry_address


def tracking_uri() -> str:
    """Return the tracking server's address, or that of the embedded store below the registry's folder.

    Raises:
        RegistryError: There is no server, and the registry is not a folder.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and registry_address().startswith("s3://"):
        raise RegistryError(
            "a registry on S3 has no embedded MLflow store",
            where=registry_address(),
            fix="set MLFLOW_TRACKING_URI to the team's tracking server",
        )
    return given or _embedded()


@contextmanager
def connected() -> Iterator[Any]:
    """Give an `MlflowClient` on the configured store; makes the embedded one when it is missing.

    Registered models lie in the same store unless MLFLOW_REGISTRY_URI says otherwise. The addresses stand in the
    environment while the block runs, for the parts of MLflow that make a client of their own, and are gone after it
    (`mlflow.set_tracking_uri` would leave them there, over the user's).
    """
    uri = tracking_uri()
    addresses = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_REGISTRY_URI": os.environ.get("MLFLOW_REGISTRY_URI") or uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    if uri.startswith("sqlite:///"):
        _prepare(Path(uri.removeprefix("sqlite:///")))
    before = {name: os.environ.get(name) for name in addresses}
    os.environ.update(addresses)
    try:
        from mlflow import MlflowClient

        yield MlflowClient(uri, addresses["MLFLOW_REGISTRY_URI"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def experiment(client: Any, name: str) -> str:
    """Return the id of the experiment that runs of `name` belong to; made when it is missing."""
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given:
        return given
    known = client.get_experiment_by_name(name)
    if known:
        return str(known.experiment_id)
    ours = tracking_uri() == _embedded()
    folder = Path(registry_address(), "artifacts", name).as_uri() if ours else None
    return str(client.create_experiment(name, artifact_location=folder))


def make_registered_model(client: Any, name: str) -> None:
    """Make a registered model where there is none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def set_aliases(name: str, wanted: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Make a registered model's aliases what they should be.

    Args:
        name: The registered model.
        wanted: Version by alias; 0 for none.

    Returns:
        What was changed: alias → (version it had, version it has).

    Raises:
        RegistryError: MLflow does not know the model or a version.
    """
    with connected() as client:
        from mlflow.exceptions import MlflowException

        try:
            aliases = client.get_registered_model(name).aliases
            had = {alias: int(aliases.get(alias, 0)) for alias in wanted}
            changed = {alias: (had[alias], version) for alias, version in wanted.items() if had[alias] != version}
            for alias, (_, version) in changed.items():
                if version:
                    client.set_registered_model_alias(name, alias, str(version))
                else:
                    client.delete_registered_model_alias(name, alias)
        except MlflowException as error:
            raise RegistryError(
                f"MLflow cannot set the aliases of {name!r}: {str(error).partition(chr(10))[0]}",
                where=tracking_uri(),
                fix="the ledger names a version that MLflow does not have: check MLFLOW_TRACKING_URI",
            ) from error
    return changed


def _embedded() -> str:
    return f"sqlite:///{registry_address()}/mlflow.db"


def _prepare(path: Path) -> None:
    """Make the database with a write-ahead log: a reader then never waits for a writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path, timeout=20) as database:
        database.execute("PRAGMA journal_mode=WAL")
