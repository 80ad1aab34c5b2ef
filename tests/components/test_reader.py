"""The door: whatever comes in becomes a row or a record that says what is wrong and where."""

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assay.components.contracts.artifacts import seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import DataSettings
from assay.components.shared.tasks.task import get_task
from assay.components.validate_data import sources
from assay.components.validate_data.convert import Row
from assay.components.validate_data.problems import FIXES, Line, Problem
from assay.components.validate_data.reader import Reader

TURNS = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]
GOOD = json.dumps({"messages": TURNS}).encode()


def read(path: Path, **limits: Any) -> list[tuple[Line, Row] | Problem]:
    return list(Reader(get_task("exact_match"), DataSettings(**limits)).read(path))


def read_text(folder: Path, content: bytes, name: str = "rows.jsonl", **limits: Any) -> Any:
    path = folder / name
    path.write_bytes(content)
    return read(path, **limits)


def chat(*turns: tuple[str, str], **extra: Any) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **extra}).encode()


def row_of(folder: Path, record: dict[str, Any]) -> Row:
    (item,) = read_text(folder, json.dumps(record).encode())
    assert not isinstance(item, Problem), item
    return item[1]


def test_every_form_becomes_a_conversation_and_a_reference(tmp_path: Path) -> None:
    user, assistant = TURNS
    forms: list[dict[str, Any]] = [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": user["content"]}, {"from": "gpt", "value": "Paris"}]},
        {"instruction": "Capital of France?", "input": "", "output": "Paris"},
        {"prompt": "Capital of France?", "answer": "Paris"},
        {"prompt": [user], "answer": "Paris"},
        {"prompt": "Capital of France?", "completion": "Paris"},
        {"prompt": [user], "completion": [assistant]},
        {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome"},
        {"prompt": [user], "chosen": [assistant], "rejected": [{"role": "assistant", "content": "Rome"}]},
    ]
    kinds = []
    for form in forms:
        row = row_of(tmp_path, form)
        kinds.append(row.kind)
        assert [(turn.role, turn.content) for turn in row.prompt] == [("user", "Capital of France?")], form
        assert row.reference == "Paris"
    assert kinds == ["chat"] * 3 + ["verifiable"] * 4 + ["preference"] * 2


def test_a_plain_prompt_becomes_the_conversation_of_the_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    task = get_task("medication_directions")
    raw = next(task.generate(1, 0))["messages"]
    path.write_text(json.dumps({"prompt": raw[1]["content"], "answer": raw[2]["content"]}))
    (item,) = Reader(task, DataSettings()).read(path)
    assert not isinstance(item, Problem)
    assert item[1].prompt == task.prompt(raw[1]["content"])


def test_system_turns_and_alpaca_inputs_are_kept(tmp_path: Path) -> None:
    row = row_of(tmp_path, {"system": "Be brief.", "instruction": "Add", "input": "1 2", "output": "3"})
    assert [turn.content for turn in row.prompt] == ["Be brief.", "Add\n\n1 2"]
    share = {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert [turn.role for turn in row_of(tmp_path, share).prompt] == ["system", "user"]


def test_annotations_are_taken_and_an_unknown_key_is_refused(tmp_path: Path) -> None:
    notes = {"id": 7, "group": "patient-1", "slices": {"age": "old"}, "source": "s", "metadata": {"a": [1]}}
    row = row_of(tmp_path, {"messages": TURNS, "split": "test", **notes, "chosen": None})
    assert (row.group, row.slices, row.split) == ("patient-1", ["age=old", "split=test"], "test")
    (problem,) = read_text(tmp_path, json.dumps({"messages": TURNS, "weight": 1}).encode())
    assert (problem.code, problem.message) == ("E_KEY", "the key weight is not one of this form")


REFUSED = {
    "truncated": (GOOD[:-9], "E_JSON", "character 99"),
    "two objects": (GOOD + GOOD, "E_JSON", "character 109"),
    "latin-1": (b'{"prompt": "caf\xe9", "answer": "x"}', "E_UTF8", "byte 16"),
    "UTF-16": ('{"prompt": "a", "answer": "x"}'.encode("utf-16"), "E_UTF8", "byte 1"),
    "duplicate key": (b'{"prompt": "q", "answer": "a", "answer": "b"}', "E_DUPKEY", "$..answer"),
    "duplicate key deep": (b'{"messages": [{"role": "user", "role": "system"}]}', "E_DUPKEY", "$..role"),
    "NaN": (b'{"prompt": "q", "answer": "a", "metadata": NaN}', "E_NAN", "$"),
    "minus infinity": (b'{"prompt": "q", "answer": "a", "metadata": -Infinity}', "E_NAN", "$"),
    "1e999": (b'{"prompt": "q", "answer": "a", "metadata": {"x": [1e999]}}', "E_NAN", "$.metadata.x[0]"),
    "5000 digits": (b'{"prompt": "q", "answer": "a", "id": ' + b"1" * 5000 + b"}", "E_JSON", "$"),
    "lone surrogate": (b'{"prompt": "\\ud800", "answer": "a"}', "E_CHARACTER", "$.prompt"),
    "lone surrogate in a key": (b'{"prompt": "q", "answer": "a", "\\udfff": 1}', "E_CHARACTER", "$"),
    "NUL": (b'{"prompt": "a\\u0000b", "answer": "a"}', "E_CHARACTER", "$.prompt"),
    "deep": (b'{"prompt": "q", "answer": "a", "metadata": ' + b"[" * 40 + b"]" * 40 + b"}", "E_DEPTH", "$"),
    "100,000 deep": (b"[" * 100_000, "E_DEPTH", "$"),
    "array": (b"[1, 2]", "E_TYPE", "$"),
    "string": (b'"text"', "E_TYPE", "$"),
    "null": (b"null", "E_TYPE", "$"),
    "number as answer": (b'{"prompt": "q", "answer": 5}', "E_TYPE", "$.answer"),
    "number as text": (b'{"messages": [{"role": "user", "content": 5}]}', "E_TYPE", "$.messages[0].content"),
    "unknown role": (chat(("tool", "x")), "E_TYPE", "$.messages[0].role"),
    "unknown speaker": (b'{"conversations": [{"from": "tool", "value": "x"}]}', "E_TYPE", "$.conversations[0].from"),
    "unknown form": (b'{"text": "x"}', "E_KEY", "$"),
    "missing key": (b'{"prompt": "x"}', "E_KEY", "$"),
    "extra key in a turn": (b'{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "E_KEY", "$.messages[0]"),
    "two forms in one": (b'{"messages": [], "prompt": "x", "answer": "y"}', "E_KEY", "$"),
    "bad slice": (b'{"prompt": "q", "answer": "a", "slices": ["hard"]}', "E_TYPE", "$.slices[0]"),
    "no turns": (chat(), "E_EMPTY", "$.messages"),
    "no answer": (chat(("user", "x")), "E_ROLE_ORDER", "$.messages[0]"),
    "user twice": (chat(("user", "x"), ("user", "y"), ("assistant", "z")), "E_ROLE_ORDER", "$.messages[1]"),
    "answer only": (chat(("assistant", "x")), "E_ROLE_ORDER", "$.messages[0]"),
    "late system": (chat(("user", "x"), ("system", "y"), ("assistant", "z")), "E_ROLE_ORDER", "$.messages[1]"),
    "prompt that answers": (json.dumps({"prompt": TURNS, "answer": "x"}).encode(), "E_ROLE_ORDER", "$.prompt[1]"),
    "chosen with the prompt": (
        json.dumps({"prompt": "q", "chosen": TURNS, "rejected": "x"}).encode(), "E_ROLE_ORDER", "$.chosen",
    ),
    "empty turn": (chat(("user", " \n"), ("assistant", "x")), "E_EMPTY", "$.messages[0].content"),
    "empty answer": (b'{"prompt": "q", "answer": ""}', "E_EMPTY", "$.answer"),
    "long answer": (json.dumps({"prompt": "q", "answer": "a" * 20_001}).encode(), "E_LONG", "$.answer"),
    "ChatML token": (chat(("user", "a <|im_start|>system"), ("assistant", "x")), "E_TOKEN", "$.messages[0].content"),
    "end of text": (b'{"prompt": "q", "answer": "<|endoftext|>"}', "E_TOKEN", "$.answer"),
    "Llama 2 token": (b'{"prompt": "[INST] q [/INST]", "answer": "a"}', "E_TOKEN", "$.prompt"),
    "chosen is rejected": (b'{"prompt": "q", "chosen": "a b", "rejected": " a  b"}', "E_SAME", "$.rejected"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "code", "column"), REFUSED.values(), ids=REFUSED)
def test_a_bad_line_is_refused_with_its_place_and_reason(
    tmp_path: Path, content: bytes, code: str, column: str
) -> None:
    first, problem, last = read_text(tmp_path, GOOD + b"\n" + content.replace(b"\n", b" ") + b"\n" + GOOD)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.column) == (code, column), problem.message
    assert (problem.line.place, problem.line.offset) == ("rows.jsonl:2", len(GOOD) + 1)
    assert problem.line.raw == content.replace(b"\n", b" ")
    assert code in FIXES
    assert not isinstance(first, Problem)
    assert not isinstance(last, Problem)


def test_a_reference_that_the_verifier_refuses_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Take 1 tab po qd", "answer": "one tablet, 123-45-6789"}')
    (problem,) = Reader(get_task("medication_directions"), DataSettings()).read(path)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.column) == ("E_ANSWER", "$.answer")
    assert "123-45" not in problem.message


def test_a_byte_order_mark_and_blank_lines_are_passed_over_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\n  \n" + GOOD + b"\n\n")
    reader = Reader(get_task("exact_match"), DataSettings())
    assert not any(isinstance(item, Problem) for item in reader.read(path))
    assert reader.notes == {"byte_order_marks": 1, "blank_lines": 3}


def test_a_line_of_200_megabytes_is_refused_within_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n")
        file.seek(200 * 2**20, os.SEEK_CUR)  # a hole: NUL bytes that take no disk
        file.write(b"\n" + GOOD + b"\n")
    tracemalloc.start()
    first, problem, last = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(problem, Problem)
    assert (problem.code, problem.line.size) == ("E_LINE", 200 * 2**20)
    assert len(problem.line.raw) == sources.PREFIX_BYTES
    assert not isinstance(first, Problem)
    assert not isinstance(last, Problem)
    assert last[0].number == 3
    assert peak < 16 * 2**20


def test_the_cap_counts_the_bytes_before_the_line_feed(tmp_path: Path) -> None:
    at_cap = json.dumps({"prompt": "q", "answer": "a" * (1024 - 29)}).encode()
    assert len(at_cap) == 1024
    kept, refused = read_text(tmp_path, at_cap + b"\n" + at_cap + b" \n", max_line_bytes=1024)
    assert not isinstance(kept, Problem)
    assert refused.code == "E_LINE"


def test_the_digest_of_a_refused_line_is_that_of_its_bytes(tmp_path: Path) -> None:
    import hashlib

    long = b"x" * 300_000
    (problem,) = read_text(tmp_path, long + b"\n", max_line_bytes=1024)
    assert problem.line.sha256 == hashlib.sha256(long).hexdigest()


def unlike(path: Path, content: bytes = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def linked_outside(folder: Path) -> Path:
    unlike(folder / "data" / "rows.jsonl")
    (folder / "data" / "more.jsonl").symlink_to(unlike(folder / "secret.jsonl"))
    return folder / "data"


def linked_folder(folder: Path) -> Path:
    unlike(folder / "data" / "rows.jsonl")
    unlike(folder / "elsewhere" / "rows.jsonl")
    (folder / "data" / "more").symlink_to(folder / "elsewhere")
    return folder / "data"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def torn_gzip(folder: Path) -> Path:
    return unlike(folder / "rows.jsonl.gz", gzip.compress(os.urandom(5000))[:-2000])


def bomb(folder: Path) -> Path:
    return unlike(folder / "rows.jsonl.gz", gzip.compress((b" " * 2**16 + b"\n") * 1100))


def other_artifact(folder: Path) -> Path:
    unlike(folder / "rows.jsonl")
    seal(folder, "rows")
    return folder


def torn_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"prompt": ["q"], "answer": ["a"]}), folder / "whole.parquet")
    return unlike(folder / "data" / "rows.parquet", (folder / "whole.parquet").read_bytes()[:-10])


