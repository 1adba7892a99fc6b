"""Find every private name of PyTorch and JAX that the package touches, and write them into a page.

    python tools/private_names.py            # write docs/private-names.md
    python tools/private_names.py --check    # fail where the page or the table is not what is used

A name is private where a part of it begins with an underscore, as in ``jax._src.core``. What each
is for stands in src/torch2jax/_compat/private_names.py. Names of PyTorch's operators
(``torch.ops.aten._softmax``) do not count, because operators are what PyTorch exports.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "torch2jax"
TABLES = PACKAGE / "_compat" / "private_names.py"
PAGE = ROOT / "docs" / "private-names.md"
LIBRARIES = {"torch", "jax", "jaxlib"}
PYTHONS_OWN = {"_fields", "_getframe", "_lru_cache_wrapper"}

INTRODUCTION = """\
PyTorch and JAX may change or drop in any release what begins with an underscore. This page lists
all such names that the package touches, and what each is for. `python tools/private_names.py`
writes it, and a test holds it to the sources. `python -m torch2jax` says in one line which of them
the installed versions lack."""

Places = dict[str, list[str]]


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class File:
    """One file of the package, with what its names stand for."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(PACKAGE).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.imported = dict(self._imports())

    def _imports(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for x in node.names:
                    yield (x.asname, x.name) if x.asname else (x.name.partition(".")[0],) * 2
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((x.asname or x.name, f"{node.module}.{x.name}") for x in node.names)
        for node in self.tree.body:  # aten = torch.ops.aten
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                path = ast.unparse(node.value)
                if path.startswith("torch.ops.") and isinstance(node.targets[0], ast.Name):
                    yield node.targets[0].id, path

    def path(self, node: ast.AST) -> str | None:
        """Return what a chain of attributes names, or None where it begins with a value."""
        if isinstance(node, ast.Attribute):
            base = self.path(node.value)
            return base and f"{base}.{node.attr}"
        return self.imported.get(node.id) if isinstance(node, ast.Name) else None

    def defined(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg


def scan() -> tuple[Places, Places]:
    """Return the files that touch each private name, and each private attribute of an object."""
    files = [File(path) for path in sorted(PACKAGE.rglob("*.py")) if path != TABLES]
    ours = {name for file in files for name in file.defined()}
    names: dict[str, set[str]] = defaultdict(set)
    attributes: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for path in _paths(file):
            if path.split(".")[0] in LIBRARIES and any(map(_private, path.split("."))):
                names[path].add(file.name)
        for name, named_as_text in _attributes(file):
            if named_as_text or name not in ours | PYTHONS_OWN:
                attributes[name].add(file.name)
    # A module or class of which a part is named as well says nothing more.
    longest = {x for x in names if not any(y.startswith(f"{x}.") for y in names)}
    return (
        {x: sorted(places) for x, places in sorted(names.items()) if x in longest},
        {x: sorted(places) for x, places in sorted(attributes.items())},
    )


def _paths(file: File) -> Iterator[str]:
    inner = {id(n.value) for n in ast.walk(file.tree) if isinstance(n, ast.Attribute)}
    found = [path for path in file.imported.values() if not path.startswith("torch.ops")]
    imports = (node for node in ast.walk(file.tree) if isinstance(node, ast.Import))
    found += [x.name for node in imports for x in node.names]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            path = file.path(node)
            if path and not path.startswith("torch.ops."):
                found.append(path)
    yield from found


def _attributes(file: File) -> Iterator[tuple[str, bool]]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and _private(node.attr) and file.path(node) is None:
            if not ast.unparse(node).startswith("aten."):
                yield node.attr, False
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                name = ast.Constant(f"{name.values[0].value}*")
            if isinstance(name, ast.Constant) and _private(str(name.value)):
                yield str(name.value), True


def tables() -> Any:
    """Return the module with the tables, which imports nothing of the package."""
    spec = importlib.util.spec_from_file_location("private_names_tables", TABLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences() -> list[str]:
    """Say what is used and stands in no table, and what stands there and is not used."""
    names, attributes = scan()
    told = tables()
    said = []
    for found, table in ((names, {**told.NAMES, **told.SOMETIMES}), (attributes, told.ATTRIBUTES)):
        said += [
            f"{x} is used in {', '.join(found[x])}: say what for" for x in found if x not in table
        ]
        said += [f"{x} is used no more" for x in table if x not in found]
    return said


def page() -> str:
    """Return the text of the page."""
    names, attributes = scan()
    told = tables()
    parts = [
        "# Private names of PyTorch and JAX",
        INTRODUCTION,
    ]
    for title, about, table, places in (
        ("Names that must be there", "", told.NAMES, names),
        ("Names that some versions have", "The code asks for these first.", told.SOMETIMES, names),
        ("Attributes of objects", "", told.ATTRIBUTES, attributes),
    ):
        rows = [f"| `{x}` | {table[x]} | {_files(places[x])} |" for x in sorted(table)]
        parts += [f"## {title}", *([about] if about else [])]
        parts.append("\n".join(["| name | what it is for | where |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _files(places: list[str]) -> str:
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    return ", ".join(f"`{x}`" for x in places[:2]) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where it is not current"
    )
    check = parser.parse_args().check
    wrong = differences()
    if wrong:
        sys.exit("\n".join(wrong))
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/private-names.md is not current: python tools/private_names.py writes it.")


if __name__ == "__main__":
    main()
