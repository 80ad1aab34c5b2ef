"""The deploy profile: what an account, and not the recipe, decides. One YAML file, keyed by task.

Settings of a job are laid over each other: `processing` or `training`, then `accelerator` for a task that asks for one,
then every entry of `tasks` whose pattern fits, in the order of the file. `infra/aws/deploy.example.yaml` shows all.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import merge

from .managed import Managed

Kind = Literal["processing", "training"]
Verdict = Literal["refuse", "warn", "ignore"]
TRAINS = "train-*"
"""Tasks of this name are Training jobs unless the profile says otherwise."""
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY(_ID)?)(_|$)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"(AKIA|ASIA)[A-Z0-9]{16}|://[^/\s:@]+:[^/\s@]+@")
S3 = r"^s3://[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9](/[^\s]*)?$"


class Part(BaseModel):
    """A part of the profile: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Job(Part):
    """What a job runs on. Left out means: as the layer below says."""

    kind: Kind | None = None
    """Of the job; left out, `train-*` and tasks that ask for an accelerator are Training jobs."""
    role: str = ""
    """ARN of the execution role; empty for that of the kind."""
    image: str = ""
    """Image URI, by digest; empty for that of the step's role."""
    instance_type: str = "ml.m5.xlarge"
    instance_count: int = Field(1, ge=1, le=100)
    """More than one is multi-node training through torchrun; Training only."""
    volume_gb: int = Field(30, ge=1, le=16384)
    max_runtime_minutes: float = Field(0, ge=0)
    """0 takes the recipe's time limit of the step."""
    spot: bool = False
    """Managed spot instances; Training only. Needs checkpoints, and checkpoints switch the step's cache off."""
    max_wait_minutes: float = Field(0, ge=0)
    """Longest time from start to end on spot instances, waiting included; 0 takes twice the time limit."""
    checkpoints: bool = False
    """Keep the step's work folder in S3, so that a retried job goes on; Training only."""
    keep_alive_minutes: float = Field(0, ge=0, le=360)
    """How long the instances of a Training job wait for the next one (warm pool); not with spot."""
    network_isolation: bool | None = None
    """No network inside the container: no MLflow, no registry. Left out: as `network.isolation`."""
    environment: dict[str, str] = {}
    managed: Managed | None = None
    """A managed service in place of our own training code."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.spot and self.keep_alive_minutes:
            raise ValueError("a warm pool (keep_alive_minutes) and spot exclude each other")
        if self.kind == "processing" and (self.spot or self.checkpoints or self.keep_alive_minutes):
            raise ValueError("spot, checkpoints and keep_alive_minutes are for Training jobs")
        if self.kind == "processing" and self.instance_count > 1:
            raise ValueError("more than one instance is for Training jobs")
        return self

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        return no_secret(value)

    @property
    def keeps_work(self) -> bool:
        """Return whether the step's work folder is kept in S3 while it runs."""
        return self.checkpoints or self.spot


class Roles(Part):
    """Execution roles (ARN): one per duty, so that the step that trains cannot register."""

    pipeline: str
    """Starts the jobs; named at CreatePipeline."""
    processing: str
    training: str


class Images(Part):
    """Image URI by the role of a step's container; by digest, so that what ran is known."""

    data: str = ""
    train: str = ""
    serve: str = ""


class Network(Part):
    """Where the jobs' network interfaces are."""

    subnets: list[str] = Field([], max_length=16)
    security_groups: list[str] = Field([], max_length=5)
    isolation: bool = False
    """Cut the containers off; a task may say otherwise."""
    encrypt_traffic: bool = False
    """Between the nodes of one job; costs training time."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups go together")
        return self


class Keys(Part):
    """KMS keys: id or ARN; empty for AWS's own."""

    volume: str = ""
    """Of the jobs' disks. Left out of jobs whose instance type has a disk of its own, which takes none."""
    output: str = ""
    """Of what the jobs write to S3."""


class Features(Part):
    """What the service has had since 2026 only; public schemas and other tools do not know it yet."""

    for_each: bool = False
    """Loops over lists that only the run knows become ForEach steps."""
    run_conditions: bool = False
    """Exit handlers become steps that run whatever became of those before them."""


class Policy(Part):
    """What the policy lint refuses, warns about or ignores."""

    kms: Verdict = "warn"
    vpc: Verdict = "warn"
    wildcard_role: Verdict = "refuse"
    shared_role: Verdict = "warn"
    unpinned_image: Verdict = "refuse"
    public_traffic: Verdict = "warn"
    """Multi-node jobs whose traffic between nodes is not encrypted."""


