"""Managed services in place of our own training code: the requests they take, and nothing that sends them.

* `serverless`  a Training step with `ServerlessJobConfig`: SFT, DPO, RLVR or RLAIF on a model of the SageMaker hub
* `hyperpod`    a `HyperPodPyTorchJob` manifest for a HyperPod cluster on EKS, elastic if asked
* `bedrock`     a `CreateModelCustomizationJob` request

These were checked against the service models that botocore carries (HyperPod has none: against the types here). They
were never executed by us.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel


class Service(BaseModel):
    """Base: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Serverless(Service):
    """SageMaker's serverless model customization."""

    by: Literal["serverless"]
    base_model: str
    """ARN of a model in a SageMaker hub."""
    technique: Literal["SFT", "DPO", "RLVR", "RLAIF"]
    accept_eula: bool = False
    peft: Literal["LORA", ""] = "LORA"
    """Empty trains all weights."""
    data: str
    """S3 URI of the training rows, in the technique's own format."""
    evaluator: str = ""
    """ARN of the reward function (RLVR) or the judge (RLAIF)."""
    sequence_length: str = Field("", pattern=r"^(\d+K)?$")
    model_package_group: str = ""
    """ARN of the group that the tuned model goes to."""
    mlflow_app: str = ""
    """ARN of the MLflow app that gets the metrics."""

    @model_validator(mode="after")
    def _rewarded(self) -> "Serverless":
        if self.technique in ("RLVR", "RLAIF") and not self.evaluator:
            raise ValueError(f"{self.technique} needs an evaluator: who says how good an answer is")
        return self

    def request(self, role: str, output: Any) -> dict[str, Any]:
        """Return the arguments of a Training step.

        Args:
            role: ARN of the execution role.
            output: S3 prefix, or an expression that gives it.
        """
        config = {
            "BaseModelArn": self.base_model,
            "JobType": "FineTuning",
            "AcceptEula": self.accept_eula,
            "CustomizationTechnique": self.technique,
            "Peft": self.peft,
            "EvaluatorArn": self.evaluator,
            "SequenceLength": self.sequence_length,
        }
        source = {"S3DataType": "S3Prefix", "S3Uri": self.data, "S3DataDistributionType": "FullyReplicated"}
        return {
            "RoleArn": role,
            "ServerlessJobConfig": {key: value for key, value in config.items() if value != ""},
            "InputDataConfig": [{"ChannelName": "train", "DataSource": {"S3DataSource": source}}],
            "OutputDataConfig": {"S3OutputPath": output},
            **(
                {"ModelPackageConfig": {"ModelPackageGroupArn": self.model_package_group}}
                if self.model_package_group
                else {}
            ),
            **({"MlflowConfig": {"MlflowResourceArn": self.mlflow_app}} if self.mlflow_app else {}),
        }


class Bedrock(Service):
    """Bedrock's model customization."""

    by: Literal["bedrock"]
    base_model: str
    """Model id or ARN."""
    custom_model_name: str
    technique: Literal["FINE_TUNING", "CONTINUED_PRE_TRAINING"] = "FINE_TUNING"
    data: str
    """S3 URI of the training rows (JSONL)."""
    validation: str = ""
    """S3 URI of the validation rows."""
    hyperparameters: dict[str, str] = {}
    kms_key: str = ""
    role: str
    """ARN of the role that Bedrock takes."""

    def request(self, job: str, output: str) -> dict[str, Any]:
        """Return a `CreateModelCustomizationJob` request.

        Args:
            job: Name of the job.
            output: S3 prefix of the metrics.
        """
        return {
            "jobName": job,
            "customModelName": self.custom_model_name,
            "roleArn": self.role,
            "baseModelIdentifier": self.base_model,
            "customizationType": self.technique,
            "trainingDataConfig": {"s3Uri": self.data},
            **({"validationDataConfig": {"validators": [{"s3Uri": self.validation}]}} if self.validation else {}),
            "outputDataConfig": {"s3Uri": output},
            **({"hyperParameters": dict(sorted(self.hyperparameters.items()))} if self.hyperparameters else {}),
            **({"customModelKmsKeyId": self.kms_key} if self.kms_key else {}),
        }


