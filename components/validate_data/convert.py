"""Turn a decoded record of any accepted form into one canonical row: a conversation, and its right answer.

The forms, each a typed struct that refuses keys it does not know:

    chat         {"messages": [...]}, the last turn is the reference     (also ShareGPT `conversations`, Alpaca)
    verifiable   {"prompt": text or turns, "answer": text}               (also `completion`)
    preference   {"prompt": text or turns, "chosen": …, "rejected": …}, `chosen` is the reference
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..contracts.errors import DataError
from ..contracts.rows import Message
from ..shared.tasks.task import Task
from .problems import RefusedError, key_name

Role = Literal["system", "user", "assistant"]
Kind = Literal["chat", "verifiable", "preference"]

CONTROL_TOKENS = re.compile(
    r"<\|[A-Za-z0-9_\-]{1,40}\|>|<｜[^｜<>]{1,40}｜>"  # ChatML, GPT, Llama 3, Qwen; DeepSeek
    r"|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"  # Llama 2, Mistral, Gemma
)
"""Text that the tokenizers of common chat models read as control tokens, wherever it stands."""


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """One turn in the form of `messages`."""

    role: Role
    content: str


class ShareTurn(msgspec.Struct, forbid_unknown_fields=True):
    """One turn in ShareGPT's form."""

    speaker: Literal["system", "human", "gpt"] = msgspec.field(name="from")
    value: str


