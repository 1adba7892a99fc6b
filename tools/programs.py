"""The libraries and models that the tests run: the table of docs/reliability.md.

    python tools/programs.py --output docs/reliability.md   # with the versions that are installed

What a test imports and names of a library is read from its source, so nothing is run here, and
`tests/package/test_programs.py` can hold the page to it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

SUBJECTS = {"torch2jax", "jax", "torch", "numpy"}
TOOLS = {
    "pytest", "hypothesis", "nbclient", "nbformat", "rich", "ml_dtypes", "flatbuffers",
    "matplotlib", "sklearn", "torchax", "torch_xla2",
}  # fmt: skip
"""They are imported to test with. The last two are the package itself under another name."""
SETTINGS = ("_", "set_", "disable_", "from_")
"""So begin functions that are no programs."""


class Row(NamedTuple):
    library: str
    names: tuple[str, ...]
    """What the tests take of it: modules, models, functions."""
    folders: tuple[str, ...]
    """The folders of tests/ that do so."""


def rows() -> list[Row]:
    """The table's rows, from the sources of the tests."""
    places = (TESTS, ROOT / "tools", ROOT / "examples")
    ours = {path.stem for place in places for path in place.rglob("*.py")}
    names: dict[str, set[str]] = defaultdict(set)
    folders: dict[str, set[str]] = defaultdict(set)
    for tree, where in _programs():
        for library, name in _uses(tree):
            if library in SUBJECTS | TOOLS | ours or library in sys.stdlib_module_names:
                continue
            names[library] |= {name} - {""}
            folders[library] |= where
    return [
        Row(library, tuple(sorted(names[library], key=str.lower)), tuple(sorted(folders[library])))
        for library in sorted(names, key=str.lower)
    ]


def _programs() -> Iterator[tuple[ast.AST, set[str]]]:
    """Everything that the tests run, and the folders that it counts for."""
    users = _users_of_helpers()
    for path in sorted(TESTS.rglob("*.py")):
        where = users.get(path, {path.relative_to(TESTS).parts[0]})
        yield ast.parse(path.read_text("utf-8")), where
    for path in sorted((ROOT / "examples").rglob("*.py")):
        yield ast.parse(path.read_text("utf-8")), {"examples"}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        yield ast.parse("\n".join(blocks)), {"docs"}


def _users_of_helpers() -> dict[Path, set[str]]:
    """For each file of tests/helpers, the folders whose tests import it."""
    helpers = {path.stem: path for path in (TESTS / "helpers").glob("*.py")}
    imports = {
        path: {library for library, _ in _imports(ast.parse(path.read_text("utf-8")))}
        for path in TESTS.rglob("*.py")
    }
    found: dict[Path, set[str]] = {}
    for name, helper in helpers.items():
        names = {name}
        while grown := {n for n, p in helpers.items() if imports[p] & names} - names:
            names |= grown
        found[helper] = {
            path.relative_to(TESTS).parts[0]
            for path, libraries in imports.items()
            if libraries & names and path.parent != helper.parent
        }
    return found


def _imports(tree: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each imported library, with the name in this file and the dotted name that it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                library = alias.name.partition(".")[0]
                whole = (alias.asname, alias.name) if alias.asname else (library, library)
                yield library, whole
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = (alias.asname or alias.name, f"{node.module}.{alias.name}")
                yield node.module.partition(".")[0], whole
        elif isinstance(node, ast.Call) and (dotted := _imported(node)):
            yield dotted.partition(".")[0], (dotted.partition(".")[0], dotted)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            dotted = _imported(node.value)
            for target in node.targets if dotted else ():
                yield dotted.partition(".")[0], (_last(target), dotted)


def _imported(call: ast.Call) -> str:
    """The module that `importorskip` or `import_module` is asked for."""
    first = call.args[0] if call.args else None
    if _last(call.func) in ("importorskip", "import_module") and isinstance(first, ast.Constant):
        return first.value if isinstance(first.value, str) else ""
    return ""


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _uses(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Libraries, and names of theirs that are classes or functions; "" for the import alone."""
    modules: dict[str, str] = {}
    for library, (here, dotted) in _imports(tree):
        yield library, ""
        modules[here] = dotted
        name = dotted.rpartition(".")[2]
        if name[:1].isupper() and not name.endswith("Config"):
            yield library, name
    # Helpers pass a library on: `transformers = hugging_face.transformers`.
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == node.value.attr == "transformers":
                    modules[target.id] = target.id
                    yield target.id, ""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) in called and node.id in modules:
            library, _, name = modules[node.id].partition(".")
            if not name.endswith("Config"):
                yield library, name.rpartition(".")[2]
        chain = _chain(node)
        if len(chain) < 2 or chain[0] not in modules:
            continue
        name, library = chain[-1], modules[chain[0]].partition(".")[0]
        model = name[0].isupper() or (id(node) in called and not name.startswith(SETTINGS))
        if model and not name.endswith("Config"):
            yield library, name
    for name in _models_by_name(tree):
        yield "torchvision", name


def _chain(node: ast.AST) -> list[str]:
    """`["a", "b", "c"]` of `a.b.c`."""
    found: list[str] = []
    while isinstance(node, ast.Attribute):
        found.append(node.attr)
        node = node.value
    return [node.id, *reversed(found)] if isinstance(node, ast.Name) and found else []


def _models_by_name(tree: ast.AST) -> Iterator[str]:
    """The strings in a file's lists of models, where it calls `get_model`."""
    calls = [_last(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if "get_model" not in calls:
        return
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            for element in node.value.elts:
                if isinstance(element, ast.Constant) and isinstance(element.value, str):
                    yield element.value


def uses_of(source: str) -> set[tuple[str, str]]:
    """The libraries of a file, each alone and with each of its names."""
    return set(_uses(ast.parse(source)))


# --- the page ------------------------------------------------------------------------------------


def version_of(library: str) -> str:
    """The installed version; torchvision's is the one that `make test-ops` installs."""
    if library == "torchvision":
        return re.findall(r"torchvision==([\d.]+)", (ROOT / "Makefile").read_text("utf-8"))[0]
    distribution = importlib.metadata.packages_distributions()[library][0]
    return importlib.metadata.version(distribution)


def table(found: list[Row]) -> str:
    lines = ["| library | version | what of it | tests |", "| --- | --- | --- | --- |"]
    for row in found:
        names = ", ".join(row.names)
        folders = ", ".join(row.folders)
        lines.append(f"| {row.library} | {version_of(row.library)} | {names} | {folders} |")
    return "\n".join(lines)


def read(page: str) -> list[Row]:
    """The rows of a page's table, without the versions, which are those of the day."""
    text = page.partition("<!-- programs: begin -->")[2].partition("<!-- programs: end -->")[0]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in text.strip().splitlines()]
    split = lambda cell: tuple(part for part in cell.split(", ") if part)  # noqa: E731
    return [Row(c[0], split(c[2]), split(c[3])) for c in cells[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write into the table of FILE")
    page = parser.parse_args().output
    text = table(rows())
    print(text)
    if page:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from pages.page import write_section

        write_section(page, text, "programs")


if __name__ == "__main__":
    main()
