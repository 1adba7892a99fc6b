"""The imports between the files of the package, and the circles among them.

Imports inside functions and calls of ``importlib.import_module`` count; what only type checkers
read (``if TYPE_CHECKING:``) does not. The architecture tests hold the directions with it. This
prints the circles:

    PYTHONPATH=tools python -c "import import_graph; print(import_graph.circles() or 'no circles')"
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = next(p.parent for p in Path(__file__).parents[1].glob("src/*/__init__.py"))


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """The package's files by dotted name, relative to the package; "" is the package itself."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node``, but for what stands under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield other
                yield from _statements(other)
        else:
            yield child
            yield from _statements(child)


def imported(path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """Absolute dotted names of what a file imports, anywhere in it."""
    name = package.name
    folder = [name, *path.relative_to(package).parent.parts]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            match node.args:
                case [ast.Constant(value=str(written)), *_]:
                    relative = written.lstrip(".")
                    level = len(written) - len(relative)
                    base = folder[: len(folder) - level + 1] if level else []
                    yield ".".join([*base, relative])


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each file the files of the package that it imports."""
    files = modules(package)
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for full in imported(path, package):
            first, _, rest = full.partition(".")
            if first != package.name:
                continue
            if rest.partition(".")[0] == "_ext":  # the extension
                continue
            while rest not in files:  # a name inside of a module
                rest = rest.rpartition(".")[0]
            targets.add(rest)
        edges[name] = targets - {name}
    return edges


def circles(package: Path = PACKAGE) -> list[list[str]]:
    """The groups of files that import each other in a circle (Tarjan's strong components)."""
    edges = graph(package)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return found
