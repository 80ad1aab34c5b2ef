"""Great Expectations suites over the audit table, run by DuckDB.

One suite looks at all lines; one more looks at the lines of each kind that occurs. A `critical` expectation stops the
run, a `warning` is reported. No expectation sees a text of the user: the table has none, and the results carry row
numbers and ids only.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import great_expectations as gx
import great_expectations.expectations as gxe
from great_expectations.core.run_identifier import RunIdentifier

from . import duckdb_dialect
from .audit import SCHEMA

ALL = "lines"
KINDS = ("chat", "verifiable", "preference")
SHOWN_ROWS = 20
"""Row numbers that a failing expectation names."""
RESULT_FORMAT = {
    "result_format": "COMPLETE",
    "unexpected_index_column_names": ["row_no", "id"],
    "exclude_unexpected_values": True,  # else offending values are copied into results and Data Docs
    "partial_unexpected_count": SHOWN_ROWS,
}
UNREADABLE = ["E_LINE", "E_UTF8", "E_JSON", "E_CSV", "E_DUPKEY", "E_NAN", "E_DEPTH", "E_CHARACTER"]


@dataclass(frozen=True)
class Limits:
    """What the suites are told."""

    allowed: int
    """Lines that may be refused."""
    max_characters: int


@dataclass(frozen=True)
class Outcome:
    """What became of one expectation; deterministic, without text of the user."""

    suite: str
    name: str
    sentence: str
    column: str
    severity: str
    success: bool
    unexpected: int
    """Rows that break it."""
    rows: list[int]
    """The first of their row numbers."""

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def lines_suite(lines: int, limits: Limits, rows: int) -> list[Any]:
    """Return the expectations of all lines.

    Args:
        lines: Lines in all.
        limits: The policy.
        rows: The accepted ones among them.
    """
    share = _share(lines, limits)
    return [
        expect(
            "columns", "The audit table has its columns, in their order.",
            gxe.ExpectTableColumnsToMatchOrderedList, column_list=SCHEMA.names,
        ),
        expect("some_rows", "There are rows.", gxe.ExpectTableRowCountToBeBetween, min_value=1),
        refused("accepted", "No more lines are refused than the policy allows.", None, share),
        refused("readable", "Every line is one JSON object in UTF-8, within the size limit.", UNREADABLE, share),
        refused("typed", "Every row has the keys and types of its form.", ["E_KEY", "E_TYPE"], share),
        expect(
            "unique", "No row stands twice (prepare_data drops the repeats).",
            gxe.ExpectColumnValuesToBeUnique, "warning", column="id",
        ),
        expect(
            "one_answer", "A prompt has one right answer.",
            gxe.ExpectColumnValuesToBeBetween, "warning", column="answers_to_prompt", max_value=1,
        ),
        expect(
            "no_bidi_controls", "No text is written in an order other than it is shown in.",
            gxe.ExpectColumnValuesToBeBetween, "warning", column="bidi_controls", max_value=0,
        ),
        expect(
            "no_leakage", "No group stands in two of the user's splits.",
            gxe.ExpectColumnValuesToBeBetween, column="splits_of_group", max_value=1,
        ),
        expect(
            "identified", "Every accepted row has an id, a digest.",
            gxe.ExpectColumnValuesToMatchRegex, column="id", regex="^[0-9a-f]{32}$",
        ),
        expect(
            "complete", "Every accepted row, and no other, was audited.",
            gxe.ExpectColumnValuesToNotBeNull, column="id", mostly=rows / lines,
        ),
    ]  # fmt: skip


def kind_suite(kind: str, lines: int, limits: Limits) -> list[Any]:
    """Return the expectations of the lines of one kind: what was refused in them, and what was let through."""
    share = _share(lines, limits)
    between = gxe.ExpectColumnValuesToBeBetween
    longest = limits.max_characters
    suite = [
        refused("roles", "Turns alternate: system at most once and first, then user and assistant.",
                ["E_ROLE_ORDER"], share),
        refused("not_empty", "No text is empty.", ["E_EMPTY"], share),
        refused("lengths", f"No text is longer than {longest:,} characters.", ["E_LONG"], share),
        refused("no_control_tokens", "No text holds a control token of a chat template.", ["E_TOKEN"], share),
        refused("verified", "The task's verifier accepts every reference answer.", ["E_ANSWER"], share),
        expect("prompt_roles", "Accepted prompts alternate.",
               gxe.ExpectColumnValuesToBeInSet, column="roles_ok", value_set=[True]),
        expect("prompt_end", "Accepted prompts end with the user's turn.",
               gxe.ExpectColumnValuesToBeInSet, column="ends_with", value_set=["user"]),
        expect("prompt_turns", "Accepted prompts have a turn.", between, column="n_turns", min_value=1),
        expect("turns_filled", "Accepted rows have no empty turn.", between, column="empty_turns", max_value=0),
        expect("prompt_length", "Turns of accepted prompts are within the limit.",
               between, column="prompt_characters", min_value=1, max_value=longest),
        expect("answer_length", "Accepted answers are within the limit.",
               between, column="answer_characters", min_value=1, max_value=longest),
    ]  # fmt: skip
    if kind == "preference":
        differs = gxe.ExpectColumnValuesToBeInSet
        suite += [
            refused("pairs", "Chosen and rejected answers differ.", ["E_SAME"], share),
            expect("pairs_differ", "Accepted pairs differ.", differs, column="chosen_differs", value_set=[True]),
        ]
    return suite


def expect(name: str, sentence: str, kind: Any, severity: str = "critical", **arguments: Any) -> Any:
    """Return an expectation with its name, the sentence that Data Docs show, and its severity."""
    return kind(meta={"name": name}, description=sentence, severity=severity, **arguments)


def refused(name: str, sentence: str, codes: list[str] | None, share: float) -> Any:
    """Expect that at least `share` of the lines were not refused for one of `codes` (None: for any)."""
    if codes is None:
        return expect(
            name, sentence, gxe.ExpectColumnValuesToBeInSet, column="error_code", value_set=[""], mostly=share
        )
    return expect(
        name, sentence, gxe.ExpectColumnValuesToNotBeInSet, column="error_code", value_set=codes, mostly=share
    )


def _share(lines: int, limits: Limits) -> float:
    return max(0, lines - limits.allowed) / lines


@dataclass(frozen=True)
class Suites:
    """Runs the suites in a Great Expectations project below `folder`, which also holds the Data Docs afterwards."""

    folder: Path
    audit: Path
    """The audit table, Parquet."""
    kinds: dict[str, int]
    """Lines by kind, refused ones included."""
    rows: int
    """Accepted lines."""
    limits: Limits

    @property
    def site(self) -> Path:
        """The Data Docs."""
        return self.folder / "gx" / "uncommitted" / "data_docs" / "local_site"

    def run(self) -> list[Outcome]:
        """Run every suite.

        Raises:
            RuntimeError: An expectation could not be computed: that says nothing about the data.
        """
        context = gx.get_context(mode="file", project_root_dir=str(self.folder))
        context.variables.progress_bars = {"globally": False}
        source = context.data_sources.add_sql("audit", connection_string=self._database(), create_temp_table=False)
        suites = dict(self._suites())
        definitions = [self._definition(context, source, name, suite) for name, suite in suites.items()]
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name="door",
                validation_definitions=definitions,
                actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
                result_format=RESULT_FORMAT,
            )
        )
        # Great Expectations puts the time into every path; the same paths in every run make the pages linkable.
        fixed = RunIdentifier(run_name="validate_data", run_time=datetime(2000, 1, 1, tzinfo=UTC))
        validations = checkpoint.run(run_id=fixed).run_results.values()
        found = {
            (validation.suite_name, result.expectation_config.meta["name"]): result
            for validation in validations
            for result in validation.results
        }
        return [
            outcome(name, expectation.meta["name"], found[name, expectation.meta["name"]])
            for name, suite in suites.items()
            for expectation in suite
        ]

    def _suites(self) -> Iterator[tuple[str, list[Any]]]:
        lines = sum(self.kinds.values())
        yield ALL, lines_suite(lines, self.limits, self.rows)
        for kind in KINDS:
            if count := self.kinds.get(kind):
                yield kind, kind_suite(kind, count, self.limits)

    def _definition(self, context: Any, source: Any, name: str, expectations: list[Any]) -> Any:
        suite = context.suites.add(gx.ExpectationSuite(name, expectations=expectations))
        batch = source.add_table_asset(name, table_name=name).add_batch_definition_whole_table("all")
        return context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))

    def _database(self) -> str:
        """Make a database of views on the Parquet file, and return its URL: nothing is loaded."""
        path = self.folder / "audit.duckdb"
        with duckdb.connect(str(path)) as connection:
            parquet = str(self.audit.absolute()).replace("'", "''")
            connection.execute(f"CREATE VIEW {ALL} AS SELECT * FROM read_parquet('{parquet}')")
            for kind in KINDS:
                connection.execute(f"CREATE VIEW {kind} AS SELECT * FROM {ALL} WHERE kind = '{kind}'")
        return f"{duckdb_dialect.URL}/{path}"


def run_suites(audit: Path, kinds: dict[str, int], rows: int, limits: Limits, publish: Any) -> list[Outcome]:
    """Run the suites over an audit table.

    Args:
        audit: The table, Parquet.
        kinds: Lines by kind, refused ones included.
        rows: Accepted lines.
        limits: The policy.
        publish: Called with the folder of the Data Docs and the outcomes, before the project is removed.
    """
    with tempfile.TemporaryDirectory(prefix="assay-validate-") as folder:
        suites = Suites(Path(folder), audit, kinds, rows, limits)
        found = suites.run()
        publish(suites.site, found)
    return found


def outcome(suite: str, name: str, result: Any) -> Outcome:
    """Return what became of one expectation.

    Raises:
        RuntimeError: It could not be computed.
    """
    config = result.expectation_config
    for problem in _exceptions(result.exception_info):
        raise RuntimeError(f"the expectation {suite}.{name} could not be computed: {problem}")
    found = result.result.get("unexpected_index_list") or []
    rows = found[0].get("row_no", []) if found else []
    return Outcome(
        suite=suite,
        name=name,
        sentence=config.description,
        column=config.kwargs.get("column", ""),
        severity=str(getattr(config.severity, "value", config.severity)),
        success=bool(result.success),
        unexpected=int(result.result.get("unexpected_count", 0 if result.success else 1)),
        rows=sorted(rows)[:SHOWN_ROWS],
    )


def _exceptions(info: Any) -> Iterator[str]:
    """Yield the messages of what was raised; the mapping is nested by metric when a metric failed."""
    if not isinstance(info, dict):
        return
    if info.get("raised_exception"):
        yield str(info.get("exception_message"))
    for inner in info.values():
        yield from _exceptions(inner)
