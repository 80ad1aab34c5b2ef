"""The mirror of a registered version: a SageMaker model package beside it, pending approval, with its lineage.

The ledger stays the truth. The package is for people and tools that look for models in SageMaker; nobody here reads it
to decide, and approving it promotes nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.errors import RecipeError, RegistryError

from . import engine
from .aws import Account, Refused, talking

CONTENT, VERSION = "assay.content", "assay.version"
VALUE_CHARACTERS = 256
"""Of one entry of CustomerMetadataProperties."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model, and where SageMaker finds its bytes."""

    name: str
    number: int
    content: str
    """Content digest of the model's files."""
    decision: str
    """sha256 of the decision record."""
    reason: str
    """Why the gate let it in."""
    model: str
    """S3 prefix of the model's folder."""
    image: str
    """Image that serves it."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Digests of what it was made from: `data`, `results`, `recipe`, `base_model`."""

    @classmethod
    def registered(cls, name: str, number: int | None, registry_at: str, image: str) -> "Version":
        """Read a version from the ledger, and its lineage from MLflow.

        Args:
            name: The registered model.
            number: Its version; None for the champion's.
            registry_at: S3 prefix of the registry.
            image: Image that serves it.

        Raises:
            RegistryError: There is no such version.
        """
        from assay.components.shared import registry, tracking

        entry = registry.champion(name) if number is None else registry.registered(name, version=number)
        if entry is None:
            raise RegistryError(
                f"{name!r} has no {'champion' if number is None else f'version {number}'}",
                where=registry_at,
                fix="`assay history` lists what there is",
            )
        with tracking.connected() as client:
            tags = dict(client.get_model_version(name, str(entry.version)).tags)
        model = f"{registry_at.rstrip('/')}/models/{entry.content}"
        return cls(name, entry.version, entry.content, entry.decision, entry.reason, model, image, tags)

    def properties(self) -> dict[str, str]:
        """Return what stands in the package's metadata."""
        told = {f"assay.{key}": value for key, value in self.lineage.items()}
        told |= {CONTENT: self.content, VERSION: str(self.number), "assay.decision": self.decision}
        return {key: value[:VALUE_CHARACTERS] for key, value in sorted(told.items())}


def publish(name: str, number: int | None, deploy: Path | None) -> str:
    """Mirror a version of the registry that a deploy profile names; return the ARN of its model package.

    Args:
        name: The registered model.
        number: Its version; None for the champion's.
        deploy: The deploy profile.

    Raises:
        RecipeError: The profile is wrong, its registry is not on S3, or it names no image that serves.
        RegistryError: There is no such version.
        RunError: AWS refuses.
    """
    profile = engine.profile_of(deploy)
    if not profile.registry.startswith("s3://"):
        raise RecipeError(
            "SageMaker reads a model's files from S3, and the registry is not there",
            where=f"{deploy}: registry",
            fix="put the registry on S3: registry: s3://bucket/prefix",
        )
    if not profile.images.serve:
        raise RecipeError(
            "a model package names the image that serves it",
            where=f"{deploy}: images.serve",
            fix="push the images (`assay images push`) and write the URI there",
        )
    os.environ["ASSAY_REGISTRY"] = profile.registry
    if profile.mlflow_tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = profile.mlflow_tracking_uri
    version = Version.registered(name, number, profile.registry, profile.images.serve)
    return mirror(Account(profile.region), version)


def mirror(account: Account, version: Version) -> str:
    """Return the ARN of the version's model package; it is made when there is none.

    Args:
        account: Where.
        version: What to mirror.

    Raises:
        RunError: AWS refuses.
    """
    _ensure_group(account, version.name)
    known = _find(account, version)
    if known:
        return known
    request = request_of(version)
    token = digest_of(request)
    with talking("make the model package", version.name):
        return str(account.sagemaker.create_model_package(**request, ClientToken=token[:36])["ModelPackageArn"])


def request_of(version: Version) -> dict[str, Any]:
    """Return the CreateModelPackage request of a version."""
    source = {"S3Uri": f"{version.model.rstrip('/')}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    container = {"Image": version.image, "ModelDataSource": {"S3DataSource": source}}
    return {
        "ModelPackageGroupName": version.name,
        "ModelPackageDescription": version.reason[:1024],
        "InferenceSpecification": {
            "Containers": [container],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
        "ModelApprovalStatus": "PendingManualApproval",
        "CustomerMetadataProperties": version.properties(),
    }


def _ensure_group(account: Account, name: str) -> None:
    try:
        with talking("read the model package group", name):
            account.sagemaker.describe_model_package_group(ModelPackageGroupName=name)
        return
    except Refused as error:
        if not error.missing:
            raise
    with talking("make the model package group", name):
        account.sagemaker.create_model_package_group(
            ModelPackageGroupName=name, ModelPackageGroupDescription="Versions of Assay's registry, mirrored."
        )


def _find(account: Account, version: Version) -> str:
    """Return the package of the same bytes and version, or an empty text."""
    wanted = {CONTENT: version.content, VERSION: str(version.number)}
    with talking("list the model packages", version.name):
        pages = account.sagemaker.get_paginator("list_model_packages").paginate(ModelPackageGroupName=version.name)
        for entry in (entry for page in pages for entry in page["ModelPackageSummaryList"]):
            arn = str(entry["ModelPackageArn"])
            told = account.sagemaker.describe_model_package(ModelPackageName=arn).get("CustomerMetadataProperties", {})
            if wanted.items() <= told.items():
                return arn
    return ""
