"""Folders in S3, as SageMaker copies them: a prefix names a folder, or exactly one object."""

from pathlib import Path
from typing import Any


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of an `s3://` URI, the key without a slash at its end."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key.rstrip("/")


def objects(client: Any, uri: str) -> dict[str, str]:
    """Return what a URI means: path inside the folder → key of the object.

    A URI that ends on `data` means `data/…`, or the one object `data`, and never `data2`.
    """
    bucket, prefix = split(uri)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    inside = f"{prefix}/" if prefix else ""
    folder = {key.removeprefix(inside): key for key in found if key.startswith(inside) and not key.endswith("/")}
    return folder or {prefix.rpartition("/")[2]: key for key in found if key == prefix}


def download(client: Any, uri: str, folder: Path) -> int:
    """Copy what a URI means into a folder (made if missing), and return the number of files.

    Raises:
        ValueError: An object's name leads out of the folder.
    """
    bucket, _ = split(uri)
    found = objects(client, uri)
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in found.items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"s3://{bucket}/{key} would be written outside {folder}")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(target))
    return len(found)


def upload(client: Any, folder: Path, uri: str) -> int:
    """Copy the files of a folder below a URI, and return their number; links are left out, as SageMaker does."""
    bucket, prefix = split(uri)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    for path in files:
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"))
    return len(files)
