"""What of a recipe and a deploy profile would not work on a cluster, found before anything is submitted."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from assay.components.contracts.recipe import Recipe
from assay.pipelines.ir import model, portability
from assay.pipelines.ir.portability import Finding

from .compile import Placed, is_pinned, place, placements
from .profile import Profile


def check(path: Path, recipe: Recipe, data: str, profile: Profile) -> list[Finding]:
    """Return the findings, errors first.

    Args:
        path: The compiled pipeline; it is rewritten for the cluster.
        recipe: What it was compiled from.
        data: URI of the user's rows.
        profile: The deploy profile.
    """
    portable = portability.lint(model.load(path), "kubeflow")
    # Of the imported rows `_places` speaks: it knows the shared volume.
    found = [finding for finding in portable if not finding.where.endswith(": importer")]
    place(path, profile)
    documents = [*yaml.load_all(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {}][:2]
    placed = list(placements(documents, profile))
    found += [*_images(placed), *_places(recipe, data, profile), *_state(placed, profile)]
    found += [*_patterns(placed, profile), *_devices(placed)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: (order.index(finding.level), finding.where))


def _images(placed: list[Placed]) -> Iterator[Finding]:
    """An image without a registry cannot be pulled; one without a digest is another image tomorrow."""
    for image in sorted({entry.container["image"] for entry in placed}):
        where = f"image {image}"
        if "/" not in image:
            fix = "build and push it, and name it under `images` in the deploy profile"
            yield Finding("error", where, "no registry is named, so no cluster can pull it", fix)
        elif not is_pinned(image):
            fix = "name it by its digest (…@sha256:…); `assay images digest` prints it"
            yield Finding("warning", where, "a tag can move, and the cache would not know", fix)


def _places(recipe: Recipe, data: str, profile: Profile) -> Iterator[Finding]:
    """What lies on this machine is not there in a pod."""
    model = recipe.base_model
    local = {
        "data": data if data and "://" not in data.removeprefix("file://") else "",
        "base_model": model if model.startswith(("/", ".", "~", "file://")) else "",
    }
    for where, path in local.items():
        if path and not (profile.volume and path.startswith(profile.volume.path)):
            fix = "upload it (s3://…), or put it on the shared volume"
            yield Finding("error", where, f"{path} is a path of this machine", fix)


def _state(placed: list[Placed], profile: Profile) -> Iterator[Finding]:
    """The promotion ledger must outlive the pod that writes it."""
    variables = {entry["name"] for task in placed for entry in task.container.get("env", [])}
    secret = {variable for task in placed for keys in task.settings.secrets.values() for variable in keys.values()}
    if "ASSAY_REGISTRY" not in variables:
        fix = "name a ReadWriteMany claim under `volume`, or ASSAY_REGISTRY under `default.env`"
        yield Finding("error", "volume", "the promotion ledger would end with its pod", fix)
    if "MLFLOW_TRACKING_URI" not in variables | secret:
        what = "MLflow's embedded store is SQLite, which a network volume corrupts when two pods write"
        yield Finding("warning", "default.env", what, "give MLFLOW_TRACKING_URI the address of a tracking server")


def _patterns(placed: list[Placed], profile: Profile) -> Iterator[Finding]:
    """A pattern that matches nothing is a typing error."""
    names = [entry.path.rpartition("/")[2] for entry in placed]
    for pattern in profile.tasks:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield Finding(
                "error", f"tasks.{pattern}", "no task has such a name", f"choose of: {', '.join(sorted(names))}"
            )


def _devices(placed: list[Placed]) -> Iterator[Finding]:
    """What a GPU step needs on most clusters."""
    for entry in placed:
        where, settings = f"root/{entry.path}", entry.settings
        if settings.nodes:
            fix = "install it, and let the service account create trainjobs (infra/README.md)"
            yield Finding("note", where, "trains on several nodes: the cluster needs Kubeflow Trainer 2", fix)
        elif "accelerator" in entry.container["resources"]:
            if not settings.tolerations:
                fix = "add `tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]`"
                yield Finding("note", where, "asks for a GPU and tolerates no taint; GPU nodes often have one", fix)
            if not settings.shared_memory:
                what = "asks for a GPU with 64 MiB of /dev/shm, too little for worker processes"
                yield Finding("warning", where, what, "set `shared_memory`")