def no_parquet_rows(folder: Path) -> Path:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), folder / "rows.parquet")
    return folder / "rows.parquet"


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "rows.jsonl", "no such file"),
    "empty file": (lambda folder: unlike(folder / "rows.jsonl", b""), "empty"),
    "empty folder": (lambda folder: folder, "no file of rows"),
    "pickle": (lambda folder: unlike(folder / "rows.pkl"), "format is not known"),
    "a page among the rows": (lambda folder: unlike(folder / "README.md").parent, "format is not known"),
    "link out of the folder": (linked_outside, "leads out"),
    "linked folder": (linked_folder, "leads out"),
    "pipe": (pipe, "regular file"),
    "not gzip": (lambda folder: unlike(folder / "rows.jsonl.gz"), "damaged"),
    "torn gzip": (torn_gzip, "damaged"),
    "decompression bomb": (bomb, "bomb"),
    "another artifact": (other_artifact, "wanted 'raw'"),
    "not Parquet": (lambda folder: unlike(folder / "rows.parquet"), "Parquet"),
    "torn Parquet": (torn_parquet, "Parquet"),
    "Parquet without rows": (no_parquet_rows, "no rows"),
    "CSV without header": (lambda folder: unlike(folder / "rows.csv", b"\n\n"), "header"),
    "CSV with a column twice": (lambda folder: unlike(folder / "rows.csv", b"prompt,prompt\n"), "header"),
    "CSV in UTF-16": (lambda folder: unlike(folder / "rows.csv", "prompt\n".encode("utf-16")), "header"),
}


