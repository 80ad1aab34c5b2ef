"""The conditions of `dsl.If`: the part of CEL (Common Expression Language) that kfp writes.

    or      = and { "||" and }
    and     = compare { "&&" compare }
    compare = unary [ ( "==" | "!=" | "<" | "<=" | ">" | ">=" ) unary ]
    unary   = "!" unary | "-" unary | "(" or ")" | ( "int" | "double" | "string" | "bool" ) "(" or ")" | literal | input
    input   = "inputs.parameter_values['" name "']"

What does not parse is an error, and so is a comparison of unlike types: a gate must never be decided by a guess.
kfp writes strings between single quotes and escapes nothing, so a quote ends a string only where something that may
follow a string comes after it, and a backslash is a backslash.

A parsed condition is a tree of the nodes below: `evaluate` computes it here, another engine translates it.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:
      inputs\.parameter_values\['(?P<input>[^']*)'\]
    | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    | '(?P<string>.*?)'(?=\s*(?:$|\)|&&|\|\||==|!=|<|>))
    | (?P<constant>true|false)\b
    | (?P<function>int|double|string|bool)(?=\s*\()
    | (?P<operator>==|!=|>=|<=|>|<|&&|\|\||!|\(|\)|-)
    )""",
    re.VERBOSE | re.DOTALL,
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Literal:
    """A value that stands in the text."""

    value: Any


@dataclass(frozen=True)
class Input:
    """An input of the task, by name."""

    name: str


@dataclass(frozen=True)
class Not:
    """The opposite."""

    term: "Node"


@dataclass(frozen=True)
class Minus:
    """The negative number."""

    term: "Node"


@dataclass(frozen=True)
class Convert:
    """`int(…)`, `double(…)`, `string(…)` or `bool(…)`."""

    function: str
    term: "Node"


@dataclass(frozen=True)
class Compare:
    """`left == right` and its like."""

    sign: str
    left: "Node"
    right: "Node"


@dataclass(frozen=True)
class Every:
    """All terms hold (`&&`)."""

    terms: tuple["Node", ...]


@dataclass(frozen=True)
class Some:
    """One of the terms holds (`||`)."""

    terms: tuple["Node", ...]


Node = Literal | Input | Not | Minus | Convert | Compare | Every | Some


@dataclass(frozen=True)
class Expression:
    """A parsed condition."""

    text: str
    names: frozenset[str]
    """The inputs it reads."""
    tree: Node

    def evaluate(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether the condition holds.

        Raises:
            ValueError: An input is missing, types do not go together, or the value is not a bool.
        """
        return _boolean(_value(self.tree, parameters, self.text), self.text)


def parse(text: str) -> Expression:
    """Parse a condition.

    Raises:
        ValueError: The text is not of the grammar above; the message says where it stops being so.
    """
    return _Parser(text).expression()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.position = 0
        self.names: set[str] = set()

    def expression(self) -> Expression:
        tree = self.disjunction()
        if self.position < len(self.tokens):
            raise self.error("cannot go on")
        return Expression(self.text, frozenset(self.names), tree)

    def error(self, what: str) -> ValueError:
        at = self.tokens[self.position][2] if self.position < len(self.tokens) else len(self.text)
        return ValueError(f"the condition {self.text!r} cannot be parsed: {what} at character {at}")

    def take(self, *operators: str) -> str | None:
        if self.position < len(self.tokens):
            kind, value, _ = self.tokens[self.position]
            if kind == "operator" and value in operators:
                self.position += 1
                return value
        return None

    def disjunction(self) -> Node:
        terms = [self.conjunction()]
        while self.take("||"):
            terms.append(self.conjunction())
        return terms[0] if len(terms) == 1 else Some(tuple(terms))

    def conjunction(self) -> Node:
        terms = [self.comparison()]
        while self.take("&&"):
            terms.append(self.comparison())
        return terms[0] if len(terms) == 1 else Every(tuple(terms))

    def comparison(self) -> Node:
        left = self.unary()
        sign = self.take(*_COMPARE)
        return left if sign is None else Compare(sign, left, self.unary())

    def unary(self) -> Node:
        if self.take("!"):
            return Not(self.unary())
        if self.take("-"):
            return Minus(self.unary())
        if self.take("("):
            return self.closed()
        return self.operand()

    def closed(self) -> Node:
        inner = self.disjunction()
        if not self.take(")"):
            raise self.error("a ) is missing")
        return inner

    def operand(self) -> Node:
        if self.position >= len(self.tokens):
            raise self.error("a value is missing")
        kind, text, _ = self.tokens[self.position]
        if kind == "operator":
            raise self.error(f"{text!r} is not a value")
        self.position += 1
        if kind == "function":
            self.take("(")
            return Convert(text, self.closed())
        if kind == "input":
            self.names.add(text)
            return Input(text)
        return Literal(_literal(kind, text))


def _value(node: Node, parameters: Mapping[str, Any], text: str) -> Any:
    """Return what a node comes to; `text` is the whole condition, for an error."""

    def of(term: Node) -> Any:
        return _value(term, parameters, text)

    match node:
        case Literal(value):
            return value
        case Input(name):
            return _lookup(parameters, name)
        case Not(term):
            return not _boolean(of(term), text)
        case Minus(term):
            return -_number(of(term), text)
        case Convert(function, term):
            return _convert(function, of(term), text)
        case Compare(sign, left, right):
            return _compare(sign, of(left), of(right), text)
        case Every(terms):
            return all(_boolean(of(term), text) for term in terms)
        case Some(terms):
            return any(_boolean(of(term), text) for term in terms)


def _tokens(text: str) -> list[tuple[str, str, int]]:
    found, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"the condition {text!r} cannot be parsed: unknown at character {position}")
        kind = match.lastgroup or ""
        found.append((kind, match[kind], position))
        position = match.end()
    return found


def _literal(kind: str, text: str) -> Any:
    if kind == "number":
        return int(text) if text.isdigit() else float(text)
    return text == "true" if kind == "constant" else text


def _lookup(parameters: Mapping[str, Any], name: str) -> Any:
    if name not in parameters:
        raise ValueError(f"the condition reads {name!r}, which has no value")
    return parameters[name]


def _boolean(value: Any, text: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"the condition {text!r} needs a bool where {value!r} stands")
    return value


def _number(value: Any, text: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the condition {text!r} needs a number where {value!r} stands")
    return value


def _convert(function: str, value: Any, text: str) -> Any:
    try:
        if function == "string":
            return value if isinstance(value, str) else str(value)
        if function == "bool":
            return _boolean(value, text)
        return int(value) if function == "int" else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the condition {text!r} cannot take {function}() of {value!r}") from error


def _compare(sign: str, left: Any, right: Any, text: str) -> bool:
    if _kind(left) != _kind(right):
        raise ValueError(f"the condition {text!r} compares {left!r} with {right!r}")
    return _COMPARE[sign](left, right)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__
