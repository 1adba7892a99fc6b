"""The house: which folder may import which, and what stands in one place alone.

Imports inside functions and by ``importlib`` count: ``tools/import_graph.py`` reads the sources.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import torch2jax as package

PACKAGE = Path(package.__file__).parent
NAME = package.__name__

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import import_graph  # noqa: E402

FILES = import_graph.modules(PACKAGE)
SOURCES = sorted(FILES.values())

STACK = [
    # Each line imports only what stands on lines above it, and itself.
    {"_errors", "_html", "_progress"},
    {"_plots"},
    {"_compat", "_conversions.narrowed"},
    {"_refusals"},
    {"_conversions", "_bridge.torch_side"},
    {"_bridge.handler"},
    {"_bridge.compiled"},
    {"_bridge.jax_side"},
    {"_bridge.calls"},
    {"_bridge.wrapping", "_jax2torch"},
    {"lowerings"},
    {"device.thread_state", "device.random_streams"},
    {"device.tensors"},
    {"device.operators"},
    {"device.setup"},
    {"device.tracing"},
    {"device.jit"},
    {"device.interop"},
    {"device.sharding", "device.scan", "device.checkpoints", "device.exported"},
    {"device.extract"},
    {"device"},
    {"_lower"},
    {"_torch2jax"},
    {"_from_module"},
    {"flax", "equinox", "torchax"},
    {""},
    {"_doctor"},
    {"__main__"},
]
"""The rooms of the package, from the ground up."""

TORCH_ALONE = {"_bridge.torch_side", "_compat.torch", "_conversions.narrowed"}
JAX_ALONE = {"_bridge.jax_side", "_compat.jax"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def floor(module: str) -> int:
    """The line of the stack on which a module stands; folders hold what is below them."""
    found = [
        (len(room), i)
        for i, rooms in enumerate(STACK)
        for room in rooms
        if (inside(module, room) if room else module == "")
    ]
    assert found, f"{module} has no place in the stack: give it one."
    return max(found)[1]


def imports(path: Path) -> list[str]:
    return list(import_graph.imported(path, PACKAGE))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


# --- circles and directions ----------------------------------------------------------------------


def test_no_file_imports_itself_in_a_circle() -> None:
    assert import_graph.circles(PACKAGE) == []


def test_each_room_imports_only_those_below_it() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in import_graph.graph(PACKAGE).items()
        for other in others
        if module not in _PACKAGES and other not in _PACKAGES and floor(other) > floor(module)
    ]
    assert upwards == []


_PACKAGES = {"_bridge"}
"""Folders that only hold rooms: their own file imports nothing."""


def test_rooms_on_one_floor_do_not_know_each_other() -> None:
    def room(module: str) -> str:
        return max((r for r in STACK[floor(module)] if inside(module, r)), key=len, default="")

    sideways = [
        f"{module} imports {other}"
        for module, others in import_graph.graph(PACKAGE).items()
        for other in others
        if module not in _PACKAGES and other not in _PACKAGES
        if floor(module) == floor(other) and room(module) != room(other)
    ]
    assert sideways == []


@pytest.mark.parametrize("room", sorted(TORCH_ALONE))
def test_the_torch_side_never_imports_jax(room: str) -> None:
    for module, path in FILES.items():
        if inside(module, room):
            assert not roots(path) & {"jax", "jaxlib", "flax", "equinox"}, module


@pytest.mark.parametrize("room", sorted(JAX_ALONE))
def test_the_jax_side_never_imports_torch(room: str) -> None:
    for module, path in FILES.items():
        if inside(module, room):
            assert "torch" not in roots(path), module


def test_a_broken_direction_is_seen(tmp_path: Path) -> None:
    """The reader of imports sees those in functions, by importlib and in circles."""
    root = tmp_path / NAME
    (root / "low").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "low" / "__init__.py").write_text("")
    (root / "low" / "a.py").write_text("def f():\n    from ..high import g\n    return g\n")
    (root / "high.py").write_text(
        "import importlib\n\ndef g():\n    return importlib.import_module('.low.a', __package__)\n"
    )
    (root / "typed.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .high import g\n"
    )
    graph = import_graph.graph(root)
    assert graph["low.a"] == {"high"}
    assert graph["high"] == {"low.a"}
    assert graph["typed"] == set()
    assert import_graph.circles(root) == [["high", "low.a"]]


# --- one place for each fact ---------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_one_file_touches_private_jax_and_one_the_extension(path: Path) -> None:
    found = imports(path)
    attributes = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    if relative(path) != "_compat/jax.py":
        assert not [n for n in found if n.startswith(("jax._src", "jaxlib"))]
        assert not [a for a in attributes if "jax._src" in a]
    if relative(path) != "_bridge/handler/extension.py":
        assert not [n for n in found if n.startswith(f"{NAME}._ext")]


def test_versions_are_compared_in_one_file() -> None:
    told = re.compile(r"(jax|torch)\.__version__|version_info|jax\.version")
    for path in SOURCES:
        # The doctor prints them.
        if not relative(path).startswith(("_compat/", "_doctor/")):
            assert not told.search(path.read_text()), path


def test_no_file_knows_the_import_name() -> None:
    """Installed under another name, the package must work beside itself: it imports itself relatively."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == NAME for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != NAME, path


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


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_has_one_subject(path: Path) -> None:
    """A file over 400 lines says in its docstring why it is one."""
    text = path.read_text()
    if len(text.splitlines()) > 400:
        assert "one file" in (ast.get_docstring(ast.parse(text)) or ""), relative(path)
