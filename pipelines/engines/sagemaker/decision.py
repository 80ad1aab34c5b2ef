"""The gate's decision of an execution: what its job left in S3, this time or, from the cache, an earlier time."""

import json
from typing import Any

from assay.components.runtime import s3

from .aws import Account, talking
from .follow import Ended

GATE = "gate"
"""Name of the step that decides."""


def read(account: Account, ended: Ended) -> tuple[str, str]:
    """Return the decision (`promote`, `hold`, `inconclusive`; empty when the gate did not run) and its reason."""
    step = ended.step(GATE)
    if step is None:
        return "", ended.reason or "the gate did not run"
    outputs = _outputs(account, step)
    promoted = bool(_json(account, f"{outputs['params']}/params.json")["Output"])
    record = _json(account, f"{outputs['decision']}/decision.json")
    decided, reason = str(record["decision"]), str(record["reason"])
    if (decided == "promote") != promoted:
        return "", "the gate's record and what it returned differ: look at its step"
    return decided, reason


def _outputs(account: Account, step: dict[str, Any]) -> dict[str, str]:
    """Return the S3 URI of every output of a Processing step."""
    arn = str(step["Metadata"]["ProcessingJob"]["Arn"])
    with talking("describe the gate's job", arn):
        job = account.sagemaker.describe_processing_job(ProcessingJobName=arn.rpartition("/")[2])
    outputs = job["ProcessingOutputConfig"]["Outputs"]
    return {entry["OutputName"]: str(entry["S3Output"]["S3Uri"]).rstrip("/") for entry in outputs}


def _json(account: Account, uri: str) -> dict[str, Any]:
    bucket, key = s3.split(uri)
    with talking("read the gate's decision", uri):
        return dict(json.loads(account.s3.get_object(Bucket=bucket, Key=key)["Body"].read()))
