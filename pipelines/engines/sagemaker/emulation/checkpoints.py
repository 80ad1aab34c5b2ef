"""/opt/ml/checkpoints and its S3 prefix: restored at the start, then copied while the job runs, deletions too."""

import contextlib
from pathlib import Path
from typing import Any

from assay.components.runtime import s3


class Checkpoints:
    """The checkpoints of one Training job.

    Args:
        client: boto3's S3.
        uri: `CheckpointConfig.S3Uri`.
        folder: `CheckpointConfig.LocalPath` on this machine.
    """

    def __init__(self, client: Any, uri: str, folder: Path) -> None:
        self.client, self.uri, self.folder = client, uri, folder
        self.known: dict[str, tuple[int, int]] = {}

    def restore(self) -> None:
        """Bring back what an earlier attempt left."""
        s3.download(self.client, self.uri, self.folder)
        self.known = self._present()

    def sync(self) -> None:
        """Copy what changed since the last time, and delete in S3 what is gone."""
        bucket, prefix = s3.split(self.uri)
        present = self._present()
        for name in sorted(present.keys() - {key for key, stamp in self.known.items() if present.get(key) == stamp}):
            with contextlib.suppress(FileNotFoundError):  # written under another name first, and renamed meanwhile
                self.client.upload_file(str(self.folder / name), bucket, f"{prefix}/{name}")
        for name in sorted(self.known.keys() - present.keys()):
            self.client.delete_object(Bucket=bucket, Key=f"{prefix}/{name}")
        self.known = present

    def _present(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found[path.relative_to(self.folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found
