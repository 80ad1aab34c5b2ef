"""Put a model that passed the gate into the registry: bytes, ledger entry, MLflow version.

MLflow gets a logged model without a flavour: the plain folder that transformers, vLLM and SageMaker read, with a model
card and an `MLmodel` file that carries the signature, of chat or of an encoder. (`mlflow.transformers` pickles nothing
either, but it loads the model to infer requirements and, with adapters, writes another model than was measured.)
"""

import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlparse

from assay.components.contracts.artifacts import (
    Manifest,
    digest_of,
    is_encoder,
    link_tree,
    read_manifest,
    write_atomically,
)
from assay.components.contracts.recipe import Recipe
from assay.components.shared import registry, tracking
from assay.components.shared.dossier import Dossier, code, keep_dossier, keep_lineage

from .card import model_card
from .sbom import sbom

PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000
"""Limits of MLflow's log_batch."""
PARAM_CHARACTERS = 6000


@dataclass(frozen=True)
class Evidence:
    """A model and all that speaks for it."""

    recipe: Recipe
    folder: Path
    candidate: Manifest
    decision: dict[str, Any]
    decision_digest: str
    decision_manifest: Manifest
    data: Manifest
    results: Manifest

    @classmethod
    def read(
        cls, recipe: Recipe, candidate: str | Path, decision: str | Path, data: str | Path, results: str | Path
    ) -> Self:
        """Read the inputs of the step; a decision other than to promote this candidate is refused.

        Raises:
            RegistryError: There is no decision to promote exactly this candidate.
            DataError: An input is not what its manifest says.
        """
        manifest = read_manifest(candidate, "model", verify=False)  # hashed when the registry copies it
        record = json.loads((Path(decision) / registry.DECISION).read_bytes())
        registry.require_promotion(record, manifest.content)
        return cls(
            recipe=recipe,
            folder=Path(candidate),
            candidate=manifest,
            decision=record,
            decision_digest=registry.keep_decision(decision),
            decision_manifest=read_manifest(decision, "decision", verify=False),
            data=read_manifest(data, "splits", verify=False),
            results=read_manifest(results, "results", verify=False),
        )

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Where the walk back to the rows begins."""
        return {
            "candidate": self.candidate,
            "decision": self.decision_manifest,
            "results": self.results,
            "data": self.data,
        }

    def keep(self) -> str:
        """Keep the dossier and the manifests behind it in the registry, and return the dossier's digest."""
        keep_lineage(self.manifests)
        return keep_dossier(
            Dossier(
                name=self.recipe.name,
                content=self.candidate.content,
                decision=self.decision_digest,
                manifests={name: manifest.digest for name, manifest in self.manifests.items()},
                recipe=self.recipe.model_dump(mode="json"),
                code=code(),
                files={name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts().items()},
            )
        )

    def texts(self) -> dict[str, str]:
        """Return the files that describe the version beside its own; the same bytes on the same libraries."""
        decision = json.dumps(self.decision, indent=1, sort_keys=True, ensure_ascii=False)
        return {
            "README.md": model_card(self.recipe, self.decision, self.data.counts, self.tags()),
            "sbom.cdx.json": sbom(self.recipe, self.decision, self.manifests, self.tags()),
            registry.DECISION: decision + "\n",
        }

    def tags(self) -> dict[str, str]:
        """Return the digests that tie a version to what it was made and judged from."""
        return {
            "content": self.candidate.content,
            "decision": self.decision_digest,
            "base_model": str(self.decision["baseline"]),
            "data": self.data.digest,
            "results": self.results.digest,
            "recipe": digest_of(self.recipe.model_dump(mode="json")),
            "assay": package_version("assay"),
        }


def register(name: str, evidence: Evidence) -> int:
    """Return the version of `name` that holds this model; registers it when it is new.

    The order survives a kill at any point: bytes, MLflow's version (found again by its content tag), ledger, alias.

    Args:
        name: The registered model.
        evidence: The model, with a decision to promote it.

    Raises:
        RegistryError: The ledger refuses.
        DataError: The model's files are not the ones that were sealed.
    """
    content, decision = evidence.candidate.content, evidence.decision_digest
    kept, dossier = registry.keep_model(evidence.folder), evidence.keep()
    known = registry.registered(name, content=content)
    if known is not None:
        return registry.register(name, known.version, content, decision, dossier).version
    registry.require_turn(name, evidence.decision)  # before MLflow has a version that the ledger would refuse
    entry = registry.register(name, _mlflow_version(name, evidence, kept), content, decision, dossier)
    registry.sync_alias(name)
    return entry.version


