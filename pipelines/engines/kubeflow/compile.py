"""From a compiled pipeline to what a Kubeflow cluster is told: images, resources, and the platform settings.

The pipeline stays what it was compiled to; this fills in what differs between clusters, in the words of kfp-kubernetes
(whose own functions want a task under construction, and half a second to import).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from assay.components.runtime.step import IMAGES, image
from assay.pipelines.ir import model

from . import trainjob
from .profile import Profile, Settings

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PINNED = re.compile(r".+@sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Placed:
    """A task that runs in a container, and what it gets."""

    path: str
    """In the graph, for example `condition-branches-1/condition-2/deploy-model`."""
    task: dict[str, Any]
    container: dict[str, Any]
    platform: dict[str, Any]
    settings: Settings


def is_pinned(reference: str) -> bool:
    """Return whether an image is named by its digest."""
    return bool(_PINNED.fullmatch(reference))


def place(path: Path, profile: Profile) -> None:
    """Rewrite a compiled pipeline for a cluster; the same pipeline and profile give the same bytes.

    Args:
        path: The YAML file that kfp wrote.
        profile: What the cluster offers.
    """
    text = path.read_text(encoding="utf-8")
    documents = [*yaml.load_all(text, Loader=_LOADER), {}][:2]
    for placed in placements(documents, profile):
        _place_image(placed, profile)
        _place_resources(placed)
        _place_environment(placed, profile)
        placed.platform.update(_platform(placed, profile))
        if placed.settings.nodes:
            trainjob.wrap(placed.container, placed.platform, placed.settings, profile)
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    path.write_text(comments + yaml.dump_all(documents, Dumper=_DUMPER, sort_keys=True), encoding="utf-8")


def placements(documents: list[dict[str, Any]], profile: Profile) -> Iterator[Placed]:
    """Yield every container task of a pipeline with the parts of the two documents that speak of it."""
    pipeline, platforms = documents
    executors = pipeline["deploymentSpec"]["executors"]
    kubernetes = platforms.setdefault("platforms", {}).setdefault("kubernetes", {})
    settings = kubernetes.setdefault("deploymentSpec", {}).setdefault("executors", {})
    for path, task, label in _leaves(pipeline):
        container = executors[label].get("container")
        if container:
            platform = settings.setdefault(label, {})
            kind = platform.get("podMetadata", {}).get("labels", {}).get("assay-kind", "")
            wanted = profile.settings(path.rpartition("/")[2], kind)
            yield Placed(path, task, container, platform, wanted)


def _leaves(pipeline: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield path, task and executor label of every leaf."""
    for path, _, component in model.load(pipeline).walk():
        if component.executor_label:
            yield path, _task(pipeline, path), component.executor_label


def _task(pipeline: dict[str, Any], path: str) -> dict[str, Any]:
    *dags, name = path.split("/")
    component = pipeline["root"]
    for dag in dags:
        component = pipeline["components"][component["dag"]["tasks"][dag]["componentRef"]["name"]]
    found: dict[str, Any] = component["dag"]["tasks"][name]
    return found


def _place_image(placed: Placed, profile: Profile) -> None:
    roles = {image(role): role for role in IMAGES}
    role = roles.get(placed.container["image"])
    if role:
        placed.container["image"] = profile.images.get(role, placed.container["image"])  # type: ignore[call-overload]


def _place_resources(placed: Placed) -> None:
    settings, resources = placed.settings, placed.container.setdefault("resources", {})
    asked = resources.get("accelerator", {}).get("resourceCount", "0")
    count = str(asked if settings.gpus is None else settings.gpus)
    resources.pop("accelerator", None)
    if count != "0":
        kind = settings.gpu_resource
        # The older names too: an API server before 2.4 reads those alone.
        resources["accelerator"] = {"resourceType": kind, "resourceCount": count, "type": kind, "count": count}
    if settings.retries is not None:
        placed.task.pop("retryPolicy", None)
    if settings.retries:
        backoff = {"backoffDuration": "10s", "backoffFactor": 2.0, "backoffMaxDuration": "300s"}
        placed.task["retryPolicy"] = {"maxRetryCount": settings.retries, **backoff}


def _place_environment(placed: Placed, profile: Profile) -> None:
    given = {entry["name"]: entry.get("value", "") for entry in placed.container.get("env", [])}
    environment = {**given, **_folders(profile), **placed.settings.env}
    if environment:
        placed.container["env"] = [{"name": name, "value": value} for name, value in sorted(environment.items())]


def _folders(profile: Profile) -> dict[str, str]:
    """Return the variables that lead a step to the shared volume."""
    if profile.volume is None:
        return {}
    root = profile.volume.path.rstrip("/")
    names = {"ASSAY_HOME": "home", "ASSAY_REGISTRY": "registry", "ASSAY_WORK_ROOT": "work"}
    return {name: f"{root}/{folder}" for name, folder in names.items()}


def _platform(placed: Placed, profile: Profile) -> dict[str, Any]:
    """Return a task's platform settings as kfp-kubernetes writes them."""
    settings, found = placed.settings, dict[str, Any]()
    if settings.timeout_minutes:
        found["activeDeadlineSeconds"] = str(round(settings.timeout_minutes * 60))
    if settings.node_selector:
        found["nodeSelector"] = {"labels": settings.node_selector}
    if settings.tolerations:
        found["tolerations"] = [entry.manifest() for entry in settings.tolerations]
    if settings.shared_memory:
        size = settings.shared_memory
        mount = {"volumeName": "dshm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": size}
        found["emptyDirMounts"] = [mount]
    if settings.secrets:
        found["secretAsEnv"] = [_secret(name, keys) for name, keys in sorted(settings.secrets.items())]
    if profile.volume:
        claim = profile.volume.claim
        reference = {"constant": claim, "pvcNameParameter": _constant(claim)}
        found["pvcMount"] = [{**reference, "mountPath": profile.volume.path}]
    if profile.image_pull_secrets:
        found["imagePullSecret"] = [
            {"secretName": name, "secretNameParameter": _constant(name)} for name in profile.image_pull_secrets
        ]
    return found


def _secret(name: str, keys: dict[str, str]) -> dict[str, Any]:
    mapping = [{"secretKey": key, "envVar": variable} for key, variable in sorted(keys.items())]
    # Both names: an API server before 2.5 reads `secretName` alone.
    return {"secretName": name, "secretNameParameter": _constant(name), "keyToEnv": mapping, "optional": False}


def _constant(value: str) -> dict[str, Any]:
    return {"runtimeValue": {"constant": value}}
