"""AWS for the emulator: moto's server in a thread, reached over HTTP like the real one."""

from collections.abc import Iterator
from contextlib import contextmanager

from assay.components.contracts.errors import RunError


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
