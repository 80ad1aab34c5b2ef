"""A corpus: documents from a user's files, which of them are held out, and the blocks that are trained on."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..contracts.errors import DataError
from ..shared.strict_json import read_object

EXTENSIONS = (".jsonl", ".parquet", ".txt")
COLUMN = "text"


def read_documents(root: str | Path) -> tuple[list[str], int]:
    """Return the documents of a file or of a folder of files, each text once, and how many repeats were passed over.

    Hidden files and names that begin with `_` are left out, as every reader of data folders does.

    Raises:
        DataError: Nothing is there, a file is empty or of another format, or a document is no text.
    """
    root = Path(root)
    every = [text for path in _files(root) for text in _read(path)]
    if not every:
        raise DataError("there is no document", where=str(root), fix="give text")
    once = list(dict.fromkeys(every))
    return once, len(every) - len(once)


def _files(root: Path) -> list[Path]:
    if not root.exists():
        raise DataError("there is no such file or folder", where=str(root), fix="correct the path of the text")
    found = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    paths = [path for path in found if path == root or not path.name.startswith((".", "_"))]
    if not paths:
        raise DataError("the folder holds no file", where=str(root), fix=f"add one of {list(EXTENSIONS)}")
    for path in paths:
        if path.suffix.lower() not in EXTENSIONS:
            raise DataError("the format is not known", where=str(path), fix=f"give one of {list(EXTENSIONS)}")
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="write it again, or remove it")
    return paths


def _read(path: Path) -> Iterator[str]:
    """Yield the documents of one file, in its order."""
    match path.suffix.lower():
        case ".parquet":
            documents = _from_parquet(path)
        case ".jsonl":
            documents = _from_lines(path)
        case _:
            documents = _from_text(path)
    for where, text in documents:
        if not isinstance(text, str):
            raise DataError(f"the document is {type(text).__name__}, not text", where=where, fix="give a string")
        if not text.strip():
            raise DataError("the document is empty", where=where, fix="remove it")
        if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the document holds NUL or half a character", where=where, fix="clean it")
        yield text


def _from_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        if COLUMN not in file.schema_arrow.names:
            raise DataError(
                f"there is no column {COLUMN!r}, but {file.schema_arrow.names}", where=str(path), fix="rename it"
            )
        row = 0
        for batch in file.iter_batches(columns=[COLUMN]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"{path}: row {row}", value
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=str(path), fix="write it again") from error


def _from_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row, where = read_object(line), f"{path}:{number}"
        if row is None:
            raise DataError("the line is not one JSON object", where=where, fix='write {"text": "…"}')
        if COLUMN not in row:
            raise DataError(f"there is no {COLUMN!r}, but {sorted(row)}", where=where, fix="rename the key")
        yield where, row[COLUMN]


def _from_text(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what stands between blank lines."""
    lines: list[str] = []
    for number, line in enumerate([*_text(path).splitlines(), ""], start=1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield f"{path}:{number - len(lines)}", "\n".join(lines)
            lines = []


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start:,} is not UTF-8", where=str(path), fix="convert the file") from error


def split(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Return the documents to train on, in their order, and those held out, in the order of their hashes."""
    keys = {text: hashlib.sha256(f"holdout {text}".encode()).digest() for text in documents}
    apart = sorted((text for text in documents if _part(keys[text]) < share), key=keys.__getitem__)
    return [text for text in documents if _part(keys[text]) >= share], apart


def _part(digest: bytes) -> float:
    return int.from_bytes(digest[:8]) / 2**64


def sequences(documents: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each document between two end tokens, so that its first token too is foretold."""
    end = tokenizer.eos_token_id
    return [[end, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in documents]


def blocks(documents: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the documents' tokens one after the other, one end token between two, cut into blocks.

    A block may hold parts of several documents, and its tokens see all that stand before them in it. The last one is
    shorter, and left out if it is a single token: that would have nothing to foretell.

    Args:
        documents: Of `sequences`.
        size: Tokens of a block.
    """
    stream = [token for place, ids in enumerate(documents) for token in (ids[1:] if place else ids)]
    cut = [stream[start : start + size] for start in range(0, len(stream), size)]
    return [block for block in cut if len(block) > 1]
