"""A SQLAlchemy dialect that lets Great Expectations run its SQL on DuckDB.

Great Expectations 1.24 has no DuckDB engine, and duckdb-engine 0.17 fails under SQLAlchemy 2.1: it reflects through
catalogues DuckDB lacks, and its one cursor is closed before the rows are read. This dialect does three things instead:

* it calls itself `postgresql`, so that Great Expectations chooses the SQL that DuckDB understands;
* a cursor reads all its rows at once (they are counts and ids, never data);
* `~` becomes `regexp_matches`: DuckDB's own `~` matches the whole string, PostgreSQL's a part of it.

`tests/components/test_validate_data_suite.py` holds it to the counts that Great Expectations finds with pandas.
"""

from typing import Any

import duckdb
from sqlalchemy import text, types
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.base import PGCompiler, PGDialect
from sqlalchemy.pool import SingletonThreadPool

NAME = "assay_duckdb"
URL = f"{NAME}://"
TYPES = {
    "VARCHAR": types.String,
    "BIGINT": types.BigInteger,
    "INTEGER": types.Integer,
    "DOUBLE": types.Float,
    "BOOLEAN": types.Boolean,
}


class Driver:
    """The part of PEP 249's module interface that SQLAlchemy asks for."""

    paramstyle = "numeric_dollar"
    apilevel = duckdb.apilevel
    threadsafety = duckdb.threadsafety
    Error = duckdb.Error


class Cursor:
    """A PEP 249 cursor whose rows outlive the statement."""

    arraysize = 1
    rowcount = -1

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.description: Any = None
        self.rows: list[tuple[Any, ...]] = []

    def execute(self, statement: str, parameters: Any = None) -> None:
        """Run a statement and keep its rows."""
        result = self.connection.duck.execute(statement, parameters or None)
        self.description = result.description
        self.rows = result.fetchall() if result.description else []

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that were not read yet."""
        return self.fetchmany(len(self.rows))

    def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        """Return the next `size` rows."""
        rows, self.rows = self.rows[:size], self.rows[size:]
        return rows

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, or None at the end."""
        return self.rows.pop(0) if self.rows else None

    def close(self) -> None:
        """Forget the rows."""
        self.rows = []


class Connection:
    """A PEP 249 connection; every statement stands alone, so there are no transactions to end."""

    def __init__(self, duck: duckdb.DuckDBPyConnection) -> None:
        self.duck = duck

    def cursor(self) -> Cursor:
        """Return a new cursor."""
        return Cursor(self)

    def commit(self) -> None:
        """Do nothing: DuckDB commits by itself."""

    def rollback(self) -> None:
        """Do nothing: there is nothing to undo."""

    def close(self) -> None:
        """Close the database."""
        self.duck.close()


class Compiler(PGCompiler):  # type: ignore[misc]  # mypy is told to skip SQLAlchemy
    """PostgreSQL's SQL, but for the regular expressions."""

    def visit_custom_op_binary(self, element: Any, operator: Any, **kw: Any) -> str:
        """Write `~` and `!~` as a search for a part of the string."""
        if operator.opstring not in ("~", "!~"):
            return str(super().visit_custom_op_binary(element, operator, **kw))
        search = f"regexp_matches({self.process(element.left, **kw)}, {self.process(element.right, **kw)})"
        return search if operator.opstring == "~" else f"NOT {search}"


class Dialect(PGDialect):  # type: ignore[misc]
    """PostgreSQL to Great Expectations, DuckDB underneath."""

    driver = NAME
    statement_compiler = Compiler
    supports_statement_cache = False
    poolclass = SingletonThreadPool

    @classmethod
    def import_dbapi(cls) -> Any:
        """Return the driver."""
        return Driver

    def create_connect_args(self, url: Any) -> Any:
        """Take the database's path from the URL."""
        return [url.database or ":memory:"], {}

    def connect(self, *arguments: Any, **settings: Any) -> Any:
        """Open the database."""
        return Connection(duckdb.connect(*arguments))

    def initialize(self, connection: Any) -> None:
        """Ask the server nothing: PostgreSQL's questions have no answer here."""

    def on_connect(self) -> None:
        """Set nothing up on a new connection."""

    def has_table(self, connection: Any, table_name: str, schema: str | None = None, **kw: Any) -> bool:
        """Return whether there is a table or view of that name."""
        return table_name in self.get_table_names(connection)

    def get_table_names(self, connection: Any, schema: str | None = None, **kw: Any) -> list[str]:
        """Return the names of tables and views."""
        rows = connection.execute(text("SELECT table_name FROM information_schema.tables ORDER BY ALL"))
        return [name for (name,) in rows]

    def get_columns(self, connection: Any, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        """Return the columns of a table or view, as SQLAlchemy's inspector wants them."""
        rows = connection.execute(text(f'DESCRIBE "{table_name}"'))
        return [
            {"name": row[0], "type": TYPES.get(row[1], types.NullType)(), "nullable": True, "default": None}
            for row in rows
        ]

    def get_pk_constraint(self, connection: Any, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        """Return that there is no primary key."""
        return {"constrained_columns": [], "name": None}


registry.register(NAME, __name__, "Dialect")
