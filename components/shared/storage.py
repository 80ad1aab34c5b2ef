"""Objects by key, in a folder or below an S3 prefix: what the registry and the triggers keep for many machines.

There are no locks. What must happen once is an object that only one caller can create: a hard link in a folder,
`If-None-Match: *` on S3. Both are atomic: a reader sees the whole object or none.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..contracts.artifacts import write_atomically
from ..contracts.errors import RegistryError

PART = ".part-"
FIXES = {
    "NoSuchBucket": "make the bucket first (infra/aws/assay.yaml does), or correct the name",
    "AccessDenied": "the role needs s3:GetObject, s3:PutObject, s3:ListBucket here, and the bucket's KMS key",
    "ExpiredToken": "sign in again: the credentials have expired",
    "InvalidAccessKeyId": "sign in again: the credentials are not known",
    "NoCredentialsError": "give credentials as boto3 finds them: a role, AWS_PROFILE, or `aws sso login`",
    "EndpointConnectionError": "check the region and the network: no answer came from S3",
}
"""What to do next, by S3's error code or botocore's exception."""


class Storage(Protocol):
    """Where objects lie. Keys are relative, with `/` between their parts."""

    @property
    def address(self) -> str:
        """The folder or the `s3://bucket/prefix`."""

    def read(self, key: str) -> bytes | None:
        """Return an object, or None when there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that does not exist yet; return whether it now holds `data`, durably.

        Of several callers with different data exactly one gets True. A caller whose answer was lost on the way may ask
        again, so data that says who wins must be unlike any other caller's.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object, over an older one if there is one."""

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below `prefix/`, sorted."""


def read_hashed(storage: Storage, key: str, digest: str, what: str) -> bytes:
    """Return an object of which the sha256 is on record.

    Args:
        storage: Where it lies.
        key: Its key.
        digest: The sha256.
        what: What it is, for the message.

    Raises:
        RegistryError: It is missing, or not the one that was recorded.
    """
    data = storage.read(key)
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        state = "is missing" if data is None else "was altered"
        raise RegistryError(f"{what} {state}", where=f"{storage.address}/{key}", fix="restore it from a backup")
    return data


class FolderStorage:
    """A folder; on a network file system it must have hard links (NFS and EFS do)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.folder)

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes."""
        try:
            return (self.folder / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, key: str, data: bytes) -> bool:
        """Give a finished file its name, unless the name is taken."""
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=PART) as part:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).chmod(0o644)
            try:
                os.link(part.name, target)
            except FileExistsError:
                return target.read_bytes() == data
        _sync(target.parent)
        return True

    def write(self, key: str, data: bytes) -> None:
        """Replace a file as a whole."""
        write_atomically(self.folder / key, data)

    def keys(self, prefix: str) -> list[str]:
        """Return the files below a subfolder."""
        found = (path for path in (self.folder / prefix).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found if not path.name.startswith("."))


class S3Storage:
    """A prefix of a bucket; credentials, region and endpoint as boto3 finds them."""

    def __init__(self, address: str) -> None:
        self.bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        if not self.bucket:
            raise RegistryError("this is no S3 address", where=address, fix="write s3://BUCKET/PREFIX")

    @property
    def address(self) -> str:
        """Bucket and prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @cached_property
    def client(self) -> Any:
        """Boto3's client; made at the first call, never shared with a forked process."""
        import boto3

        with self._calling(""):
            return boto3.client("s3")

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes."""
        from botocore.exceptions import ClientError

        with self._calling(key):
            try:
                body: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    return None
                raise
        return body

    def create(self, key: str, data: bytes) -> bool:
        """Put with `If-None-Match: *`; 409 says that another put is under way, so ask again."""
        from botocore.exceptions import ClientError

        for _ in range(10):
            with self._calling(key):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if _code(error) == "PreconditionFailed":
                        return self.read(key) == data  # ours, when the answer to an earlier try was lost
                    if _code(error) != "ConditionalRequestConflict":
                        raise
        raise RegistryError("S3 reports one conflict after another", where=self._place(key), fix="try again later")

    def write(self, key: str, data: bytes) -> None:
        """Put an object."""
        with self._calling(key):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def keys(self, prefix: str) -> list[str]:
        """List the objects below a prefix."""
        return sorted(entry["Key"] for entry in self.objects(f"{prefix}/"))

    def objects(self, start: str = "") -> list[dict[str, Any]]:
        """List what S3 says of every object whose key begins so; each `Key` is relative, as elsewhere."""
        with self._calling(start):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + start
            )
            found = [entry for page in pages for entry in page.get("Contents", [])]
        return [{**entry, "Key": entry["Key"].removeprefix(self.prefix)} for entry in found]

    def upload(self, path: Path, key: str) -> None:
        """Put a file of any size."""
        with self._calling(key):
            self.client.upload_file(str(path), self.bucket, self.prefix + key)

    def stream(self, key: str, sink: Callable[[bytes], object]) -> None:
        """Give an object of any size to `sink`, a piece at a time.

        Raises:
            RegistryError: There is no such object.
        """
        with self._calling(key):
            body = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"]
            for piece in body.iter_chunks(1 << 20):
                sink(piece)

    def _place(self, key: str) -> str:
        return f"{self.address}/{key}".rstrip("/")

    @contextmanager
    def _calling(self, key: str) -> Iterator[None]:
        """Turn what S3 refuses into an error a user can act on."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            code = _code(error) if isinstance(error, ClientError) else type(error).__name__
            fix = FIXES.get(code, "check bucket, prefix, region and credentials")
            raise RegistryError(f"S3 refuses: {error}", where=self._place(key), fix=fix) from error


def open_storage(address: str) -> FolderStorage | S3Storage:
    """Return the storage at a folder's path or an `s3://bucket/prefix`."""
    return S3Storage(address) if address.startswith("s3://") else FolderStorage(Path(address))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # a name is on the disk only when its folder is
    finally:
        os.close(handle)
