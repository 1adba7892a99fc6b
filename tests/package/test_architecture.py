"""Who may import what, and what no file may do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch2jax as package

PACKAGE = Path(package.__file__).parent
NAME = package.__name__
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it."""
    parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


TORCH_SIDE = {
    "_callable",
    "_infer",
    "_keep",
    "_lease",
    "_norms",
    "_programs",
    "_random",
    "_reach",
    "_replica",
    "_saved",
    "_state",
    "_tape",
    "_torch_compat",
}


@pytest.mark.parametrize("name", sorted(TORCH_SIDE))
def test_the_torch_side_never_imports_jax(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert not roots(path) & {"jax", "jaxlib"}
    ours = {n.removeprefix(f"{NAME}.") for n in imports(path) if n.startswith(NAME)}
    assert {n.split(".")[0] for n in ours} <= TORCH_SIDE | {"_errors"}, ours


@pytest.mark.parametrize("path", sorted((PACKAGE / "_rules").glob("*.py")), ids=lambda p: p.name)
def test_the_rules_never_import_torch(path: Path) -> None:
    assert "torch" not in roots(path)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_one_file_touches_private_jax_and_one_the_extension(path: Path) -> None:
    found = list(imports(path))
    attributes = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    if relative(path) != "_compat.py":
        assert not [n for n in found if n.startswith(("jax._src", "jaxlib"))]
        assert not [a for a in attributes if "jax._src" in a]
    if relative(path) != "_ffi.py":
        assert not [n for n in found if n.startswith(f"{NAME}._ext")]


def test_versions_are_compared_in_one_file() -> None:
    for path in SOURCES:
        if relative(path) not in (
            "_compat.py",
            "_torch_compat.py",
            "_doctor.py",
        ):  # which prints them
            assert not re.search(
                r"(jax|torch)\.__version__|version_info|jax\.version", path.read_text()
            ), path


def test_no_file_knows_the_import_name() -> None:
    """Installed under another name, the package must work beside itself: it imports itself relatively."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == NAME for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != NAME, path


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_directions_of_the_layers(path: Path) -> None:
    """User face -> primitive and rules -> ffi, never back."""
    order = [
        {"_primitive", "_ffi"},
        {"_host", "_transfer"},
        {"_rules", "_flat", "_names", "_export"},
        {"_options", "_depth", "_signature", "_shards"},
        {"_plan"},
        {"_function", "_reverse", "_reverse_autograd", "_reverse_compile"},
        {"_wrap", "_jax_module"},
        {"_module"},
        {"flax", "equinox", "_doctor", "__main__"},
        {"lowerings", "device"},
        {"torchax"},
    ]
    layers = {name: i for i, names in enumerate(order, 1) for name in names}
    own = layers.get(relative(path).split("/")[0].removesuffix(".py"), 0)
    if relative(path) == "__init__.py":
        return
    for name in imports(path):
        if name.startswith(f"{NAME}."):
            other = layers.get(name.split(".")[1], 0)
            assert other <= own, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """See docs/security.md."""
    assert not roots(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "torch.load",
            }
