"""Putting a pipeline and its runs on the server, so that doing it twice does it once.

A version is named by the digest of the definition, so an unchanged recipe uploads nothing. A run is named by the
version, and by what triggered it where there is such a name (`ASSAY_TRIGGER_ID`, for example the id of a CI build): the
same trigger is one run, whatever became of it. Without one, a second submission joins a run that is still going.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import sha256_file
from assay.components.contracts.errors import RecipeError, RunError

from .client import Refused, Server

TRIGGER = "ASSAY_TRIGGER_ID"
_TRIGGER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")
_GOING = (None, "RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED")


@dataclass(frozen=True)
class Version:
    """One definition on the server."""

    pipeline_id: str
    version_id: str
    name: str
    """Recipe and digest: `medication-directions-0123456789ab`."""

    def reference(self) -> Any:
        """Return it as requests name it."""
        import kfp_server_api

        return kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=self.pipeline_id, pipeline_version_id=self.version_id
        )


def trigger_id() -> str:
    """Return the name of what triggered this run; empty when nothing has one.

    Raises:
        RecipeError: It cannot be part of a run's name.
    """
    given = os.environ.get(TRIGGER, "")
    if given and not _TRIGGER.fullmatch(given):
        raise RecipeError(f"{given[:40]!r} cannot name a trigger", where=TRIGGER, fix="use letters, digits and ._:/@+-")
    return given


def experiment(server: Server) -> str:
    """Return the id of the profile's experiment; it is made when it is missing."""
    import kfp_server_api

    api, profile = server.client.experiments, server.profile
    found = server.listed(
        "list experiments", api.experiment_service_list_experiments, "experiments", profile.experiment, **_space(server)
    )
    if found:
        return str(found[0].experiment_id)
    body = kfp_server_api.V2beta1Experiment(display_name=profile.experiment, **_space(server))
    made = server.call("create the experiment", api.experiment_service_create_experiment, experiment=body)
    return str(made.experiment_id)


def upload(server: Server, name: str, path: Path) -> Version:
    """Put a definition on the server, unless it is there.

    Args:
        server: The server.
        name: Of the pipeline.
        path: The definition.
    """
    digest = sha256_file(path)
    pipeline_id = _pipeline(server, name)
    known = _version(server, pipeline_id, digest)
    if known is None:
        try:
            known = server.call(
                "upload the pipeline",
                server.client.pipeline_uploads.upload_pipeline_version,
                uploadfile=str(path),
                name=digest,
                pipelineid=pipeline_id,
                description=f"sha256 of the definition: {digest}",
            )
        except Refused as error:
            known = _version(server, pipeline_id, digest) if error.status == 409 else None  # another one was faster
            if known is None:
                raise
    return Version(pipeline_id, str(known.pipeline_version_id), f"{name}-{digest[:12]}")


def start(server: Server, version: Version, trigger: str) -> Any:
    """Return the run of a version: one that is there (see above), or a new one."""
    import kfp_server_api

    profile, api = server.profile, server.client.runs
    name = f"{version.name}-{trigger}" if trigger else version.name
    experiment_id = experiment(server)
    known = _runs(server, experiment_id, name)
    if not trigger:
        known = [run for run in known if run.state in _GOING]
    if known:
        return known[0]
    body = kfp_server_api.V2beta1Run(
        experiment_id=experiment_id,
        display_name=name,
        pipeline_version_reference=version.reference(),
        runtime_config=runtime_config(server),
        service_account=profile.service_account or None,
    )
    made = server.call("start a run", api.run_service_create_run, run=body)
    return _first(server, experiment_id, made) if trigger else made


def runtime_config(server: Server) -> Any:
    """Return the values that a run gets; the recipe's are in the definition."""
    import kfp_server_api

    return kfp_server_api.V2beta1RuntimeConfig(parameters={}, pipeline_root=server.profile.pipeline_root or None)


def _first(server: Server, experiment_id: str, made: Any) -> Any:
    """Return the first run of a trigger: of two that were submitted at once, the later one ends itself."""
    first = _runs(server, experiment_id, made.display_name)[0]
    if first.run_id != made.run_id:
        server.call("stop a duplicate", server.client.runs.run_service_terminate_run, run_id=made.run_id)
    return first


def _runs(server: Server, experiment_id: str, name: str) -> list[Any]:
    api = server.client.runs
    found = server.listed("list runs", api.run_service_list_runs, "runs", name, experiment_id=experiment_id)
    return sorted(found, key=lambda run: (run.created_at, run.run_id))


def _pipeline(server: Server, name: str) -> str:
    """Return the id of a pipeline; it is made, without a version, when it is missing."""
    import kfp_server_api

    api = server.client.pipelines
    found = server.listed("list pipelines", api.pipeline_service_list_pipelines, "pipelines", name, **_space(server))
    if found:
        return str(found[0].pipeline_id)
    body = kfp_server_api.V2beta1Pipeline(name=name, display_name=name, **_space(server))
    made = server.call("create the pipeline", api.pipeline_service_create_pipeline, pipeline=body)
    if not made.pipeline_id:
        raise RunError("the server made a pipeline without an id", where=server.profile.host)
    return str(made.pipeline_id)


def _version(server: Server, pipeline_id: str, digest: str) -> Any:
    api = server.client.pipelines
    found = server.listed(
        "list versions",
        api.pipeline_service_list_pipeline_versions,
        "pipeline_versions",
        digest,
        pipeline_id=pipeline_id,
    )
    return found[0] if found else None


def _space(server: Server) -> dict[str, str]:
    return {"namespace": server.profile.namespace} if server.profile.namespace else {}
