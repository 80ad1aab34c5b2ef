"""The service's step cache: which parts of a request decide whether an earlier result may stand in for a step."""

import re
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.errors import RunError

from . import record
from .record import StepRecord

KEYS = {
    "Processing": ("AppSpecification", "Environment", "ProcessingInputs"),
    "Training": (
        "AlgorithmSpecification",
        "CheckpointConfig",
        "DebugHookConfig",
        "DebugRuleConfigurations",
        "Environment",
        "HyperParameters",
        "InputDataConfig",
    ),
}
"""Kind of step → the parts that the developer guide ("Caching pipeline steps") names."""
_PERIOD = re.compile(r"P?(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?", re.I)
_SECONDS = (365 * 86400, 30 * 86400, 7 * 86400, 86400, 3600, 60, 1)


def step_key(kind: str, request: dict[str, Any]) -> str:
    """Return the digest of what the cache looks at; where outputs go is no part of it."""
    return digest_of({name: request[name] for name in KEYS[kind] if name in request})


def find(home: Path, pipeline: str, step: str, key: str, expires: str, now: float) -> StepRecord | None:
    """Return the newest success of a step with this key in the earlier executions of its pipeline.

    Args:
        home: Holds the executions.
        pipeline: The cache of a pipeline is its own.
        step: The step's name.
        key: Of `step_key`.
        expires: How old a result may be, as ISO 8601 writes a duration: `P30D`.
        now: Seconds since 1970.
    """
    oldest = now - seconds(expires)
    for execution in record.earlier(home, pipeline):
        found = execution.steps.get(step)
        if (
            found
            and found.state == "Succeeded"
            and found.cache_key == key
            and not found.cached
            and found.finished >= oldest
        ):
            return found
    return None


def seconds(duration: str) -> float:
    """Return an ISO 8601 duration in seconds; a month has 30 days.

    Raises:
        RunError: It is not one.
    """
    match = _PERIOD.fullmatch(duration)
    if not match or not any(match.groups()):
        raise RunError(f"{duration!r} is not a duration", where="CacheConfig.ExpireAfter", fix="write for example P30D")
    return float(sum(int(count or 0) * unit for count, unit in zip(match.groups(), _SECONDS, strict=True)))