class Camel(Service):
    """A part of a Kubernetes manifest: keys in camel case."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class Elastic(Camel):
    """Between how many nodes a job may shrink and grow while it runs."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    replica_increment_step: int | None = Field(None, ge=1)
    replica_discrete_values: list[int] | None = None
    graceful_shutdown_timeout_in_seconds: int = Field(600, ge=0)
    """Given to the container, after SIGUSR1, to write a checkpoint."""
    scaling_timeout_in_seconds: int = Field(600, ge=0)
    faulty_scale_down_timeout_in_seconds: int = Field(900, ge=0)

    @model_validator(mode="after")
    def _steps(self) -> "Elastic":
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be above max_replicas")
        if self.replica_increment_step and self.replica_discrete_values:
            raise ValueError("replica_increment_step and replica_discrete_values exclude each other")
        return self


class HyperPod(Service):
    """A training on a HyperPod cluster (EKS)."""

    by: Literal["hyperpod"]
    namespace: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    nodes: int = Field(1, ge=1)
    gpus: int = Field(8, ge=1)
    """Per node."""
    efa: int = Field(0, ge=0)
    """EFA interfaces per node."""
    queue: str = ""
    """Kueue's local queue."""
    priority: str = ""
    """Kueue's priority class."""
    max_restarts: int = Field(3, ge=0)
    """Of the job as a whole, after node failures."""
    elastic: Elastic | None = None

    @model_validator(mode="after")
    def _in_range(self) -> "HyperPod":
        if self.elastic and not self.elastic.min_replicas <= self.nodes <= self.elastic.max_replicas:
            raise ValueError("nodes must lie between elastic.min_replicas and elastic.max_replicas")
        return self

    def manifest(self, name: str, image: str, instance_type: str, command: list[str]) -> dict[str, Any]:
        """Return a `HyperPodPyTorchJob`.

        Args:
            name: Of the job.
            image: Must hold `hyperpodrun` (package hyperpod-elastic-agent), which becomes process 1.
            instance_type: Of the nodes.
            command: What `hyperpodrun` starts on each, in place of torchrun's script.
        """
        labels = {"kueue.x-k8s.io/queue-name": self.queue, "kueue.x-k8s.io/priority-class": self.priority}
        policy = {"jobMaxRetryCount": self.max_restarts, "restartPolicy": {"maxFullJobRestarts": self.max_restarts}}
        elastic = self.elastic.model_dump(by_alias=True, exclude_none=True) if self.elastic else None
        replicas = {"name": "pods", "replicas": self.nodes, "template": self._template(image, instance_type, command)}
        if self.elastic:
            replicas["maxReplicas"] = self.elastic.max_replicas
        return {
            "apiVersion": "sagemaker.amazonaws.com/v1",
            "kind": "HyperPodPyTorchJob",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {key: value for key, value in labels.items() if value},
            },
            "spec": {
                "nprocPerNode": str(self.gpus),
                "replicaSpecs": [replicas],
                "runPolicy": policy,
                **({"elasticPolicy": elastic} if elastic else {}),
            },
        }

    def _template(self, image: str, instance_type: str, command: list[str]) -> dict[str, Any]:
        resources = {"nvidia.com/gpu": str(self.gpus), **({"vpc.amazonaws.com/efa": str(self.efa)} if self.efa else {})}
        container = {
            "name": "pytorch",
            "image": image,
            "command": ["hyperpodrun", f"--nproc_per_node={self.gpus}", *command],
            "env": [{"name": "HYPERPOD_SIGNAL_COORDINATION", "value": "distributed"}] if self.elastic else [],
            "resources": {"requests": resources, "limits": resources},
        }
        return {
            "spec": {
                "nodeSelector": {
                    "node.kubernetes.io/instance-type": instance_type,
                    "sagemaker.amazonaws.com/deep-health-check-status": "Passed",
                },
                "containers": [container],
            }
        }


Managed = Annotated[Serverless | Bedrock | HyperPod, Field(discriminator="by")]
