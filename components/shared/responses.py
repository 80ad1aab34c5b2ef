"""A store of greedy answers, so that no model is asked the same question twice.

One SQLite file per model (by content digest) below the cache folder; a batch is one transaction, so that a killed
evaluation goes on after the last whole batch. It is a cache: a damaged file is thrown away and filled again.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..contracts.artifacts import digest_of
from ..runtime.context import cache_folder

TABLE = "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"


class ResponseStore:
    """Answers, as JSON objects, by the tokens of the question.

    Args:
        model: Content digest of the model.
        settings: What else an answer depends on: the limit of tokens, the generator's version and arithmetic.
    """

    def __init__(self, model: str, settings: dict[str, str | int]) -> None:
        self.path: Path = cache_folder("responses") / f"{model}.sqlite"
        self.settings = digest_of(settings)

    def find(self, prompts: Iterable[Sequence[int]]) -> dict[tuple[int, ...], dict[str, Any]]:
        """Return the answers that are known, by the prompt's tokens."""
        keys = {self._key(prompt): tuple(prompt) for prompt in prompts}
        try:
            with closing(self._open()) as connection:
                rows = connection.execute("SELECT key, answer FROM responses").fetchall()
        except sqlite3.OperationalError:
            raise  # locked, or the disk is full: the file is whole
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
            return {}
        return {keys[key]: json.loads(answer) for key, answer in rows if key in keys}

    def add(self, answers: Mapping[tuple[int, ...], dict[str, Any]]) -> None:
        """Keep some answers, all or none."""
        rows = [(self._key(prompt), json.dumps(answer)) for prompt, answer in answers.items()]
        with closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)

    def _key(self, prompt: Sequence[int]) -> str:
        return digest_of([self.settings, list(prompt)])

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(TABLE)
        return connection
