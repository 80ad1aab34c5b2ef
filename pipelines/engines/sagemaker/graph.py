"""The graph as SageMaker can hold it: a flat list of nodes, each after what it waits for."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from assay.pipelines.ir import cel
from assay.pipelines.ir.model import Component, Container, Task

from .values import Guard, Value, choices_of, tasks_of


@dataclass(frozen=True)
class Leaf:
    """A task that runs a container."""

    path: str
    task: Task
    component: Component
    container: Container
    parameters: dict[str, Value]
    artifacts: dict[str, Value]
    after: tuple[str, ...]
    """Paths of the leaves it waits for beside those that its inputs come from."""
    guard: Guard

    @property
    def inputs(self) -> Iterator[Value]:
        """Every value it reads."""
        yield from self.parameters.values()
        yield from self.artifacts.values()


@dataclass(frozen=True)
class Case:
    """A branch: what must hold, and the values that it reads; `expression` is None for whatever is left."""

    label: str
    expression: cel.Node | None
    given: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A condition: the first case that holds is taken; none may hold."""

    path: str
    cases: tuple[Case, ...]
    after: tuple[str, ...]
    guard: Guard

    @property
    def inputs(self) -> Iterator[Value]:
        """Every value that its cases read."""
        for case in self.cases:
            yield from case.given.values()


@dataclass(frozen=True)
class Loop:
    """A loop over a list that only the run knows."""

    path: str
    items: Value
    limit: int
    body: tuple[Leaf, ...]
    after: tuple[str, ...]
    guard: Guard

    @property
    def inputs(self) -> Iterator[Value]:
        """Every value that it reads from outside."""
        inner = {leaf.path for leaf in self.body}
        yield self.items
        for leaf in self.body:
            yield from (value for value in leaf.inputs if not inner & {*tasks_of(value)})


Node = Leaf | Choice | Loop


def deps(node: Node) -> Iterator[str]:
    """Yield the paths of all nodes that a node waits for, choices included."""
    yield from node.after
    yield from (choice for choice, _ in node.guard)
    for value in node.inputs:
        yield from tasks_of(value)
        yield from choices_of(value)
