"""The bill of materials of a version, in CycloneDX 1.6 (ECMA-424): the model, its files, its data, its libraries.

The same evidence on the same libraries gives the same bytes: there is no time in it, and its serial number is made of
the digests. The libraries are those that `assay` requires and that are installed where the version is registered; an
image without torch registers without naming it.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from assay.components.contracts.artifacts import Manifest
from assay.components.contracts.recipe import Recipe

REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def sbom(
    recipe: Recipe, decision: Mapping[str, Any], manifests: Mapping[str, Manifest], tags: Mapping[str, str]
) -> str:
    """Return the bill of materials as JSON.

    Args:
        recipe: What the model is for, and what it was made from.
        decision: The gate's record, with every arm's table.
        manifests: Of `candidate`, `data`, `results` and `decision`.
        tags: The version's digests.
    """
    datasets = [_dataset(name, manifest) for name, manifest in manifests.items() if name != "candidate"]
    base = {"type": "machine-learning-model", "bom-ref": "base-model", "name": recipe.base_model}
    parts = [{**base, "hashes": _hashes(tags["base_model"])}, *datasets, *map(_library, libraries("assay"))]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": recipe.name,
        "version": manifests["candidate"].content,
        "description": recipe.title or f"A model for {recipe.task}.",
        "modelCard": _card(recipe, decision),
        "components": [_file(name, entry.sha256) for name, entry in sorted(manifests["candidate"].files.items())],
        "properties": [{"name": f"assay:{name}", "value": value} for name, value in sorted(tags.items())],
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, tags['content'] + tags['decision'])}",
        "version": 1,
        "metadata": {"component": model},
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": sorted(str(part["bom-ref"]) for part in parts)}],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def libraries(root: str) -> list[Distribution]:
    """Return the installed distributions that one requires, directly or not, itself among them, sorted by name.

    Extras are left out: nothing of ours asks for them.
    """
    found: dict[str, Distribution] = {}
    waiting = [root]
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform or Python, or of another image
            continue
        waiting += list(_required(found[name]))
    return [found[name] for name in sorted(found)]


def _required(library: Distribution) -> Iterator[str]:
    for line in library.requires or []:
        requirement, _, condition = line.partition(";")
        named = REQUIREMENT.match(requirement.strip())
        if named and "extra" not in condition:
            yield named[0]


def _library(library: Distribution) -> dict[str, Any]:
    name, version = _normal(library.metadata["Name"]), library.version
    purl = f"pkg:pypi/{name}@{version}"
    licence = library.metadata.json.get("license_expression")
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": [{"expression": licence}]} if licence else {}),
    }


def _dataset(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": name,
        "name": name,
        "version": manifest.digest,
        "data": [{"type": "dataset", "name": f"{part} ({rows} rows)"} for part, rows in manifest.counts.items()],
        "components": [_file(f"{name}/{path}", entry.sha256) for path, entry in sorted(manifest.files.items())],
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(sha256)}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _card(recipe: Recipe, decision: Mapping[str, Any]) -> dict[str, Any]:
    measured = [
        {
            "type": metric,
            "value": str(value["mean"]),
            "slice": arm,
            "confidenceInterval": {"lowerBound": str(value.get("low")), "upperBound": str(value.get("high"))},
        }
        for arm, metrics in decision.get("arms", {}).items()
        for metric, value in metrics.items()
        if value.get("mean") is not None
    ]
    return {
        "modelParameters": {"task": recipe.task, "datasets": [{"ref": "data"}]},
        "quantitativeAnalysis": {"performanceMetrics": measured},
        "considerations": {
            "useCases": [f"{recipe.task}, with the prompts that the task writes: this is what was measured"],
            "technicalLimitations": ["rows that look different from the held-out rows were not measured"],
        },
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
