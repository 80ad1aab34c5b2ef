"""The policy lint: what of a profile and its definition an account's security review would stop at.

What each finding means for the submission (refuse, warn, ignore) is the profile's `policy`.
"""

import re
from collections.abc import Iterator
from typing import Any

from assay.pipelines.ir.portability import Finding

from .profile import Deploy, Verdict
from .request import has_own_disks
from .translate import Translation
from .validate import walk

_LEVELS = {"refuse": "error", "warn": "warning"}
_BROAD = re.compile(r"\*|admin|fullaccess|poweruser|AmazonSageMaker-ExecutionRole", re.IGNORECASE)
"""Roles that are made for everything; the last is the one that SageMaker's console makes, with full access."""
_GPU = re.compile(r"ml\.(g\d|p\d|trn\d|inf\d)")


def policy(deploy: Deploy, translation: Translation) -> list[Finding]:
    """Return what the policy of a profile refuses or warns about in what was translated with it."""
    jobs = [step for step in walk(translation.definition["Steps"]) if step["Type"] in ("Processing", "Training")]
    rules = deploy.policy
    found = [
        *_judged(rules.kms, _keys(deploy, jobs)),
        *_judged(rules.vpc, _vpc(deploy)),
        *_judged(rules.wildcard_role, _broad_roles(jobs, deploy)),
        *_judged(rules.shared_role, _shared_roles(deploy)),
        *_judged(rules.unpinned_image, _images(jobs)),
        *_judged(rules.public_traffic, _traffic(deploy, jobs)),
        *_judged("warn", _accelerators(jobs, translation.accelerated)),
        *_judged("warn", _cut_off(deploy, jobs)),
    ]
    return sorted(found, key=lambda finding: (finding.where, finding.what))


def _judged(verdict: Verdict, problems: Iterator[tuple[str, str, str]]) -> Iterator[Finding]:
    """Yield problems (where, what, fix) at the level that the policy gives them."""
    if verdict != "ignore":
        level: Any = _LEVELS[verdict]
        yield from (Finding(level, *problem) for problem in problems)


def _keys(deploy: Deploy, jobs: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    where, fix = "deploy profile: keys", "name a KMS key, or say policy.kms: ignore"
    if not deploy.keys.output:
        yield where, "what the jobs write to S3 is encrypted with AWS's own key", fix
    if not deploy.keys.volume and any(not has_own_disks(_instance(job)) for job in jobs):
        yield where, "the jobs' disks are encrypted with AWS's own key", fix


def _vpc(deploy: Deploy) -> Iterator[tuple[str, str, str]]:
    if not deploy.network.subnets:
        fix = "name subnets and security groups, or say policy.vpc: ignore"
        yield "deploy profile: network", "the jobs run outside of your VPC, with a way to the internet", fix


def _broad_roles(jobs: list[dict[str, Any]], deploy: Deploy) -> Iterator[tuple[str, str, str]]:
    roles = {job["Arguments"]["RoleArn"] for job in jobs} | {deploy.roles.pipeline}
    for role in sorted(role for role in roles if _BROAD.search(role)):
        fix = "make a role that may do what these steps do, and nothing else"
        yield "deploy profile: roles", f"{role} is a role for everything", fix


def _shared_roles(deploy: Deploy) -> Iterator[tuple[str, str, str]]:
    roles = deploy.roles
    if len({roles.pipeline, roles.processing, roles.training}) < 3:
        fix = "give pipeline, processing and training roles of their own"
        yield "deploy profile: roles", "one role has several duties, so whoever trains can register as well", fix


def _images(jobs: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    users: dict[str, list[str]] = {}
    for job in jobs:
        if image := _image(job):
            users.setdefault(image, []).append(job["Name"])
    for image, steps in sorted(users.items()):
        if "@sha256:" not in image:
            what = f"{image} is not named by digest ({', '.join(steps[:3])}{' …' if len(steps) > 3 else ''})"
            yield "deploy profile: images", what, "name it as REPOSITORY@sha256:…, so that what ran is known"


def _traffic(deploy: Deploy, jobs: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for job in jobs:
        several = job["Arguments"].get("ResourceConfig", {}).get("InstanceCount", 1) > 1
        if several and not deploy.network.encrypt_traffic:
            yield job["Name"], "the traffic between its nodes is not encrypted", "set network.encrypt_traffic"


def _accelerators(jobs: list[dict[str, Any]], accelerated: list[str]) -> Iterator[tuple[str, str, str]]:
    for job in jobs:
        if job["Name"] in accelerated and not _GPU.match(_instance(job)):
            what = f"it asks for an accelerator, and {_instance(job)} has none"
            yield job["Name"], what, "set accelerator.instance_type in the deploy profile"


def _cut_off(deploy: Deploy, jobs: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    if not (deploy.mlflow_tracking_uri or deploy.registry):
        return
    for job in jobs:
        arguments = job["Arguments"]
        if arguments.get("EnableNetworkIsolation") or arguments.get("NetworkConfig", {}).get("EnableNetworkIsolation"):
            what = "it is cut off from the network, and so from MLflow and the registry"
            yield job["Name"], what, "set network_isolation: false for tasks that need either"


def _instance(job: dict[str, Any]) -> str:
    arguments = job["Arguments"]
    cluster = arguments.get("ProcessingResources", {}).get("ClusterConfig") or arguments.get("ResourceConfig", {})
    return str(cluster.get("InstanceType", ""))


def _image(job: dict[str, Any]) -> str:
    arguments = job["Arguments"]
    return str(
        arguments.get("AppSpecification", {}).get("ImageUri")
        or arguments.get("AlgorithmSpecification", {}).get("TrainingImage", "")
    )