class Deploy(Part):
    """One account and region, and how this pipeline runs there."""

    region: str = Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")
    root: str = Field(pattern=S3)
    """S3 prefix under which everything lies: `tasks/`, `runs/`, `checkpoints/`."""
    roles: Roles
    images: Images = Images()
    processing: Job = Job(kind="processing")
    training: Job = Job(kind="training")
    accelerator: Job = Job()
    """Laid over either for tasks that ask for an accelerator."""
    tasks: dict[str, Job] = {}
    """By a pattern over the task's name or its path in the graph: `train-rl`, `select-model*`, `*/deploy-model`."""
    network: Network = Network()
    keys: Keys = Keys()
    tags: dict[str, str] = Field({}, max_length=50)
    environment: dict[str, str] = {}
    """Of every container."""
    registry: str = ""
    """Folder or s3:// prefix of the promotion ledger (`ASSAY_REGISTRY`)."""
    mlflow_tracking_uri: str = ""
    """A server's URL, or the ARN of a SageMaker MLflow app."""
    mlflow_experiment: str = ""
    """Empty for the recipe's name."""
    cache_days: int = Field(30, ge=0, le=365)
    """How long a step's result may be used again; 0 never."""
    features: Features = Features()
    policy: Policy = Policy()

    @field_validator("root")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        return value.rstrip("/")

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        return no_secret(value)

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _no_password(cls, value: str) -> str:
        no_secret({"": value})
        return value

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a profile, or list everything that is wrong with it at once.

        Raises:
            RecipeError: The file is not a deploy profile.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot be read: {error}", where=str(path), fix="check the path and the YAML") from error
        if not isinstance(raw, dict):
            raise RecipeError("this is not a deploy profile: wanted a YAML mapping", where=str(path))
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            # The input is not repeated: what was wrongly put there may be a secret.
            problems = [
                f"{'.'.join(map(str, entry['loc']))}: {entry['msg'].removeprefix('Value error, ')}"
                for entry in error.errors()
            ]
            raise RecipeError(
                "this is not a deploy profile:\n    " + "\n    ".join(problems),
                where=str(path),
                fix="correct these keys; infra/aws/deploy.example.yaml shows a complete one",
            ) from error

    def job(self, path: str, *, accelerated: bool, scalars: bool) -> Job:
        """Return how a task runs.

        Args:
            path: In the graph, for example `condition-branches-1/condition-2/deploy-model`.
            accelerated: Whether it asks for an accelerator.
            scalars: Whether it has output parameters, which only a Processing job can hand on.

        Raises:
            RecipeError: Its settings do not go together.
        """
        name = path.rpartition("/")[2]
        layers = [self.accelerator] if accelerated else []
        layers += [self.tasks[pattern] for pattern in self.patterns(path)]
        kind = next((layer.kind for layer in reversed(layers) if layer.kind), None)
        if kind is None:
            kind = "training" if not scalars and (accelerated or fnmatchcase(name, TRAINS)) else "processing"
        merged: dict[str, Any] = {}
        for layer in (getattr(self, kind), *layers):
            merged = merge(merged, layer.model_dump(exclude_unset=True))
        try:
            return Job.model_validate({**merged, "kind": kind})
        except ValidationError as error:
            raise RecipeError(
                "; ".join(entry["msg"].removeprefix("Value error, ") for entry in error.errors()),
                where=f"deploy profile: {path}",
                fix="correct the settings of this task, or of the layers below it",
            ) from error

    def patterns(self, path: str) -> Iterator[str]:
        """Yield the patterns of `tasks` that fit a task, in the order of the file."""
        plain = re.sub(r"\[\d+\]", "", path)
        name = plain.rpartition("/")[2]
        return (pattern for pattern in self.tasks if fnmatchcase(name, pattern) or fnmatchcase(plain, pattern))


def no_secret(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment that holds no secret: whoever may describe a pipeline could read it.

    Raises:
        ValueError: A name or a value looks like one.
    """
    for name, value in environment.items():
        if (_SECRET.search(name) and value) or _SECRET_VALUE.search(value):
            raise ValueError(
                f"{name or 'the value'} looks like a secret, and a definition can be read by whoever may describe it;"
                " keep it in Secrets Manager and let the role read it there"
            )
    return environment
