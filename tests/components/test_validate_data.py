"""The whole step, on files as users have them."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import DataSettings
from assay.components.contracts.rows import Example, read_rows
from assay.components.shared.summary import read_seconds, read_summary
from assay.components.shared.tasks.task import get_task
from assay.components.validate_data.audit import merge_groups
from assay.components.validate_data.component import validate_data

SSN = "078-05-1120"


def run(raw: Path, out: Path, task: str = "exact_match", **settings: Any) -> None:
    validate_data.python_func(
        settings=DataSettings(**settings).model_dump(mode="json"),
        task=task,
        raw=dsl.Dataset(uri=str(raw)),
        accepted=dsl.Dataset(uri=str(out / "accepted")),
        quarantine=dsl.Dataset(uri=str(out / "quarantine")),
        docs=dsl.Artifact(uri=str(out / "docs")),
        summary=dsl.Metrics(uri=str(out / "summary")),
    )


def write(path: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def question(number: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"What is {number} + {number}?", "answer": str(2 * number), **extra}


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine" / "quarantine.jsonl").read_text().splitlines()]


def test_generated_rows_all_pass_and_two_runs_are_the_same(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write(raw / "rows.jsonl", list(get_task("medication_directions").generate(60, 0)))
    parent = seal(raw, "raw")
    for name in ("one", "two"):
        run(raw, tmp_path / name, "medication_directions")
    for kind, folder in {"rows": "accepted", "quarantine": "quarantine", "docs": "docs", "summary": "summary"}.items():
        one, two = (read_manifest(tmp_path / name / folder, kind) for name in ("one", "two"))
        assert one == two, folder
        assert one.parents == {"raw": parent.digest}
    rows = read_rows(tmp_path / "one" / "accepted" / "rows.parquet", Example)
    assert len({row.id for row in rows}) == 60
    assert rows[4].source == "rows.jsonl:5"
    assert any(label.startswith("difficulty=") for label in rows[0].slices)
    summary = read_summary(tmp_path / "one" / "summary")
    assert {key: summary.details[key] for key in ("rows", "accepted", "quarantined", "reasons")} == {
        "rows": 60, "accepted": 60, "quarantined": 0, "reasons": {},
    }  # fmt: skip
    expectations: Any = summary.details["expectations"]
    assert {"name", "column", "success", "severity", "unexpected"} <= expectations[0].keys()
    assert all(one["success"] for one in expectations)
    assert (read_seconds(tmp_path / "one" / "summary") or 0) > 0


def test_one_bad_row_stops_the_run_and_the_message_leads_to_it(tmp_path: Path) -> None:
    bad = '{"prompt": "q", "answer": "a"'
    raw = write(tmp_path / "mine.jsonl", [question(1), bad, question(2)])
    with pytest.raises(DataError) as caught:
        run(raw, tmp_path / "out")
    message = str(caught.value)
    assert "1 of 3 rows are refused; the policy allows 0" in message
    assert "E_JSON × 1, first at mine.jsonl:2 character 30" in message
    assert str(tmp_path / "out" / "quarantine" / "quarantine.jsonl") in message
    (record,) = records(tmp_path / "out")
    assert base64.b64decode(record["raw_base64"]).decode() == bad
    assert (record["file"], record["line"], record["byte_offset"]) == ("mine.jsonl", 2, 44)
    assert (tmp_path / "out" / "docs" / "index.html").is_file()
    assert not (tmp_path / "out" / "accepted").exists()


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        ({"max_bad_rows": 2}, True),
        ({"max_bad_rows": 1}, False),
        ({"max_bad_share": 0.2}, True),
        ({"max_bad_share": 0.19}, False),
        ({"max_bad_rows": 2, "max_bad_share": 0.01}, True),
    ],
)
def test_the_policy_holds_to_the_row(tmp_path: Path, policy: dict[str, Any], passes: bool) -> None:
    raw = write(tmp_path / "rows.jsonl", [*map(question, range(8)), {"prompt": "q", "answer": ""}, "[]"])
    if not passes:
        with pytest.raises(DataError, match="2 of 10 rows are refused; the policy allows 1"):
            run(raw, tmp_path / "out", **policy)
        return
    run(raw, tmp_path / "out", **policy)
    summary = read_summary(tmp_path / "out" / "summary")
    assert summary.details["reasons"] == {"E_EMPTY": 1, "E_TYPE": 1}
    assert summary.metrics["quarantined"] == 2
    assert read_manifest(tmp_path / "out" / "accepted", "rows").counts == {"rows": 8}
    assert read_manifest(tmp_path / "out" / "quarantine", "quarantine").counts == {"E_EMPTY": 1, "E_TYPE": 1}


def test_no_policy_lets_an_input_pass_of_which_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 rows are refused"):
        run(write(tmp_path / "rows.jsonl", ["[]", "{}"]), tmp_path / "out", max_bad_share=1.0)
    with pytest.raises(DataError, match="only blank lines"):
        run(write(tmp_path / "blank.jsonl", ["", " "]), tmp_path / "out")


def test_duplicates_and_contradictions_are_warnings_and_stay(tmp_path: Path) -> None:
    contradiction = {"prompt": "What is 1 + 1?", "answer": "3"}
    run(write(tmp_path / "rows.jsonl", [question(1), question(1), question(2), contradiction]), tmp_path / "out")
    summary = read_summary(tmp_path / "out" / "summary")
    expectations: Any = summary.details["expectations"]
    unmet = {one["name"]: (one["severity"], one["rows"]) for one in expectations if not one["success"]}
    assert unmet == {"unique": ("warning", [1, 2]), "one_answer": ("warning", [1, 2, 4])}
    assert summary.details["notes"] == {"duplicates": 1}
    assert len(read_rows(tmp_path / "out" / "accepted" / "rows.parquet", Example)) == 4


def test_a_group_on_two_sides_of_the_users_split_is_leakage(tmp_path: Path) -> None:
    rows = [
        question(1, split="train"),
        question(2, split="train", group="patient-1"),
        question(3, split="test", group="patient-1"),
        question(4, split="test"),
    ]
    with pytest.raises(DataError, match=r"E_SPLIT × 2, first at rows.jsonl:2(.|\n)*no_leakage fails on 2 rows"):
        run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", max_bad_share=1.0)
    assert [(record["code"], record["line"]) for record in records(tmp_path / "out")] == [
        ("E_SPLIT", 2),
        ("E_SPLIT", 3),
    ]
    rows[2]["split"] = "train"
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "fixed")
    assert read_rows(tmp_path / "fixed" / "accepted" / "rows.parquet", Example)[0].slices == ["split=train"]


def test_groups_of_the_task_and_of_the_user_are_joined() -> None:
    keys = ["a", "b", "c", "a", "d"]
    given = ["", "p", "p", "q", ""]
    groups = merge_groups(keys, given)
    assert groups[0] == groups[3]
    assert groups[1] == groups[2]
    assert len(set(groups)) == 3
    assert merge_groups(keys[::-1], given[::-1]) == groups[::-1]
    assert merge_groups(keys, [""] * 5) == keys


def test_rejected_answers_of_preference_rows_are_checked_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    summary = read_summary(tmp_path / "out" / "summary")
    assert summary.details["notes"] == {"rejected_answers_unused": 3}
    names = [one["name"] for one in summary.details["expectations"]]  # type: ignore[attr-defined]
    assert "pairs_differ" in names


def test_nothing_of_the_users_text_reaches_docs_summary_or_error(tmp_path: Path) -> None:
    planted: list[Any] = [
        question(1, answer=SSN), question(1, answer=SSN), question(1, answer="other"),  # duplicate, contradiction
        {"prompt": f"{SSN} <|im_start|>", "answer": "a"}, {"prompt": "q", "answer": "a", SSN: 1},
        {"messages": [{"role": SSN, "content": SSN}]}, {"prompt": SSN, "chosen": SSN, "rejected": SSN},
        f'{{"{SSN}": 1, "{SSN}": 2}}', f'{{"prompt": "{SSN}', question(2, metadata={SSN: {"x": "\u0000"}}),
        question(3, slices=[SSN]), {"prompt": f"\u202e{SSN}", "answer": "a"}, question(4, split=SSN, id=SSN),
        f'{{"prompt": "q", "answer": "a", "metadata": {{"{SSN}": NaN}}}}', {"prompt": SSN * 3000, "answer": "a"},
    ]  # fmt: skip
    raw = write(tmp_path / "rows.jsonl", planted)
    run(raw, tmp_path / "out", max_bad_rows=20)
    files = [path for name in ("docs", "summary") for path in (tmp_path / "out" / name).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if SSN.encode() in path.read_bytes()] == []
    with pytest.raises(DataError) as caught:
        run(raw, tmp_path / "again")
    assert SSN not in str(caught.value)
    assert SSN in base64.b64decode(records(tmp_path / "out")[0]["raw_base64"]).decode()


def test_the_docs_open_without_a_network_and_their_links_lead_somewhere(tmp_path: Path) -> None:
    run(write(tmp_path / "rows.jsonl", [question(1), question(1), "[]"]), tmp_path / "out", max_bad_rows=1)
    docs = tmp_path / "out" / "docs"
    pages = sorted(docs.rglob("*.html"))
    assert len(pages) >= 6
    for page in pages:
        text = page.read_text()
        assert not re.search(r"<script|<img|<link|url\(|@import", text), page
        for link in re.findall(r'href="([^"#]+)"', text):
            assert link.startswith("https://") or (page.parent / link).is_file(), (page, link)
    assert "rows.jsonl:3" in (docs / "index.html").read_text()
    (docs / "site" / "index.html").write_text("a later run")
    read_manifest(docs, "docs")  # the site is outside the seal


def test_a_second_attempt_writes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    raw = write(tmp_path / "rows.jsonl", [question(n) for n in range(5)])
    run(raw, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "quarantine" / "quarantine.jsonl").write_text("torn")
    run(raw, tmp_path / "two")
    for folder in ("accepted", "quarantine", "docs"):
        assert read_manifest(tmp_path / "one" / folder) == read_manifest(tmp_path / "two" / folder)