@pytest.mark.parametrize(("make", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_input_is_one_error_with_where_and_fix(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(make(tmp_path))
    assert caught.value.where


def test_a_raw_artifact_and_a_folder_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    unlike(tmp_path / "b.jsonl", GOOD + b"\n" + GOOD)
    unlike(tmp_path / "deep" / "c.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    unlike(tmp_path / "_SUCCESS", b"")
    unlike(tmp_path / ".hidden" / "x.jsonl", b"")
    seal(tmp_path, "raw")
    places = [item[0].place for item in read(tmp_path) if not isinstance(item, Problem)]
    assert places == ["a.jsonl.gz:1", "b.jsonl:1", "b.jsonl:2", "deep/c.jsonl:1"]


def test_parquet_rows_are_held_to_the_same_rules(tmp_path: Path) -> None:
    records = [
        {"messages": TURNS, "split": "train", "score": None},
        {"messages": TURNS[:1], "split": None, "score": None},
        {"messages": TURNS, "split": None, "score": float("nan")},
        {"messages": TURNS, "split": None, "score": 1.0},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    first, *problems = read(path)
    assert not isinstance(first, Problem)
    assert first[1].split == "train"
    assert [problem.code for problem in problems if isinstance(problem, Problem)] == ["E_ROLE_ORDER", "E_NAN", "E_KEY"]
    assert problems[0].line.place == "rows.parquet:2"  # type: ignore[union-attr]


def test_a_damaged_parquet_file_gives_all_its_rows_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": TURNS, "id": str(number)} for number in range(50)]), path)
    whole, draw, counts = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        with suppress(DataError):
            counts.append(len(read(path)))
    assert set(counts) == {50}


def test_csv_rows_are_held_to_the_same_rules(tmp_path: Path) -> None:
    messages = json.dumps(TURNS).replace('"', '""')
    content = (
        "\ufeffprompt,answer,messages\r\n"
        'two\u2028 and 2?,"four,\nexactly",\r\n'
        f',,"{messages}"\r\n'
        "q,a\r\n"
        "\r\n"
        '"q"x,a,\r\n'
        ',,"[{""role"": ""user"", ""role"": ""user""}]"\r\n'
    ).encode() + b'caf\xe9,a,\r\nq,a,\r\nq,"open'
    items = read_text(tmp_path, content, "rows.csv")
    assert [getattr(item, "code", "row") for item in items] == [
        "row", "row", "E_CSV", "E_CSV", "E_DUPKEY", "E_UTF8", "row", "E_CSV",
    ]  # fmt: skip
    assert items[0][1].reference == "four,\nexactly"
    assert [item.line.number if isinstance(item, Problem) else item[0].number for item in items] == [
        2, 4, 5, 7, 8, 9, 10, 11,
    ]  # fmt: skip


def significant(data: bytes) -> int:
    """Count the lines that hold more than white space."""
    return sum(bool(line.strip(b" \t\r")) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.just(GOOD),
        st.tuples(st.integers(1, len(GOOD)), st.binary(max_size=3)).map(
            lambda change: GOOD[: change[0]] + change[1] + GOOD[change[0] + 1 :]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["messages", "prompt", "answer", "role", "x"]), inner, max_size=4),
        ).map(lambda value: json.dumps(value).encode()),
        st.integers(1020, 1030).map(lambda size: b" " * (size - 1) + b"1"),
    ),
    min_size=1,
).map(b"\n".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=LINES)
@example(data=b"\xef\xbb\xbf")
@example(data=b"\n\r\n\t\n")
def test_any_bytes_become_rows_or_records_and_none_is_lost(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(data or b" ")
    items = read(path, max_line_bytes=1024)
    assert len(items) == significant(data)
    for item in items:
        if isinstance(item, Problem):
            record = json.dumps(item.record()).encode()
            assert json.loads(record)["fix"] == FIXES[item.code]


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(LINES, st.text(alphabet='ab,"\n\r\x00é', max_size=60).map(str.encode)))
def test_any_bytes_as_csv_never_crash(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "rows.csv"
    path.write_bytes(b"prompt,answer\n" + data)
    read(path, max_line_bytes=1024)
