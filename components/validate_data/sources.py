"""Files that a user hands in: which they are, and their lines within fixed bounds of memory.

Nothing outside the given folder is opened, nothing is unpacked without a limit, and no line is held whole that is
longer than the cap.
"""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..contracts.artifacts import MANIFEST, read_manifest
from ..contracts.errors import DataError
from .problems import Line

EXTENSIONS = (".jsonl.gz", ".jsonl", ".parquet", ".csv")
EXPANSION_RATIO = 200
"""A gzip file may expand to this many times its size; text of real rows stays below 30."""
EXPANSION_FLOOR = 64 * 2**20
"""Bytes that every gzip file may expand to: a small file of equal rows is no attack."""
PREFIX_BYTES = 64 * 2**10
"""What is kept of a line above the cap."""


@dataclass(frozen=True)
class SourceFile:
    """One file of rows."""

    path: Path
    name: str
    """Relative to the folder the user gave; stands in every message and in `Example.source`."""
    extension: str


def find_files(root: Path) -> list[SourceFile]:
    """Return the files of rows at `root`: a file, a folder of files, or a `raw` artifact, in the order of their names.

    Hidden files and names that begin with `_` (`_SUCCESS`) are left out, as every reader of data folders does.

    Raises:
        DataError: Nothing is there, a file is empty, is of another format, or lies outside the folder.
    """
    if not root.exists():
        raise DataError("there is no such file or folder", where=str(root), fix="correct the path of the data")
    if not root.is_dir():
        return [_source(root.resolve(), root.name)]
    if (root / MANIFEST).is_file():
        read_manifest(root, "raw")
    files = [_source(path, path.relative_to(root).as_posix()) for path in _walk(root)]
    if not files:
        raise DataError("the folder holds no file of rows", where=str(root), fix=f"add one of {list(EXTENSIONS)}")
    return files


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names) + [name for name in folders if Path(folder, name).is_symlink()]:
            path = Path(folder, name)
            if name.startswith((".", "_")) or path == root / MANIFEST:
                continue
            if not path.resolve().is_relative_to(root.resolve()) or path.is_dir():
                raise DataError(
                    "the link leads out of the data folder or to a folder, and is not followed",
                    where=str(path),
                    fix="put the file itself into the folder",
                )
            found.append(path)
    return sorted(found)


def _source(path: Path, name: str) -> SourceFile:
    extension = next((end for end in EXTENSIONS if name.lower().endswith(end)), "")
    if not extension:
        raise DataError("the format is not known", where=str(path), fix=f"give one of {list(EXTENSIONS)}")
    if not path.is_file():
        raise DataError("this is not a regular file", where=str(path), fix="give a file of rows")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path), fix="write it again, or remove it")
    return SourceFile(path, name.encode("utf-8", "backslashreplace").decode(), extension)


class Expanding(io.RawIOBase):
    """The contents of a gzip file, refused once they are out of proportion to the file.

    Args:
        file: A gzip file.
    """

    def __init__(self, file: SourceFile) -> None:
        self.name = str(file.path)
        self.limit = max(EXPANSION_FLOOR, EXPANSION_RATIO * file.path.stat().st_size)
        self.done = 0
        self.stream = gzip.GzipFile(file.path, "rb")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Expand the next bytes into `buffer`.

        Raises:
            DataError: The file is damaged, or expands too far.
        """
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"the gzip file is damaged: {error}", where=self.name, fix="write or copy the file again"
            ) from error
        self.done += len(data)
        if self.done > self.limit:
            raise DataError(
                f"the gzip file expands to more than {self.limit:,} bytes, as a decompression bomb does",
                where=self.name,
                fix="give the rows uncompressed",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        super().close()


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a text file of rows as a stream of bytes, expanded if need be."""
    if file.extension.endswith(".gz"):
        with io.BufferedReader(Expanding(file), 2**18) as stream:
            yield cast(BinaryIO, stream)
    else:
        with file.path.open("rb") as plain:
            yield plain


def read_lines(stream: BinaryIO, name: str, cap: int) -> Iterator[Line]:
    """Yield the lines of a stream; of a line above `cap` bytes only the beginning and the digest are kept.

    Args:
        stream: Binary, at its beginning.
        name: The file's name in messages.
        cap: Bytes, without the line feed.
    """
    offset = 0
    for number, head in enumerate(iter(lambda: stream.readline(cap + 1), b""), start=1):
        raw, digest, length = head.removesuffix(b"\n"), hashlib.sha256(head.removesuffix(b"\n")), len(head)
        size = len(raw)
        if size > cap:
            raw, ended = raw[:PREFIX_BYTES], False
            while not ended and (rest := stream.readline(PREFIX_BYTES)):
                ended = rest.endswith(b"\n")
                digest.update(rest.removesuffix(b"\n"))
                size += len(rest) - ended
                length += len(rest)
        yield Line(name, number, offset, raw, size, digest.hexdigest())
        offset += length
