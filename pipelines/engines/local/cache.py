"""The cache of steps: outputs by what they are a function of.

    HOME/cache/steps/<key>/entry.json, outputs/…

An entry is made beside its place and renamed into it, so a kill never leaves half of one. Files are hard links to those
of the run. Before an entry is used, every file of it must be there with its size; a damaged one is removed.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import digest_of, link_tree
from assay.pipelines.ir.model import Component, Container
from assay.pipelines.ir.placeholders import run_values

from .artifacts import Artifact, file_sizes
from .store import read_json, write_json

_ABANDONED_SECONDS = 86_400


@dataclass(frozen=True)
class Result:
    """What a finished step left."""

    parameters: dict[str, Any]
    artifacts: dict[str, list[Artifact]]
    sizes: dict[str, int]
    """Bytes of every file by its path in the folder of outputs."""
    seconds: float = 0.0

    def dump(self) -> dict[str, Any]:
        """Return it as JSON."""
        artifacts = {name: [artifact.dump() for artifact in found] for name, found in self.artifacts.items()}
        return {"parameters": self.parameters, "artifacts": artifacts, "sizes": self.sizes, "seconds": self.seconds}

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Result":
        """Return the result that `dump` wrote."""
        artifacts = {name: [Artifact(**entry) for entry in found] for name, found in raw["artifacts"].items()}
        return cls(raw["parameters"], artifacts, raw["sizes"], raw["seconds"])

    def is_whole(self, folder: Path) -> bool:
        """Whether every file is in `folder` (the outputs) with its size."""
        return file_sizes(folder) == self.sizes

    def moved(self, old: Path, new: Path) -> "Result":
        """Return it with the outputs that lay in `old` lying in `new`."""

        def move(artifact: Artifact) -> Artifact:
            uri = artifact.uri
            return (
                replace(artifact, uri=str(new) + uri.removeprefix(str(old))) if uri.startswith(f"{old}/") else artifact
            )

        return replace(
            self, artifacts={name: [move(entry) for entry in found] for name, found in self.artifacts.items()}
        )


def step_key(
    component: Component,
    container: Container,
    cache_key: str,
    parameters: Mapping[str, Any],
    artifacts: Mapping[str, list[Artifact]],
    run: Mapping[str, str],
) -> str:
    """Return the digest of all that a step's outputs depend on; never a URI, never a time.

    Args:
        component: Declares the outputs.
        container: The command with its code digest, the image, the environment.
        cache_key: A key the author gave; it separates results and never joins different inputs.
        parameters: Values by name.
        artifacts: Inputs by name.
        run: Values of the run's placeholders; only those the command names count.
    """
    outputs = component.output_definitions
    texts = [*container.command, *container.args, *(entry.value for entry in container.env)]
    return digest_of(
        {
            "command": container.command,
            "args": container.args,
            "image": container.image,
            "env": [[entry.name, entry.value] for entry in container.env],
            "run": run_values(texts, run),
            "cache_key": cache_key,
            "parameters": dict(parameters),
            "artifacts": {name: [entry.identity() for entry in found] for name, found in artifacts.items()},
            "outputs": {
                "parameters": {name: spec.parameter_type for name, spec in outputs.parameters.items()},
                "artifacts": {name: spec.artifact_type.schema_title for name, spec in outputs.artifacts.items()},
            },
        }
    )


class StepCache:
    """Entries of finished steps below a home."""

    def __init__(self, home: Path, warn: Callable[[str], None]) -> None:
        self.folder = home / "cache" / "steps"
        self.warn = warn
        for part in self.folder.glob(".*"):  # what a kill left of entries that were being made or removed
            if time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(part, ignore_errors=True)

    def get(self, key: str, outputs: Path) -> Result | None:
        """Put an entry's files into `outputs` and return its result, or None when there is no whole entry.

        Args:
            key: From `step_key`.
            outputs: The task's folder of outputs; it is replaced.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            raw = read_json(entry / "entry.json")
            result = Result.of(raw)
            if not result.is_whole(entry / "outputs"):
                raise ValueError("a file is missing or has another size")
            shutil.rmtree(outputs, ignore_errors=True)
            link_tree(entry / "outputs", outputs)
        except (OSError, TypeError, KeyError, ValueError, shutil.Error) as error:
            self.warn(f"the cache entry {key[:16]} is damaged and was removed ({error}); the step runs again")
            self.drop(key)
            return None
        return result.moved(Path(raw["outputs"]), outputs)

    def put(self, key: str, outputs: Path, result: Result) -> None:
        """Keep a finished step's outputs; an entry of that key is replaced."""
        part = self.folder / f".{key}.{uuid.uuid4().hex[:8]}"
        part.mkdir(parents=True)
        try:
            link_tree(outputs, part / "outputs")
            write_json(part / "entry.json", {**result.dump(), "outputs": str(outputs)})
            self.drop(key)
            part.rename(self.folder / key)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def drop(self, key: str) -> None:
        """Remove an entry, at once for every reader."""
        aside = self.folder / f".{key}.{uuid.uuid4().hex[:8]}.dropped"
        try:
            (self.folder / key).rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)
