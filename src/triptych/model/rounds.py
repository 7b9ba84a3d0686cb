"""What a standard pipeline's loop hands from one step to the next, read from its code: whether a checkpoint of the
schedulers and their results holds all of it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline

from triptych.model.declared import DENOISERS

__all__ = ["why_not_resumable"]

_CHANGING = ("append", "extend", "insert", "pop", "update", "add", "remove", "clear")
"""Methods that change what they are called on; so do those that end in an underscore."""

_LOOPS = ast.For | ast.AsyncFor | ast.While


def why_not_resumable(kind: type[DiffusionPipeline]) -> str | None:
    """Why this pipeline's loop cannot be taken up in the middle; None if it can: there is one loop of steps, the
    denoiser is called nowhere else, and whatever goes from a step to the next comes from a scheduler."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__))))
    except (OSError, SyntaxError, TypeError):
        return "its code cannot be read"
    loops = [node for node in _outermost(tree) if _steps(node)]
    if len(loops) != 1 or not isinstance(loops[0], ast.For):
        return f"{len(loops)} loops of steps in its call"
    loop = loops[0]
    if any(isinstance(node, _LOOPS) and _steps(node) for part in loop.body for node in ast.walk(part)):
        return "a loop of loops"
    parts = {f"self.{name}" for name in inspect.signature(kind.__init__).parameters if "scheduler" not in name}
    denoisers = {name for name in parts if name.startswith(tuple(f"self.{prefix}" for prefix in DENOISERS))}
    inside = set(map(id, ast.walk(loop)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in inside]
    if any(_key(call.func) in denoisers for call in calls):
        return "its denoiser is called outside of the loop"
    flow = _Flow()
    flow.run(loop.body, set(_stored([loop.target])))
    tainted = flow.tainted(parts)
    carried = sorted(flow.exposed & flow.sources.keys() & tainted)
    return f"{', '.join(carried)} from one step to the next" if carried else None


def _outermost(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _LOOPS):
            yield child
        else:
            yield from _outermost(child)


def _steps(node: ast.AST) -> bool:
    """Whether a scheduler's step is called in it."""
    return any(
        isinstance(part, ast.Call)
        and isinstance(part.func, ast.Attribute)
        and part.func.attr == "step"
        and "scheduler" in ast.unparse(part.func.value)
        for part in ast.walk(node)
    )


def _key(node: ast.AST) -> str | None:
    """A local variable or an attribute of the pipeline, by name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return f"self.{node.attr}"
    return None


def _reads(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        key = _key(part)
        if key is not None and isinstance(getattr(part, "ctx", None), ast.Load):
            yield key


def _stored(targets: Iterable[ast.AST]) -> Iterator[str]:
    """The names that an assignment sets whole."""
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            yield from _stored(target.elts)
        elif isinstance(target, ast.Starred):
            yield from _stored([target.value])
        elif (key := _key(target)) is not None:
            yield key


def _written_into(node: ast.AST) -> Iterator[str]:
    """The names whose values a statement changes in place, by an index, an attribute or a method."""
    for part in ast.walk(node):
        into: ast.AST | None = None
        if isinstance(part, ast.Subscript | ast.Attribute) and isinstance(part.ctx, ast.Store):
            into = part.value
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            changes = part.func.attr in _CHANGING or (part.func.attr.endswith("_") and part.func.attr[0] != "_")
            into = part.func.value if changes else None
        while isinstance(into, ast.Subscript):
            into = into.value
        if into is not None and (key := _key(into)) not in (None, "self"):
            yield str(key)


def _terms(test: ast.expr) -> frozenset[str]:
    """What all has to hold for a condition."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return frozenset(map(ast.unparse, parts))


@dataclass
class _Flow:
    """One pass through a loop's body: what is read before it is surely set, and what each name is made of."""

    exposed: set[str] = field(default_factory=set)
    sources: dict[str, list[ast.AST]] = field(default_factory=dict)
    under: list[tuple[frozenset[str], set[str]]] = field(default_factory=list)
    """Conditions that nothing in the loop changes, as their terms, and what is surely set where they held."""

    def run(self, body: Iterable[ast.stmt], known: set[str]) -> set[str]:
        """Follows the statements; returns the names that are surely set after them."""
        for statement in body:
            known = self._statement(statement, known)
        return known

    def _statement(self, node: ast.stmt, known: set[str]) -> set[str]:
        if isinstance(node, ast.If):
            return self._branch(node, known)
        if isinstance(node, ast.With):
            for item in node.items:
                self._read(item.context_expr, known)
            return self.run(node.body, known)
        if isinstance(node, ast.For | ast.While):
            self._inner(node, known)
            return known
        self._read(node, known)
        for name in _written_into(node):
            self.sources.setdefault(name, []).append(node)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in _stored(targets):
                self.sources.setdefault(name, []).append(node.value)
                if isinstance(node, ast.AugAssign) and name not in known:
                    self.exposed.add(name)
                known = known | {name}
        return known

    def _branch(self, node: ast.If, known: set[str]) -> set[str]:
        self._read(node.test, known)
        terms = _terms(node.test)
        # Under a condition that held before, what was set then is set.
        earlier = [names for held, names in self.under if held <= terms]
        then = self.run(node.body, known.union(*earlier))
        otherwise = self.run(node.orelse, set(known))
        if set(_reads(node.test)).isdisjoint(self.sources):
            self.under.append((terms, then))
        return then & otherwise

    def _inner(self, node: ast.For | ast.While, known: set[str]) -> None:
        head = node.iter if isinstance(node, ast.For) else node.test
        self._read(head, known)
        inner = set(known)
        if isinstance(node, ast.For):
            for name in _stored([node.target]):
                self.sources.setdefault(name, []).append(head)
                inner.add(name)
        self.run(node.body, inner)

    def _read(self, node: ast.AST, known: set[str]) -> None:
        self.exposed |= set(_reads(node)) - known

    def tainted(self, start: set[str]) -> set[str]:
        """The names that hold anything of what is in `start`, but not what a scheduler made of it."""
        found = set(start)
        while True:
            more = {name for name, made in self.sources.items() if any(_taints(part, found) for part in made)}
            if more <= found:
                return found
            found |= more


def _taints(made: ast.AST, tainted: set[str]) -> bool:
    return not _steps(made) and not tainted.isdisjoint(_reads(made))
