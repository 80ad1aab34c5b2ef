"""The door: the only place where a user's data is parsed. Everything behind it reads Parquet of our own.

Every line becomes a row or a problem; none is dropped, and none stops the program. What makes a file as a whole
unreadable (missing, empty, damaged, a decompression bomb, another format) is a `DataError`.
"""

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from ..contracts.errors import DataError
from ..contracts.recipe import DataSettings
from ..shared.tasks.task import Task
from .convert import Converter, Row
from .problems import Line, Problem, RefusedError, key_name
from .sources import SourceFile, find_files, open_bytes, read_lines

BOM = b"\xef\xbb\xbf"
MAX_DEPTH = 32
"""Levels of nesting in one row; the deepest form needs 3, `metadata` may need more."""
FORBIDDEN = re.compile("[\x00\ud800-\udfff]")
"""NUL ends a string in C, and a lone surrogate cannot be written as UTF-8."""
PARQUET_BATCH = 256
"""Rows of a Parquet file decoded at once."""
PARQUET_GROUP_BYTES = 2**30
"""Largest row group of a Parquet file, expanded."""
NESTED = ("messages", "conversations", "slices", "metadata")
"""Columns of a CSV file that hold JSON."""


@dataclass
class Reader:
    """Reads one input.

    Args:
        task: Turns plain prompts into conversations and verifies answers.
        settings: The caps.
    """

    task: Task
    settings: DataSettings
    notes: Counter[str] = field(default_factory=Counter)
    """What was passed over without harm: `byte_order_marks`, `blank_lines`."""

    def __post_init__(self) -> None:
        self.converter = Converter(self.task, self.settings.max_characters)

    def read(self, root: Path) -> Iterator[tuple[Line, Row] | Problem]:
        """Yield every row and every problem, in the order of the files and of their lines.

        Args:
            root: A file, a folder of files, or a `raw` artifact.

        Raises:
            DataError: The input as a whole cannot be read.
        """
        for file in find_files(root):
            match file.extension:
                case ".parquet":
                    yield from self._read_parquet(file)
                case ".csv":
                    yield from self._read_csv(file)
                case _:
                    yield from self._read_json_lines(file)

    def _read_json_lines(self, file: SourceFile) -> Iterator[tuple[Line, Row] | Problem]:
        with open_bytes(file) as stream:
            for line in read_lines(stream, file.name, self.settings.max_line_bytes):
                text = self._without_mark(line)
                if text.strip(b" \t\r") or line.size > self.settings.max_line_bytes:
                    yield self._accept(line, partial(self._decode, line, text))
                else:
                    self.notes["blank_lines"] += 1

    def _read_csv(self, file: SourceFile) -> Iterator[tuple[Line, Row] | Problem]:
        limit = csv.field_size_limit(self.settings.max_line_bytes)
        try:
            with open_bytes(file) as stream:
                yield from self._csv_rows(file, stream)
        finally:
            csv.field_size_limit(limit)

    def _csv_rows(self, file: SourceFile, stream: BinaryIO) -> Iterator[tuple[Line, Row] | Problem]:
        lines = CsvLines(self, read_lines(stream, file.name, self.settings.max_line_bytes))
        records = csv.reader(lines, strict=True)
        header = _header(records, file)
        while True:
            lines.taken.clear()
            try:
                fields: list[str] | RefusedError = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                fields = RefusedError("E_CSV", str(error))
            except RefusedError as error:
                fields = error
            if fields:
                yield self._accept(lines.record(), partial(_csv_record, header, fields))
            else:
                self.notes["blank_lines"] += 1

    def _read_parquet(self, file: SourceFile) -> Iterator[tuple[Line, Row] | Problem]:
        number = 0
        try:
            with pq.ParquetFile(file.path) as parquet:
                _check_groups(parquet, file)
                for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
                    for record in batch.to_pylist():
                        number += 1
                        raw = json.dumps(record, ensure_ascii=True, default=repr, sort_keys=True).encode()
                        line = Line(file.name, number, -1, raw, len(raw), hashlib.sha256(raw).hexdigest())
                        yield self._accept(line, partial(_without_nulls, record))
                if number != parquet.metadata.num_rows:
                    raise ValueError(f"the footer promises {parquet.metadata.num_rows} rows")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"cannot be read as Parquet after row {number}: {error}",
                where=str(file.path),
                fix="write the file again",
            ) from error

    def _accept(self, line: Line, parse: Callable[[], Any]) -> tuple[Line, Row] | Problem:
        """Parse, check and convert one line; whatever is wrong with it becomes a problem."""
        try:
            record = parse()
            check(record)
            return line, self.converter.convert(record)
        except RefusedError as error:
            return Problem(line, error.code, error.message, error.column, error.kind)

    def _without_mark(self, line: Line) -> bytes:
        if line.offset or not line.raw.startswith(BOM):
            return line.raw
        self.notes["byte_order_marks"] += 1
        return line.raw.removeprefix(BOM)

    def _decode(self, line: Line, raw: bytes) -> Any:
        return decode(self._text(line, raw))

    def _text(self, line: Line, raw: bytes) -> str:
        """Return a line's text.

        Raises:
            RefusedError: The line is longer than the cap, or is not UTF-8.
        """
        if line.size > self.settings.max_line_bytes:
            message = f"{line.size:,} bytes, the limit is {self.settings.max_line_bytes:,}"
            raise RefusedError("E_LINE", message)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            message = f"byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})"
            raise RefusedError("E_UTF8", message, f"byte {error.start + 1}") from None


