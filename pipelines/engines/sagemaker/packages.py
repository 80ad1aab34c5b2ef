"""The mirror of a registered version: a SageMaker model package beside it, pending approval, with its lineage.

The ledger stays the truth. The package is for people and tools that look for models in SageMaker; nobody here reads it
to decide, and approving it promotes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.errors import RegistryError

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
    def registered(cls, name: str, number: int, model: str, image: str) -> "Version":
        """Read a version from the ledger, and its lineage from MLflow.

        Args:
            name: The registered model.
            number: Its version.
            model: S3 prefix of the model's folder.
            image: Image that serves it.

        Raises:
            RegistryError: There is no such version.
        """
        from assay.components.shared import registry, tracking

        entry = registry.registered(name, version=number)
        if entry is None:
            raise RegistryError(f"{name!r} has no version {number}", fix="`assay history` lists what there is")
        with tracking.connected() as client:
            tags = dict(client.get_model_version(name, str(number)).tags)
        return cls(name, number, entry.content, entry.decision, entry.reason, model, image, tags)

    def properties(self) -> dict[str, str]:
        """Return what stands in the package's metadata."""
        told = {f"assay.{key}": value for key, value in self.lineage.items()}
        told |= {CONTENT: self.content, VERSION: str(self.number), "assay.decision": self.decision}
        return {key: value[:VALUE_CHARACTERS] for key, value in sorted(told.items())}


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
