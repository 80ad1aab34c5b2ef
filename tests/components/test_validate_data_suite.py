"""The suites: Great Expectations on our DuckDB dialect finds what it finds with pandas."""

import random
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.components.validate_data.audit import SCHEMA
from assay.components.validate_data.suite import KINDS, RESULT_FORMAT, Limits, Outcome, Suites, outcome, run_suites

CODES = ["", "", "", "E_JSON", "E_KEY", "E_ROLE_ORDER", "E_EMPTY", "E_LONG", "E_TOKEN", "E_SAME", "E_ANSWER"]
LIMITS = Limits(allowed=30, max_characters=100)


def messy_table(rows: int) -> pa.Table:
    """An audit table in which every expectation fails on some rows."""
    draw = random.Random(0)
    maybe = lambda value: draw.choice([value, value, value, None])  # noqa: E731
    return pa.Table.from_pylist(
        [
            {
                "row_no": number,
                "line": number,
                "kind": draw.choice(KINDS),
                "error_code": draw.choice(CODES),
                "id": maybe(draw.choice([f"{draw.randrange(200):032x}", "z" * 32, "abc"])),
                "group_digest": "0" * 32,
                "n_turns": maybe(draw.randrange(3)),
                "roles_ok": maybe(draw.random() < 0.8),
                "ends_with": maybe(draw.choice(["user", "assistant"])),
                "empty_turns": maybe(draw.randrange(2)),
                "prompt_characters": maybe(draw.randrange(120)),
                "answer_characters": maybe(draw.randrange(120)),
                "chosen_differs": maybe(draw.random() < 0.8),
                "bidi_controls": maybe(draw.randrange(2)),
                "duplicate_of": None,
                "answers_to_prompt": maybe(draw.randrange(1, 3)),
                "splits_of_group": maybe(draw.randrange(3)),
            }
            for number in range(1, rows + 1)
        ],
        schema=SCHEMA,
    )


def suites_of(table: pa.Table, folder: Path) -> Suites:
    pq.write_table(table, folder / "audit.parquet")
    kinds = {kind: table["kind"].to_pylist().count(kind) for kind in KINDS}
    accepted = table["error_code"].to_pylist().count("")
    return Suites(folder, folder / "audit.parquet", kinds, accepted, LIMITS)


def with_pandas(suites: Suites) -> list[Outcome]:
    """Run the same expectations with Great Expectations' own pandas engine."""
    frame = pq.read_table(suites.audit).to_pandas()
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("frame").add_dataframe_asset("frame")
    definition = asset.add_batch_definition_whole_dataframe("all")
    found = []
    for name, expectations in suites._suites():
        batch = definition.get_batch({"dataframe": frame if name == "lines" else frame[frame["kind"] == name]})
        validation = batch.validate(gx.ExpectationSuite(name, expectations=expectations), result_format=RESULT_FORMAT)
        by_name = {result.expectation_config.meta["name"]: result for result in validation.results}
        found += [outcome(name, one.meta["name"], by_name[one.meta["name"]]) for one in expectations]
    return found


def test_duckdb_finds_what_pandas_finds(tmp_path: Path) -> None:
    suites = suites_of(messy_table(600), tmp_path)
    on_duckdb, on_pandas = suites.run(), with_pandas(suites)
    assert len(on_duckdb) == 11 + 11 + 11 + 13
    for one, other in zip(on_duckdb, on_pandas, strict=True):
        assert (one.suite, one.name) == (other.suite, other.name)
        assert (one.unexpected, one.success) == (other.unexpected, other.success), one.name
        assert len(one.rows) == min(20, one.unexpected) or one.column == ""
    assert sum(not one.success for one in on_duckdb) > 20  # the comparison is of failures, not of zeros


def test_a_regex_finds_a_part_of_the_string_as_it_does_in_postgresql(tmp_path: Path) -> None:
    import duckdb

    from assay.components.validate_data import duckdb_dialect

    with duckdb.connect(str(tmp_path / "a.duckdb")) as connection:
        connection.execute("CREATE TABLE t AS SELECT * FROM (VALUES ('xabx'), ('ab'), ('ba'), (NULL)) AS v(text)")
    context = gx.get_context(mode="ephemeral")
    url = f"{duckdb_dialect.URL}/{tmp_path / 'a.duckdb'}"
    source = context.data_sources.add_sql("s", connection_string=url, create_temp_table=False)
    batch = source.add_table_asset("t", table_name="t").add_batch_definition_whole_table("all").get_batch()
    matches = batch.validate(gxe.ExpectColumnValuesToMatchRegex(column="text", regex="ab"))
    differs = batch.validate(gxe.ExpectColumnValuesToNotMatchRegex(column="text", regex="ab"))
    assert matches.result["unexpected_count"] == 1
    assert differs.result["unexpected_count"] == 2


def test_an_expectation_that_cannot_be_computed_is_our_error(tmp_path: Path) -> None:
    suites = suites_of(messy_table(10).drop_columns(["bidi_controls"]), tmp_path)
    with pytest.raises(RuntimeError, match=r"lines\.no_bidi_controls could not be computed"):
        suites.run()


def test_a_budget_is_met_at_the_limit_and_broken_above_it(tmp_path: Path) -> None:
    clean = {"line": 1, "kind": "chat", "id": "0" * 32}
    records: list[dict[str, Any]] = [{**clean, "row_no": n, "error_code": ""} for n in range(1, 68)]
    records += [{"row_no": n, "line": 1, "kind": "chat", "error_code": "E_JSON"} for n in range(68, 71)]
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), tmp_path / "audit.parquet")
    for allowed, success in ((3, True), (2, False)):
        found = run_suites(
            tmp_path / "audit.parquet", {"chat": 70}, 67, Limits(allowed, 100), publish=lambda pages, outcomes: None
        )
        assert next(one.success for one in found if one.name == "accepted") is success
        assert next(one.unexpected for one in found if one.name == "accepted") == 3
