"""AWS for the emulator: moto's server in a thread, reached over HTTP like the real one."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RunError
from assay.components.runtime import s3


@contextmanager
def local_aws(
    region: str = "us-east-1", before: Callable[[Any, Mapping[str, str]], Any] | None = None
) -> Iterator[dict[str, str]]:
    """Run a server on a free port of this machine; yield the environment that leads boto3 to it.

    Args:
        region: The region that clients are told.
        before: Wraps moto's WSGI application; it is given that, and the environment.

    Raises:
        RunError: moto is not installed.
    """
    try:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server
    except ImportError as error:
        raise RunError(
            "the emulator needs moto, which is not installed", fix="pip install 'moto[s3,sagemaker,server]'"
        ) from error
    environment = {
        "AWS_ACCESS_KEY_ID": "emulated",
        "AWS_SECRET_ACCESS_KEY": "emulated",
        "AWS_DEFAULT_REGION": region,
        "AWS_REGION": region,
    }
    backend = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, before(backend, environment) if before else backend, threaded=True)
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield environment
    finally:
        server.shutdown()
        thread.join()


def client(service: str, aws: Mapping[str, str]) -> Any:
    """Return a client of boto3 as an environment describes it."""
    import boto3

    return boto3.client(
        service,
        endpoint_url=aws.get("AWS_ENDPOINT_URL"),
        region_name=aws["AWS_DEFAULT_REGION"],
        aws_access_key_id=aws["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=aws["AWS_SECRET_ACCESS_KEY"],
    )


def provide(definition: Mapping[str, Any], tasks: Path, aws: Mapping[str, str]) -> None:
    """Make the buckets that a definition names, and upload the task templates that it reads.

    Args:
        definition: The JSON object.
        tasks: Folder of `<sha256>/task.json`, as compiling writes it.
        aws: Environment that leads boto3 to S3.
    """
    storage, text = client("s3", aws), json.dumps(definition)
    region = aws["AWS_DEFAULT_REGION"]
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    for bucket in sorted(set(re.findall(r"s3://([a-z0-9.\-]+)", text))):
        with suppress(storage.exceptions.BucketAlreadyOwnedByYou):
            storage.create_bucket(Bucket=bucket, **place)
    for uri in sorted(set(re.findall(r"s3://[^\"]*/tasks/[0-9a-f]{64}", text))):
        s3.upload(storage, tasks / uri.rpartition("/")[2], uri)
