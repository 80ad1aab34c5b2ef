"""Training on several nodes: the step's container becomes a launcher that creates a TrainJob of Kubeflow Trainer v2.

Here is what is known when the pipeline is compiled: the manifest (trainer.kubeflow.org/v1alpha1) and the rewritten
container. `launcher.py` runs it, `worker.py` is what each of its processes runs under torchrun.
"""

import json
from typing import Any

from assay.components.contracts.errors import RecipeError

from .profile import Profile, Settings

LAUNCHER = "assay.pipelines.engines.kubeflow.launcher"
WORKER = "assay.pipelines.engines.kubeflow.worker"
SHARDING: dict[str, dict[str, str]] = {
    "none": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "deepspeed": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}
"""What `accelerate launch` would set for the processes; torchrun is started by the job itself."""
_POD_FIELDS = {
    "POD_NAME": "metadata.name",
    "POD_UID": "metadata.uid",
    "POD_NAMESPACE": "metadata.namespace",
    "RUN_ID": "metadata.labels['pipeline/runid']",
}


def wrap(container: dict[str, Any], platform: dict[str, Any], settings: Settings, profile: Profile) -> None:
    """Turn a step's container into the launcher of a TrainJob; the accelerators move from the step to the job.

    Args:
        container: Of the IR; changed in place.
        platform: The step's platform settings; changed in place.
        settings: What the step gets, with `nodes`.
        profile: Whose volume the launcher and the job share.

    Raises:
        RecipeError: The profile has no volume.
    """
    if profile.volume is None:
        raise RecipeError(
            "training on several nodes needs a volume that all of them mount",
            where="deploy profile: volume",
            fix="name a ReadWriteMany claim",
        )
    manifest = train_job(container, platform, settings, profile)
    container["command"] = ["python", "-m", LAUNCHER]
    container["args"] = ["--train_job", json.dumps(manifest, sort_keys=True), *container["args"]]
    container["resources"] = {"resourceCpuRequest": "500m", "resourceMemoryLimit": "2G"}
    for gone in ("nodeSelector", "tolerations", "emptyDirMounts", "secretAsEnv"):
        platform.pop(gone, None)
    platform["fieldPathAsEnv"] = [{"name": name, "fieldPath": path} for name, path in _POD_FIELDS.items()]


def train_job(
    container: dict[str, Any], platform: dict[str, Any], settings: Settings, profile: Profile
) -> dict[str, Any]:
    """Return the manifest; the launcher adds the name, the owner and the arguments.

    The pods get what the step would have got: image, variables, secrets, node labels, tolerations, shared memory.
    """
    nodes = settings.nodes
    assert nodes is not None
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": nodes.runtime},
        "trainer": {
            "image": container["image"],
            "command": ["torchrun", "-m", WORKER],
            "numNodes": nodes.count,
            "numProcPerNode": _gpus(container) or 1,
            "resourcesPerNode": _resources(container["resources"]),
            "env": [*container.get("env", []), *_variables(SHARDING[nodes.sharding]), *_secrets(settings)],
        },
        "runtimePatches": [{"manager": "assay.launcher/profile", "trainingRuntimeSpec": _patch(settings, profile)}],
    }
    if seconds := platform.get("activeDeadlineSeconds"):
        spec["activeDeadlineSeconds"] = int(seconds)
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {}, "spec": spec}


def _patch(settings: Settings, profile: Profile) -> dict[str, Any]:
    """Return what is changed of the runtime's pods."""
    assert profile.volume is not None
    volumes: list[dict[str, Any]] = [
        {"name": "assay", "persistentVolumeClaim": {"claimName": profile.volume.claim}},
    ]
    mounts = [{"name": "assay", "mountPath": profile.volume.path}]
    if settings.shared_memory:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}})
        mounts.append({"name": "dshm", "mountPath": "/dev/shm"})
    pod: dict[str, Any] = {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = [entry.manifest() for entry in settings.tolerations]
    if profile.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    if profile.service_account:
        pod["serviceAccountName"] = profile.service_account
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}


def _resources(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what one node gets: what the step asked for."""
    names = {"cpu": "resourceCpuRequest", "memory": "resourceMemoryLimit"}
    wanted = {name: asked[key] for name, key in names.items() if key in asked}
    if accelerator := asked.get("accelerator"):
        wanted[accelerator["resourceType"]] = accelerator["resourceCount"]
    return {"requests": wanted, "limits": wanted}


def _gpus(container: dict[str, Any]) -> int:
    return int(container["resources"].get("accelerator", {}).get("resourceCount", 0))


def _variables(environment: dict[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in environment.items()]


def _secrets(settings: Settings) -> list[dict[str, Any]]:
    return [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
        for name, keys in sorted(settings.secrets.items())
        for key, variable in sorted(keys.items())
    ]