class CsvLines:
    """The lines of a CSV file as the csv module wants them; it may take several for one record."""

    def __init__(self, reader: Reader, lines: Iterator[Line]) -> None:
        self.reader, self.lines = reader, lines
        self.taken: list[Line] = []
        """The lines of the current record."""

    def __iter__(self) -> "CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.taken.append(line)
        return self.reader._text(line, self.reader._without_mark(line)) + "\n"

    def record(self) -> Line:
        """Return the current record as one line, at the place of its first one."""
        first = self.taken[0]
        if len(self.taken) == 1:
            return first
        raw = b"\n".join(line.raw for line in self.taken)
        return Line(first.file, first.number, first.offset, raw, len(raw), hashlib.sha256(raw).hexdigest())


def decode(text: str) -> Any:
    """Decode strict JSON: no duplicate keys, no NaN or infinity.

    Raises:
        RefusedError: The text is not that; the column is the character, from 1.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise RefusedError("E_JSON", error.msg, f"character {error.pos + 1}") from None
    except RecursionError:
        raise RefusedError("E_DEPTH", f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # a number of thousands of digits
        raise RefusedError("E_JSON", str(error)) from None


def check(value: Any, path: tuple[str | int, ...] = ()) -> None:
    """Check every value of a decoded record, whatever its form.

    Raises:
        RefusedError: Nested too deeply, not finite, a forbidden character, or a type that JSON does not have.
    """
    if len(path) > MAX_DEPTH:
        raise RefusedError("E_DEPTH", f"nested deeper than {MAX_DEPTH} levels")
    match value:
        case str():
            if found := FORBIDDEN.search(value):
                message = f"U+{ord(found.group()):04X} at character {found.start() + 1} is not text"
                raise RefusedError("E_CHARACTER", message, _json_path(path))
        case dict():
            for key, inner in value.items():
                check(key, path)
                check(inner, (*path, key))
        case list():
            for index, inner in enumerate(value):
                check(inner, (*path, index))
        case float():
            if not math.isfinite(value):
                raise RefusedError("E_NAN", "the number is not finite", _json_path(path))
        case None | bool() | int():
            pass
        case _:
            raise RefusedError("E_TYPE", f"JSON has no {type(value).__name__}", _json_path(path))


def _json_path(path: tuple[str | int, ...]) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{key_name(part)}" for part in path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RefusedError("E_DUPKEY", f"the key {key_name(key)} stands twice in one object", f"$..{key_name(key)}")
    return record


def _constant(name: str) -> NoReturn:
    raise RefusedError("E_NAN", f"{name} is not a number of JSON")


def _header(records: Iterator[list[str]], file: SourceFile) -> list[str]:
    try:
        header = [name.strip() for name in next(records, [])]
    except (csv.Error, RefusedError) as error:
        raise DataError(f"the header cannot be read: {error}", where=f"{file.path}:1") from None
    if not any(header) or len(set(header)) < len(header):
        raise DataError("the header is empty or names a column twice", where=f"{file.path}:1", fix="correct the header")
    return header


def _csv_record(header: list[str], fields: list[str] | RefusedError) -> dict[str, Any]:
    """Return the fields by column; an empty field is an absent key, and a nested one is JSON."""
    if isinstance(fields, RefusedError):
        raise fields
    if len(fields) != len(header):
        raise RefusedError("E_CSV", f"{len(fields)} fields, the header has {len(header)}")
    return {
        name: decode(text) if name in NESTED else text for name, text in zip(header, fields, strict=True) if text != ""
    }


def _check_groups(parquet: pq.ParquetFile, file: SourceFile) -> None:
    if parquet.metadata.num_rows == 0:
        raise DataError("the file has no rows", where=str(file.path), fix="write it again, or remove it")
    for index in range(parquet.metadata.num_row_groups):
        size = parquet.metadata.row_group(index).total_byte_size
        if size > PARQUET_GROUP_BYTES:
            raise DataError(
                f"row group {index} expands to {size:,} bytes, the limit is {PARQUET_GROUP_BYTES:,}",
                where=str(file.path),
                fix="write the file with smaller row groups",
            )


def _without_nulls(value: Any) -> Any:
    """Drop null fields at every level: a Parquet column has a value in every row, a record need not."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
