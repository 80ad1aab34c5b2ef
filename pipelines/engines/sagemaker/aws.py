"""The way to AWS: clients of one region, and one sentence for whatever stands in the way.

Messages name what was asked and of whom, never a credential.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from assay.components.contracts.errors import AssayError, RunError

_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
_UNKNOWN = (
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthFailure",
)
_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "AllAccessDisabled")
_NO_BUCKET = ("NoSuchBucket", "404")
_LOGIN = "log in again (aws sso login, or a new session), or choose another profile with AWS_PROFILE"


class Refused(RunError):
    """AWS answered, and not as wished."""

    def __init__(self, what: str, *, where: str, fix: str, code: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.code = code
        """The service's name of the error."""

    @property
    def missing(self) -> bool:
        """Whether what was asked for is not there; SageMaker says so by several codes."""
        words = "not exist" in self.what or "not find" in self.what
        return self.code.startswith("ResourceNotFound") or (self.code == "ValidationException" and words)


@dataclass(frozen=True)
class Account:
    """boto3's clients of one region, with credentials as boto3 finds them."""

    region: str

    @cached_property
    def sagemaker(self) -> Any:
        """Pipelines, jobs, model packages."""
        return self._client("sagemaker")

    @cached_property
    def s3(self) -> Any:
        """Objects."""
        return self._client("s3")

    @cached_property
    def scheduler(self) -> Any:
        """EventBridge Scheduler."""
        return self._client("scheduler")

    def _client(self, name: str) -> Any:
        import boto3
        from botocore.config import Config

        with talking(f"make a client of {name}", self.region):
            patient = Config(retries={"mode": "standard", "max_attempts": 4}, connect_timeout=5, read_timeout=60)
            # a session of its own: the default one keeps the credentials of whoever asked first
            return boto3.session.Session().client(name, region_name=self.region or None, config=patient)


@contextmanager
def talking(what: str, where: str) -> Iterator[None]:
    """Turn what botocore raises into an error a user can act on.

    Args:
        what: What is being done, to complete "cannot …".
        where: Of which bucket, pipeline or role.

    Raises:
        RunError: One sentence of why, and what to do.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explain(error, what, where) from error


def explain(error: Exception, what: str, where: str) -> AssayError:
    """Return the error a user sees for one of botocore's."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return _refusal(error, what, where)
    if isinstance(error, boto.UnauthorizedSSOTokenError | boto.SSOTokenLoadError | boto.TokenRetrievalError):
        return RunError(f"cannot {what}: the AWS login has expired", where=where, fix=_LOGIN)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return RunError(
            f"cannot {what}: there are no AWS credentials",
            where=where,
            fix="log in (aws sso login, aws configure), or choose a profile with AWS_PROFILE",
        )
    if isinstance(error, boto.ProfileNotFound):
        return RunError(f"cannot {what}: {error}", where=where, fix="correct AWS_PROFILE")
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        return RunError(
            f"cannot {what}: no AWS region is set, or none of that name exists",
            where=where,
            fix="set `region` in the deploy profile",
        )
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        address = error.kwargs.get("endpoint_url", "AWS")
        return RunError(
            f"cannot {what}: {address} cannot be reached",
            where=where,
            fix="check the network, the proxy, the region and AWS_ENDPOINT_URL",
        )
    return RunError(f"cannot {what}: {error}", where=where, fix="correct the request")


def _refusal(error: Any, what: str, where: str) -> Refused:
    code, text = str(error.response["Error"].get("Code", "")), str(error.response["Error"].get("Message", ""))[:400]
    said, fix = f"{code}: {text}", "look the error up in the service's documentation"
    if code in _EXPIRED:
        said, fix = "the AWS login has expired", _LOGIN
    elif code in _UNKNOWN:
        said, fix = "AWS does not know these credentials", _LOGIN
    elif code in _DENIED and where.startswith("s3://"):
        said = f"access to the bucket is denied ({text or code})"
        fix = "allow s3:GetObject, s3:PutObject and s3:ListBucket on this prefix, and its KMS key if it has one"
    elif code in _DENIED:
        role = "iam:PassRole" in text
        said = f"access is denied ({text or code})"
        fix = "allow iam:PassRole on the role of the profile" if role else f"allow {error.operation_name} to this user"
    elif code in _NO_BUCKET and where.startswith("s3://"):
        said, fix = "there is no such bucket or object", "make the bucket, or correct `root` in the deploy profile"
    elif "role" in text.lower() and code == "ValidationException":
        fix = "correct `roles` in the deploy profile: the role must exist and trust sagemaker.amazonaws.com"
    elif code in ("ThrottlingException", "ResourceLimitExceeded", "ServiceUnavailable"):
        fix = "try again later; ask for a higher quota if it stays so"
    return Refused(f"cannot {what}: {said}", where=where, fix=fix, code=code)