def metrics_of(decision: dict[str, Any]) -> dict[str, float]:
    """Return the decision's table as metrics: `candidate/exact`, `candidate/exact_low`, `candidate/exact_high`."""
    found: dict[str, float] = {}
    tables = [*decision.get("arms", {}).items(), *decision.get("benchmarks", {}).items()]
    for arm, metrics in tables:
        for metric, interval in metrics.items():
            values = {"": interval.get("mean"), "_low": interval.get("low"), "_high": interval.get("high")}
            found |= {f"{arm}/{metric}{end}": float(value) for end, value in values.items() if value is not None}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return a nested mapping as `a.b.c` → text."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value, sort_keys=True)}
    return {
        name: text
        for key, item in value.items()
        for name, text in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _mlflow_version(name: str, evidence: Evidence, kept: Path) -> int:
    """Make the MLflow version, or find the one that a killed attempt made."""
    with tracking.connected() as client:
        found = client.search_model_versions(f"name = '{name}' and tags.content = '{evidence.candidate.content}'")
        if found:
            version = min(found, key=lambda version: int(version.version))
            _describe_in(client, client.get_logged_model(version.source.removeprefix("models:/")), evidence)
            return int(version.version)
        experiment = tracking.experiment(client, name)
        run, ours = _run(client, experiment, evidence)
        model = _logged_model(client, experiment, run, name, evidence, kept)
        tracking.make_registered_model(client, name)
        made = client.create_model_version(
            name,
            source=f"models:/{model}",
            run_id=run,
            tags=evidence.tags(),
            description=evidence.decision.get("reason", ""),
            model_id=model,
        )
        if ours:
            client.set_terminated(run)
        return int(made.version)


def _logged_model(client: Any, experiment: str, run: str, name: str, evidence: Evidence, kept: Path) -> str:
    """Make MLflow's record of the model with its numbers and files, and return its id."""
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(
        experiment,
        name=name,
        source_run_id=run,
        tags=evidence.tags(),
        model_type="embeddings" if is_encoder(evidence.folder) else "chat",
    )
    _log_numbers(client, run, model.model_id, evidence)
    _log_files(client, model, evidence, kept)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def _run(client: Any, experiment: str, evidence: Evidence) -> tuple[str, bool]:
    """Return the run to log to, and whether it is ours to end: a run that the engine opened stays open."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        return given, False
    run = client.create_run(experiment, run_name=f"register {evidence.candidate.content[:12]}")
    return str(run.info.run_id), True


def _log_numbers(client: Any, run: str, model_id: str, evidence: Evidence) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0, model_id=model_id) for key, value in metrics_of(evidence.decision).items()]
    recipe = flatten(evidence.recipe.model_dump(mode="json"), "recipe")
    params = [Param(key, text[:PARAM_CHARACTERS]) for key, text in recipe.items()]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run, metrics=metrics[start : start + METRICS_PER_CALL])
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run, params=params[start : start + PARAMS_PER_CALL])


def _log_files(client: Any, model: Any, evidence: Evidence, kept: Path) -> None:
    """Give MLflow the model's files: by hard links where its store is a folder of this machine, else by upload."""
    folder = _local_folder(model.artifact_location)
    if folder is not None:
        link_tree(kept, folder)
    else:
        client.log_model_artifacts(model.model_id, str(kept))
    _describe_in(client, model, evidence)


def _describe_in(client: Any, model: Any, evidence: Evidence) -> None:
    """Give MLflow the files that describe a model; a killed attempt may have left those of other evidence."""
    folder = _local_folder(model.artifact_location)
    if folder is not None:
        _describe(folder, model, evidence)
        return
    with tempfile.TemporaryDirectory() as extra:
        _describe(Path(extra), model, evidence)
        client.log_model_artifacts(model.model_id, extra)


def _local_folder(location: str) -> Path | None:
    address = urlparse(location)
    return Path(unquote(address.path)) if address.scheme in ("", "file") else None


def _describe(folder: Path, model: Any, evidence: Evidence) -> None:
    """Write the model card, the decision, and an `MLmodel` file with the signature and no flavour."""
    from mlflow.models import Model

    described = Model(
        model_id=model.model_id,
        run_id=model.source_run_id,
        artifact_path=model.artifact_location,
        signature=_signature(is_encoder(evidence.folder)),
        metadata=evidence.tags(),
    )
    for name, text in {"MLmodel": described.to_yaml(), **evidence.texts()}.items():
        write_atomically(folder / name, text)  # never into a linked file


def _signature(embeds: bool) -> Any:
    """Return what the served model takes and gives: a conversation and its answer, or texts and their vectors."""
    from mlflow.models import ModelSignature
    from mlflow.types import llm

    if embeds:
        return ModelSignature(llm.EMBEDDING_MODEL_INPUT_SCHEMA, llm.EMBEDDING_MODEL_OUTPUT_SCHEMA)
    return ModelSignature(llm.CHAT_MODEL_INPUT_SCHEMA, llm.CHAT_MODEL_OUTPUT_SCHEMA)
