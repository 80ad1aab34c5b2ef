"""The deploy profile of a Kubeflow installation: where it is, how to log in, and what each step gets of the cluster.

It holds references only: a token is named by its file, a cookie by the variable that holds it, a secret by its name in
the cluster. Settings of a step come from `default`, then from its kind (`light`, `train`, `generate`), then from every
pattern of `tasks` that its name matches, in the order of the file; mappings are merged, all else is replaced.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Kind, merge

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
"""A variable of such a name holds what may not stand in a definition."""
_QUANTITY = r"^\d+(\.\d+)?([EPTGMk]i?)?$"
_DNS = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_ROLES = Literal["data", "train", "serve"]


def _read_null(value: Any) -> Any:
    return {} if value is None else value  # a key with all its entries commented out


class Section(BaseModel):
    """A part of the profile: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Auth(Section):
    """How to log in: at most one way; none is for a port-forward or a single-user server."""

    token_file: Path | None = None
    """File with a bearer token, read anew at each request. In a pod this is the projected token of its service account,
    `/var/run/secrets/kubeflow/pipelines/token`."""
    cookie_env: str = Field("", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$|^$")
    """Name of the environment variable that holds the session cookie (`authservice_session=…`)."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.token_file and self.cookie_env:
            raise ValueError("give a token_file or a cookie_env, not both")
        return self


class Toleration(Section):
    """A taint that a step's pod tolerates."""

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.value and self.operator == "Exists":
            raise ValueError("a value needs operator: Equal")
        return self

    def manifest(self) -> dict[str, str]:
        """Return it as Kubernetes writes it."""
        return {name: value for name, value in self.model_dump().items() if value}


class Nodes(Section):
    """Training on several nodes: the step creates a TrainJob of Kubeflow Trainer and follows it."""

    count: int = Field(ge=2)
    """Pods."""
    runtime: str = "torch-distributed"
    """Name of the ClusterTrainingRuntime."""
    sharding: Literal["none", "fsdp", "deepspeed"] = "fsdp"
    """What accelerate does with the weights: replicate them (DDP), or shard them."""


class Settings(Section):
    """What a step gets of the cluster beyond the recipe's resources."""

    gpus: int | None = Field(None, ge=0)
    """Replaces the recipe's number of accelerators."""
    gpu_resource: str = "nvidia.com/gpu"
    """The resource that a GPU is on this cluster, for example `nvidia.com/mig-3g.40gb`."""
    node_selector: dict[str, str] = {}
    """Labels a node must have, for example `nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB`."""
    tolerations: list[Toleration] = []
    shared_memory: str = Field("", pattern=_QUANTITY + "|^$")
    """Size of /dev/shm, for example `16Gi`; several training processes need more than the default 64 MiB."""
    secrets: dict[str, dict[str, str]] = {}
    """Secret's name → its key → the environment variable that gets the value."""
    env: dict[str, str] = {}
    """Variables that are no secrets."""
    retries: int | None = Field(None, ge=0, le=10)
    """Replaces the recipe's."""
    timeout_minutes: float | None = Field(None, gt=0)
    """Replaces the recipe's."""
    nodes: Nodes | None = None

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} looks like a secret; name it under `secrets`, and its value stays there")
        return env


class Volume(Section):
    """The volume that steps share: caches, checkpoints, the promotion ledger. It must be ReadWriteMany."""

    claim: str = Field(pattern=_DNS)
    """Name of the PersistentVolumeClaim."""
    path: str = Field("/assay", pattern=r"^/[A-Za-z0-9/._-]+$")


class Profile(Section):
    """One Kubeflow Pipelines server and how Assay runs there."""

    host: str = Field("", pattern=r"^https?://\S+$|^$")
    """Address of the API; inside the cluster `http://ml-pipeline.kubeflow.svc.cluster.local:8888`."""
    ui: str = Field("", pattern=r"^https?://\S+$|^$")
    """Address for people, where it is another."""
    namespace: str = Field("", pattern=_DNS + "|^$")
    """Of the user; empty on a server without users."""
    experiment: str = "assay"
    auth: Auth = Auth()
    ca_file: Path | None = None
    """Certificate authority of the host, where it is not a public one."""
    pipeline_root: str = ""
    """Where artifacts go (`s3://bucket/prefix`); empty is the namespace's default."""
    service_account: str = ""
    """Kubernetes service account of the run's pods."""
    image_pull_secrets: list[str] = []
    images: dict[_ROLES, str] = {}
    """Image by role, with its digest."""
    volume: Volume | None = None
    poll_seconds: float = Field(10, gt=0, le=300)
    """How often a waiting `assay run` asks."""
    default: Settings = Settings()
    kinds: Annotated[dict[Kind, Settings], BeforeValidator(_read_null)] = {}
    tasks: Annotated[dict[str, Settings], BeforeValidator(_read_null)] = {}
    """Settings by pattern of the task's name, for example `train-*`."""

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read a profile, or list everything that is wrong with it at once; without a file all is default.

        Raises:
            RecipeError: The file is not a deploy profile for Kubeflow.
        """
        if path is None:
            return cls()
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
        if not isinstance(raw, dict):
            raise RecipeError("this is not a deploy profile: wanted a YAML mapping", where=str(path))
        try:
            return cls.model_validate(raw)
        except ValidationError as error:  # without the values: somebody may have put a secret where a reference belongs
            problems = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
            raise RecipeError(
                "this is not a deploy profile for Kubeflow:\n    " + "\n    ".join(problems),
                where=str(path),
                fix="correct these keys; infra/README.md has a complete example",
            ) from error

    def settings(self, task: str, kind: str) -> Settings:
        """Return what a task gets.

        Args:
            task: Its name in the graph, for example `train-sft`.
            kind: Its kind; empty when it has none.
        """
        matching = [settings for pattern, settings in self.tasks.items() if fnmatchcase(task, pattern)]
        layers = [self.default, *[self.kinds[name] for name in self.kinds if name == kind], *matching]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer.model_dump(exclude_unset=True))
        return Settings.model_validate(merged)