class Form(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Keys that every form may carry beside its own."""

    id: str | int | None = None
    """The user's name of the row; kept in the quarantine only, the canonical id is a digest."""
    group: str | int | None = None
    """Rows of one group never stand on both sides of a split, for example one patient's."""
    slices: list[str] | dict[str, str | int | float | bool] | None = None
    """Labels for per-slice tables: `name=value`, or a mapping."""
    split: str | None = None
    """The split the row had at the user's; checked for leakage and kept as a slice."""
    source: str | None = None
    metadata: Any = None


class Chat(Form):
    """A conversation that ends with the right answer."""

    messages: list[Turn]


class ShareGPT(Form):
    """The same in ShareGPT's words."""

    conversations: list[ShareTurn]
    system: str | None = None


class Alpaca(Form):
    """An instruction, its input and its output."""

    instruction: str
    output: str
    input: str | None = None
    system: str | None = None


class Verifiable(Form):
    """A prompt and the answer that a verifier compares with."""

    prompt: str | list[Turn]
    answer: str


class Completion(Form):
    """A prompt and what should follow."""

    prompt: str | list[Turn]
    completion: str | list[Turn]


class Preference(Form):
    """A prompt and two answers, the better one named."""

    prompt: str | list[Turn]
    chosen: str | list[Turn]
    rejected: str | list[Turn]


FORMS: dict[str, tuple[type[Form], Kind]] = {
    "messages": (Chat, "chat"),
    "conversations": (ShareGPT, "chat"),
    "instruction": (Alpaca, "chat"),
    "chosen": (Preference, "preference"),
    "rejected": (Preference, "preference"),
    "completion": (Completion, "verifiable"),
    "answer": (Verifiable, "verifiable"),
    "prompt": (Verifiable, "verifiable"),
}
"""The first of these keys that a record has says its form."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row in canonical form."""

    kind: Kind
    prompt: list[Message]
    """Ends with a user turn."""
    reference: str
    rejected: str | None
    """Of a preference row."""
    group: str
    """The user's group; empty for none."""
    slices: list[str]
    split: str
    """The user's split label; empty for none."""


@dataclass(frozen=True)
class Converter:
    """Converts the rows of one task.

    Args:
        task: Turns a plain prompt into a conversation and verifies the answer.
        max_characters: Longest text of one turn.
    """

    task: Task
    max_characters: int

    def convert(self, record: Any) -> Row:
        """Return a record's canonical row.

        Raises:
            RefusedError: The record breaks its form; `kind` is set where the form was recognised.
        """
        if not isinstance(record, dict):
            raise RefusedError("E_TYPE", f"expected an object, got {_name(record)}")
        record = {key: value for key, value in record.items() if value is not None}
        marker = next((key for key in FORMS if key in record), None)
        if marker is None:
            raise RefusedError("E_KEY", f"none of the keys {list(FORMS)} is there, so the form of the row is unknown")
        form, kind = FORMS[marker]
        try:
            return self._row(_typed(record, form), kind)
        except RefusedError as error:
            error.kind = kind
            raise

    def _row(self, form: Form, kind: Kind) -> Row:
        prompt, reference, rejected, column = self._parts(form)
        if rejected is not None and reference.split() == rejected.split():
            raise RefusedError("E_SAME", "chosen and rejected are the same text", "$.rejected")
        self._verify(reference, column)
        split = form.split or ""
        return Row(
            kind=kind,
            prompt=prompt,
            reference=reference,
            rejected=rejected,
            group="" if form.group is None else str(form.group),
            slices=_slices(form.slices) + ([f"split={split}"] if split else []),
            split=split,
        )

    def _verify(self, reference: str, column: str) -> None:
        """Hold the reference to the task's own verifier: an answer that it refuses could never be learned."""
        try:
            right = self.task.reward(reference, reference) >= 1
        except DataError:  # its message quotes the answer
            right = False
        if not right:
            raise RefusedError("E_ANSWER", f"the verifier of {self.task.name} does not accept the answer", column)

    def _parts(self, form: Form) -> tuple[list[Message], str, str | None, str]:
        """Return prompt, reference, rejected answer, and the JSON path of the reference."""
        match form:
            case Chat():
                return self._conversation(form.messages, "$.messages", "content")
            case ShareGPT():
                roles: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
                turns = [Turn(roles[turn.speaker], turn.value) for turn in form.conversations]
                return self._conversation(_led(form.system, turns), "$.conversations", "value", form.system is not None)
            case Alpaca():
                asked = "\n\n".join(part for part in (form.instruction, form.input) if part)
                prompt = self._turns(_led(form.system, [Turn("user", asked)]), "$.instruction", "user")
                return prompt, self._text(form.output, "$.output"), None, "$.output"
            case Verifiable():
                return self._prompt(form.prompt), self._text(form.answer, "$.answer"), None, "$.answer"
            case Completion():
                return self._prompt(form.prompt), self._answer(form.completion, "$.completion"), None, "$.completion"
            case Preference():
                chosen = self._answer(form.chosen, "$.chosen")
                return self._prompt(form.prompt), chosen, self._answer(form.rejected, "$.rejected"), "$.chosen"
        raise TypeError(f"no conversion for {type(form).__name__}")

    def _conversation(
        self, turns: list[Turn], path: str, text: str, led: bool = False
    ) -> tuple[list[Message], str, None, str]:
        messages = self._turns(turns, path, "assistant", text, first=-1 if led else 0)
        return messages[:-1], messages[-1].content, None, f"{path}[{len(turns) - 1 - led}].{text}"

    def _prompt(self, prompt: str | list[Turn]) -> list[Message]:
        if isinstance(prompt, str):
            return self.task.prompt(self._text(prompt, "$.prompt"))
        return self._turns(prompt, "$.prompt", "user")

    def _answer(self, answer: str | list[Turn], path: str) -> str:
        if isinstance(answer, str):
            return self._text(answer, path)
        if [turn.role for turn in answer] != ["assistant"]:
            message = "expected one assistant turn; earlier turns belong to the prompt"
            raise RefusedError("E_ROLE_ORDER", message, path)
        return self._text(answer[0].content, f"{path}[0].content")

    def _turns(
        self, turns: Sequence[Turn], path: str, last: Role, text: str = "content", first: int = 0
    ) -> list[Message]:
        """Check the order of roles and every text; `first` is the index that the first turn has in the record."""
        if not turns:
            raise RefusedError("E_EMPTY", "there are no turns", path)
        offset = turns[0].role == "system"
        for index, turn in enumerate(turns[offset:], start=offset):
            wanted = "user" if (index - offset) % 2 == 0 else "assistant"
            if turn.role != wanted:
                raise RefusedError(
                    "E_ROLE_ORDER", f"expected a turn of {wanted}, got {turn.role}", f"{path}[{index + first}]"
                )
        if turns[-1].role != last:
            message = f"the last turn is {turns[-1].role}'s, expected {last}'s"
            raise RefusedError("E_ROLE_ORDER", message, f"{path}[{len(turns) - 1 + first}]")
        for index, turn in enumerate(turns, start=first):
            self._text(turn.content, f"{path}[{index}].{text}" if index >= 0 else "$.system")
        return [Message(role=turn.role, content=turn.content) for turn in turns]

    def _text(self, text: str, path: str) -> str:
        if not text.strip():
            raise RefusedError("E_EMPTY", "the text is empty", path)
        if len(text) > self.max_characters:
            raise RefusedError("E_LONG", f"{len(text):,} characters, the limit is {self.max_characters:,}", path)
        if token := CONTROL_TOKENS.search(text):
            raise RefusedError("E_TOKEN", f"{token.group()} at character {token.start() + 1} is a control token", path)
        return text


def _led(system: str | None, turns: list[Turn]) -> list[Turn]:
    return turns if system is None else [Turn("system", system), *turns]


def _slices(given: list[str] | dict[str, str | int | float | bool] | None) -> list[str]:
    if isinstance(given, dict):
        return [f"{name}={value}" for name, value in given.items()]
    for index, label in enumerate(given or []):
        if not re.fullmatch(r"[^=]+=.+", label):
            raise RefusedError("E_TYPE", "expected `name=value`", f"$.slices[{index}]")
    return list(given or [])


def _typed(record: dict[str, Any], form: type[Form]) -> Form:
    try:
        return msgspec.convert(record, form, strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise RefusedError(*_told(message), path.rstrip("`") or "$") from None


def _told(message: str) -> tuple[str, str]:
    """Return the code and the message of a msgspec error, without the value that msgspec may quote."""
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.S):
        return "E_KEY", f"the key {key_name(found[1])} is not one of this form"
    if "missing required field" in message:
        return "E_KEY", message
    return "E_TYPE", "the value is not one of those allowed" if message.startswith("Invalid enum") else message


def _name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
