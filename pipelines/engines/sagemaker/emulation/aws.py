"""AWS for the emulator: moto's server in a thread, reached over HTTP like the real one."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RunError
from assay.components.runtime import s3


@contextmanager
def local_aws(region: str = "us-east-1") -> Iterator[dict[str, str]]:
    """Run a server on a free port of this machine; yield the environment that leads boto3 to it.

    Args:
        region: The region that clients are told.

    Raises:
        RunError: moto is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise RunError(
            "the emulator needs moto, which is not installed", fix="pip install 'moto[s3,sagemaker,server]'"
        ) from error
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "emulated",
            "AWS_SECRET_ACCESS_KEY": "emulated",
            "AWS_DEFAULT_REGION": region,
            "AWS_REGION": region,
        }
    finally:
        server.stop()


def s3_client(aws: Mapping[str, str]) -> Any:
    """Return boto3's S3 as an environment describes it."""
    import boto3

    return boto3.client(
        "s3",
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
    client, text = s3_client(aws), json.dumps(definition)
    region = aws["AWS_DEFAULT_REGION"]
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    for bucket in sorted(set(re.findall(r"s3://([a-z0-9.\-]+)", text))):
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket, **place)
    for uri in sorted(set(re.findall(r"s3://[^\"]*/tasks/[0-9a-f]{64}", text))):
        s3.upload(client, tasks / uri.rpartition("/")[2], uri)
