"""Errors that a user can act on.

* AssayError
  - DataError      a row or a file breaks its contract
  - RecipeError    a recipe asks for something that cannot be done
  - ModelError     a model cannot be found, read or used
  - TrainingError  a training step learned nothing, or something harmful
  - RegistryError  the registry or its ledger refuses
  - RunError       a run failed on an engine

Every message answers three questions: what is wrong, where, and what to do next. The CLI prints it without a
traceback and exits 2; any other exception is our bug and keeps its traceback.
"""


class AssayError(Exception):
    """Base of every error that is the input's fault, not the program's.

    Args:
        what: What is wrong, as a sentence.
        where: File, row, column, step or key; empty when the sentence says it.
        fix: What to do next.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(f"  → {self.fix}")
        return "\n".join(lines)


class DataError(AssayError):
    """A row or a file breaks its contract."""


class RecipeError(AssayError):
    """A recipe asks for something that cannot be done."""


class ModelError(AssayError):
    """A model cannot be found, read or used."""


class TrainingError(AssayError):
    """A training step learned nothing, or something harmful."""


class RegistryError(AssayError):
    """The registry or its ledger refuses."""


class RunError(AssayError):
    """A run failed on an engine."""
