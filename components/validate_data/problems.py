"""What can be wrong with a row: a code, what to do about it, and the record that keeps the refused line."""

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

FIXES = {
    "E_LINE": "split the row, or raise data.max_line_bytes",
    "E_UTF8": "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`",
    "E_JSON": "write one complete JSON object on each line",
    "E_CSV": "quote the field, double the quotes inside it, and give every row as many fields as the header",
    "E_DUPKEY": "keep one of the two; readers disagree on which one counts",
    "E_NAN": "leave the key out, or write a finite number",
    "E_DEPTH": "flatten the row",
    "E_CHARACTER": "remove the character",
    "E_KEY": "rename or remove the key; the README of validate_data lists the forms of a row",
    "E_TYPE": "write the value in the type that is named",
    "E_ROLE_ORDER": "an optional system turn, then user and assistant in turn",
    "E_EMPTY": "fill in the text, or remove the row",
    "E_LONG": "shorten the text, or raise data.max_characters",
    "E_TOKEN": "remove it: a tokenizer would read this text as a control token",
    "E_SAME": "remove the pair: there is nothing to prefer",
    "E_ANSWER": "correct the answer: the task's verifier does not accept it as right",
    "E_SPLIT": "give all rows of the group one split label",
}
"""Every code, and what a person does about it."""


class RefusedError(Exception):
    """A row breaks its contract; the reader turns it into a `Problem`.

    Args:
        code: A key of `FIXES`.
        message: What is wrong. It reaches logs, docs and reports, so it never quotes a text of the row.
        column: JSON path of the value, or the column or character of the line.
        kind: The kind of row, where it was recognised.
    """

    def __init__(self, code: str, message: str, column: str = "$", kind: str = "") -> None:
        self.code, self.message, self.column, self.kind = code, message, column, kind
        super().__init__(f"{code} {column}: {message}")


def key_name(key: str) -> str:
    """Return a key as a message may show it: one that is no plain name could be a person's number."""
    return key if re.fullmatch(r"[A-Za-z_]\w{0,39}", key, re.ASCII) else "…"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file (one record of a CSV or Parquet file), and where it is."""

    file: str
    """Relative to the folder the user gave."""
    number: int
    """From 1; of a Parquet file the row."""
    offset: int
    """First byte in the (expanded) file; -1 where the format has none."""
    raw: bytes
    """The bytes without the line feed; the first ones of a line above the cap."""
    size: int
    """Bytes of the whole line."""
    sha256: str
    """Of the whole line, without the line feed."""

    @property
    def place(self) -> str:
        """`file:line`, as an editor opens it."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A refused line: why, where, and what to do."""

    line: Line
    code: str
    message: str
    column: str
    kind: str = ""

    def record(self) -> dict[str, Any]:
        """Return the quarantine's JSON: enough to find the line, correct it and prove that it is the same one."""
        return {
            "file": self.line.file,
            "line": self.line.number,
            "byte_offset": self.line.offset,
            "column": self.column,
            "code": self.code,
            "message": self.message,
            "fix": FIXES[self.code],
            "sha256": self.line.sha256,
            "bytes": self.line.size,
            "raw_base64": base64.b64encode(self.line.raw).decode(),
        }


@dataclass
class Quarantine:
    """Writes the records while the rows stream past, and counts them; use it in a `with`."""

    path: Path
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, Problem] = field(default_factory=dict)
    """The first problem of each code."""

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, problem: Problem) -> None:
        """Write one record."""
        self.reasons[problem.code] += 1
        self.first.setdefault(problem.code, problem)
        self.file.write(json.dumps(problem.record(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
