"""The gate's decision of a finished run, as far as it can be read from outside the cluster.

Which branch ran is in the run's record. Whether a held model was refused or merely not yet decided, and why, stands in
the gate's artifact below the pipeline root; it is read where that is S3 and this machine may read it.
"""

import json
from typing import Any

from .client import Server
from .follow import details


def read(server: Server, run: Any, pipeline: str) -> tuple[str, str]:
    """Return the decision (`promote`, `hold`, `inconclusive`, or empty) and its reason, or why that is not known.

    Args:
        server: The server.
        run: A run that succeeded.
        pipeline: Name of the pipeline.
    """
    succeeded = {task.display_name for task in details(run) if task.state == "SUCCEEDED"}
    branch = "promote" if "deploy-model" in succeeded else "hold" if "hold-model" in succeeded else ""
    told = _artifact(server.profile.pipeline_root, f"{pipeline}/{run.run_id}/gate/")
    if not branch:
        return "", "neither branch of the gate ran"
    if told and (told["decision"] == "promote") == (branch == "promote"):
        return told["decision"], told["reason"]
    return branch, "" if branch == "promote" else "whether it was inconclusive stands in the gate's artifact `decision`"


def _artifact(root: str, prefix: str) -> dict[str, str] | None:
    """Return the decision record of a gate that ran in this run; a cached one lies with an earlier run."""
    if not root.startswith("s3://"):
        return None
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, folder = root.removeprefix("s3://").partition("/")
    try:
        s3 = boto3.client("s3")
        start = f"{folder.strip('/')}/{prefix}".lstrip("/")
        found = s3.list_objects_v2(Bucket=bucket, Prefix=start).get("Contents", [])
        key = next((entry["Key"] for entry in found if entry["Key"].endswith("/decision/decision.json")), None)
        if key is None:
            return None
        record = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    except (BotoCoreError, ClientError, ValueError):
        return None  # the branch is known all the same
    return {"decision": str(record.get("decision", "")), "reason": str(record.get("reason", ""))}
