"""What a job's step must keep to beyond the shape of its request."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DURATION = re.compile(r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?")
_RETRIED = {
    "Step.SERVICE_FAULT",
    "Step.THROTTLING",
    "SageMaker.JOB_INTERNAL_ERROR",
    "SageMaker.CAPACITY_ERROR",
    "SageMaker.RESOURCE_LIMIT",
}
_EXECUTION = re.compile(r'"Get": "Execution\.')
_KEYED = (
    "AppSpecification",
    "Environment",
    "ProcessingInputs",
    "AlgorithmSpecification",
    "CheckpointConfig",
    "HyperParameters",
    "InputDataConfig",
)
"""What the service's cache is keyed by."""


def problems(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield everything that is wrong with a step beyond the shape of its request."""
    arguments = step.get("Arguments", {})
    yield from _doubles(arguments)
    yield from _spot(arguments)
    yield from _cache(step)
    yield from _files(step)
    yield from _retries(step)


def _doubles(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield names that stand twice in a list that the service keys by name."""
    outputs = arguments.get("ProcessingOutputConfig", {}).get("Outputs", [])
    lists = (
        ("InputName", arguments.get("ProcessingInputs", [])),
        ("OutputName", outputs),
        ("ChannelName", arguments.get("InputDataConfig", [])),
    )
    for key, entries in lists:
        names = [entry.get(key) for entry in entries]
        yield from (f"{key} {name!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1}))


def _spot(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield what does not go together with spot instances."""
    limits = arguments.get("StoppingCondition", {})
    if arguments.get("EnableManagedSpotTraining"):
        if limits.get("MaxWaitTimeInSeconds", 0) < limits.get("MaxRuntimeInSeconds", 0):
            yield "on spot instances MaxWaitTimeInSeconds is at least MaxRuntimeInSeconds"
        if "KeepAlivePeriodInSeconds" in arguments.get("ResourceConfig", {}):
            yield "spot instances are not kept alive"
    elif "MaxWaitTimeInSeconds" in limits:
        yield "MaxWaitTimeInSeconds is for spot instances"


def _cache(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a step's cache, or keeps it from ever hitting."""
    config = step.get("CacheConfig")
    if config is None:
        return
    if set(config) - {"Enabled", "ExpireAfter"} or not isinstance(config.get("Enabled"), bool):
        yield "CacheConfig is Enabled and ExpireAfter"
    if not _DURATION.fullmatch(str(config.get("ExpireAfter", ""))):
        yield f"ExpireAfter {config.get('ExpireAfter')!r} is no duration such as P30D"
    arguments = step.get("Arguments", {})
    for member in _KEYED:
        if config.get("Enabled") and _EXECUTION.search(json.dumps(arguments.get(member, ""))):
            yield f"{member} is in the cache key and holds an execution variable: it would never hit"


def _files(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a step's property files."""
    outputs = step.get("Arguments", {}).get("ProcessingOutputConfig", {}).get("Outputs", [])
    names = {entry.get("OutputName") for entry in outputs}
    for entry in step.get("PropertyFiles", []):
        if set(entry) != {"PropertyFileName", "OutputName", "FilePath"}:
            yield "a property file has PropertyFileName, OutputName and FilePath"
        elif entry["OutputName"] not in names:
            yield f"the property file {entry['PropertyFileName']!r} lies in {entry['OutputName']!r}, which is no output"


def _retries(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a step's retry policies."""
    for policy in step.get("RetryPolicies", []):
        kinds = set(policy.get("ExceptionType", ()))
        if not kinds or kinds - _RETRIED:
            known = ", ".join(sorted(_RETRIED))
            yield f"a retry policy is for some of {known}; got {', '.join(sorted(kinds)) or 'none'}"
        limits = [key for key in ("MaxAttempts", "ExpireAfterMin") if key in policy]
        if len(limits) != 1:
            yield "a retry policy has either MaxAttempts or ExpireAfterMin"
        if not 1 <= policy.get("MaxAttempts", 1) <= 20 or not 1 <= policy.get("ExpireAfterMin", 1) <= 14400:
            yield "a retry policy has 1 to 20 attempts, or 1 to 14400 minutes"
