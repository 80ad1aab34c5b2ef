"""Which step stands in which list: SageMaker cannot join branches again.

What depends on a condition is copied into each of its branches, and a `dsl.OneOf` there is the output of that branch.
Conditions that share a dependent are nested in each other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir.portability_steps import follows_exit_handler

from . import template
from .expressions import Json, conditions, get, operand
from .graph import Choice, Leaf, Loop, Node, deps
from .names import step_name, unique
from .steps import Step, Writer
from .values import Constant, Item, leaves, settle, tasks_of


@dataclass
class Layout:
    """Puts nodes into lists of steps: what needs no condition first, then one Condition per group."""

    writer: Writer
    nodes: list[Node]
    templates: dict[str, bytes] = field(default_factory=dict)
    taken_names: set[str] = field(default_factory=set)
    ancestors: dict[str, set[str]] = field(default_factory=dict)
    """Names of all steps before a step, by its name."""
    needs: dict[str, frozenset[str]] = field(default_factory=dict)
    """Paths of the choices that a node is inside of or depends on, by its path."""
    labels: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {node.path: node for node in self.nodes if isinstance(node, Choice)}
        for node in self.nodes:
            found: set[str] = set()
            for path in self._deps(node):
                found |= self.needs[path] | ({path} if path in choices else set())
            self.needs[node.path] = frozenset(found)
        for choice in choices.values():
            for number, case in enumerate(choice.cases):
                self.labels[choice.path, number] = case.label
            self.labels[choice.path, len(choice.cases)] = "otherwise"

    def _deps(self, node: Node) -> Iterable[str]:
        if self._runs_anyway(node):  # whatever became of the branches: it need not be in one of them
            return deps(replace(node, after=()))
        return deps(node)

    def _runs_anyway(self, node: Node) -> bool:
        flag = self.writer.deploy.features.run_conditions
        return flag and isinstance(node, Leaf) and not node.task.needs_success

    def lay(self, nodes: list[Node], taken: dict[str, int], visible: Mapping[str, str]) -> tuple[list[Json], set[str]]:
        """Return the steps of nodes, and the names of steps outside of this list that they wait for.

        Args:
            nodes: In an order in which they can run.
            taken: The branches that the list is in: number of the case by path of the choice.
            visible: Names of the steps outside, by path.
        """
        here = {node.path for node in nodes if isinstance(node, Choice)}
        names = dict(visible)
        steps: list[Json] = []
        local: set[str] = set()
        outside: set[str] = set()
        for node in nodes:
            if isinstance(node, Choice) or self.needs[node.path] & here:
                continue
            step = self._step(node, taken, names)
            if step:
                names[node.path] = step.body["Name"]
                outside |= self._place(step, local, steps)
        for group in self._groups(nodes, here):
            outside |= self._place(self._condition(group, here, taken, names), local, steps)
        return steps, outside

    def _place(self, step: Step, local: set[str], steps: list[Json]) -> set[str]:
        """Add a step to its list with the dependencies that it must name; return those that lie outside."""
        before = step.implied | step.needed
        told = {name for name in step.needed if not any(name in self.ancestors[other] for other in before)}
        name = step.body["Name"]
        self.ancestors[name] = set(before).union(*(self.ancestors[other] for other in before))
        inside = sorted(told & local)
        if inside and "DependsOn" not in step.body:
            step.body["DependsOn"] = inside
        local.add(name)
        steps.append(step.body)
        return told - local

    # ---- steps

    def _name(self, node: Node, taken: Mapping[str, int], *more: str) -> str:
        own = {choice for choice, _ in node.guard}
        labels = [self.labels[choice, case] for choice, case in taken.items() if choice not in own]
        return unique(step_name(node.path, *labels, *more), self.taken_names)

    def _step(self, node: Leaf | Loop, taken: Mapping[str, int], names: Mapping[str, str]) -> Step | None:
        """Return the step of a node, or None where it cannot run: what it reads belongs to another branch."""
        if isinstance(node, Loop):
            return self._loop(node, taken, names)
        anyway = self._runs_anyway(node)
        if follows_exit_handler(node.task) and not anyway:
            return None
        if taken and not self._has_inputs(node, taken, names):
            return None
        step = self.writer.write(node, self._name(node, taken), names, taken)
        if anyway:
            _run_anyway(step, node, names)
        self._keep(step)
        return step

    def _keep(self, step: Step) -> None:
        self.templates[template.digest(step.template)] = step.template

    def _has_inputs(self, node: Leaf, taken: Mapping[str, int], names: Mapping[str, str]) -> bool:
        required = node.component.input_definitions
        for name, value in [*node.parameters.items(), *node.artifacts.items()]:
            spec = required.parameters.get(name) or required.artifacts[name]
            try:
                missing = [task for task in tasks_of(settle(value, taken)) if task not in names]
            except LookupError:
                missing = [name]
            if missing and not spec.is_optional:
                return False
        return True

    def _loop(self, loop: Loop, taken: Mapping[str, int], names: Mapping[str, str]) -> Step:
        if any(isinstance(part, Item) and part.key for value in loop.inputs for part in leaves(value)):
            raise RecipeError(
                "the items of this loop are mappings, which cannot tell the outputs of its rounds apart",
                where=f"root/{loop.path}",
                fix="loop over texts or numbers",
            )
        name = self._name(loop, taken)
        inner = dict(names)
        body: list[Json] = []
        local: set[str] = set()
        outside: set[str] = set()
        for leaf in loop.body:
            step = self.writer.write(leaf, self._name(leaf, taken), inner, taken, get("ForEach.CurrentItem"))
            self._keep(step)
            inner[leaf.path] = step.body["Name"]
            outside |= self._place(step, local, body) | (step.implied - local)
        arguments = {
            "IterableItems": operand(settle(loop.items, taken), names, f"root/{loop.path}"),
            "MaxConcurrency": min(loop.limit or 10, 50),
            "ForEachBody": body,
        }
        needed = {names[path] for path in (*loop.after, *tasks_of(settle(loop.items, taken))) if path in names}
        step_body = {"Name": name, "Type": "ForEach", "Arguments": arguments}
        return Step(step_body, frozenset(), frozenset(needed | outside))

    # ---- conditions

    def _groups(self, nodes: list[Node], here: set[str]) -> list[list[Node]]:
        """Return the nodes that need a condition, together where they share one."""
        groups: list[tuple[set[str], list[Node]]] = []
        for node in nodes:
            keys = set(self.needs[node.path] & here) | ({node.path} if isinstance(node, Choice) else set())
            if not keys:
                continue
            joined = [group for group in groups if group[0] & keys]
            groups = [group for group in groups if not group[0] & keys]
            members = [member for _, several in joined for member in several]
            groups.append((keys.union(*(choices for choices, _ in joined)), [*members, node]))
        order = {node.path: number for number, node in enumerate(nodes)}
        return [sorted(members, key=lambda node: order[node.path]) for _, members in groups]

    def _condition(self, group: list[Node], here: set[str], taken: dict[str, int], names: Mapping[str, str]) -> Step:
        choice = next(node for node in group if isinstance(node, Choice) and not self.needs[node.path] & here)
        rest = [node for node in group if node is not choice]
        outside: set[str] = set()
        (body,) = self._chain(choice, 0, rest, taken, names, outside)
        read = [value for value in choice.inputs if not isinstance(value, Constant)]
        settled = [settle(value, taken) for value in read]
        needed = {names[task] for value in settled for task in tasks_of(value)}
        needed |= {names[path] for path in choice.after if path in names}
        return Step(body, frozenset(), frozenset(needed | outside))

    def _chain(
        self,
        choice: Choice,
        number: int,
        rest: list[Node],
        taken: dict[str, int],
        names: Mapping[str, str],
        outside: set[str],
    ) -> list[Json]:
        """Return the steps of the cases from `number` on."""
        case = choice.cases[number] if number < len(choice.cases) else None
        if case is None or case.expression is None:
            return self._branch(choice, number, rest, taken, names, outside)
        given = {name: settle(value, taken) for name, value in case.given.items()}
        name = self._name(choice, taken, *([case.label] if number else []))
        return [
            {
                "Name": name,
                "Type": "Condition",
                "Arguments": {
                    "Conditions": conditions(case.expression, given, names, f"root/{choice.path}: condition"),
                    "IfSteps": self._branch(choice, number, rest, taken, names, outside),
                    "ElseSteps": self._chain(choice, number + 1, rest, taken, names, outside),
                },
            }
        ]

    def _branch(
        self,
        choice: Choice,
        number: int,
        rest: list[Node],
        taken: dict[str, int],
        names: Mapping[str, str],
        outside: set[str],
    ) -> list[Json]:
        members = [node for node in rest if dict(node.guard).get(choice.path, number) == number]
        steps, further = self.lay(members, {**taken, choice.path: number}, names)
        outside |= further
        return steps


def _run_anyway(step: Step, node: Leaf, names: Mapping[str, str]) -> None:
    """Let a step run after others whether they succeeded or not.

    Raises:
        RecipeError: All of them are inside of conditions, for which nothing can wait.
    """
    before = sorted({names[path] for path in node.after if path in names})
    if not before:
        raise RecipeError(
            "everything it runs after is inside of a condition, and nothing can wait for that",
            where=f"root/{node.path}",
            fix="let a step before the condition be part of the exit handler",
        )
    step.body["DependsOn"] = [{"Step": name, "Trigger": "Any"} for name in before]
    step.body.pop("CacheConfig", None)
