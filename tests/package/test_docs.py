"""The pages say what is so: their code runs and prints what they show; so do README and docstrings.

How a page is run: ``helpers/run_page.py``. Blocks marked ``py`` are other packages' code, and are not run.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
from forked import run_script

import torch2jax as package

pytestmark = pytest.mark.skipif(
    package.__name__ != "torch2jax", reason="pages name the package by its own name"
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text("utf-8"))
README = ROOT / "README.md"

NEEDS = {
    "adapters/equinox": ["equinox", "optax"],
    "adapters/feature_extractor": ["flax", "optax"],
    "adapters/flax": ["flax", "optax"],
    "adapters/numpyro": ["numpyro"],
    "adapters/optax": ["optax"],
    "adapters/orbax": ["orbax.checkpoint"],
    "jax2torch": ["flax", "equinox", "optimistix"],
    "migrating/callbacks": ["jax.experimental.buffer_callback"],
    "modules": ["optax", "transformers"],
    "recipes/force_field": ["e3nn"],
    "recipes/lightning": ["flax", "lightning"],
    "recipes/libraries": ["torchdiffeq", "gpytorch", "torch_geometric"],
    "recipes/reward_model": ["transformers", "optax"],
    "recipes/vector_field": ["diffrax", "optax"],
}
"""What a page imports beside jax and torch."""


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def run_page(*options: str, cwd: Path) -> None:
    environment = {"COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    script = ROOT / "tests" / "helpers" / "run_page.py"
    done = run_script(
        script, *options, cwd=cwd, environment=environment, output=cwd / "printed.txt"
    )
    assert done.status == 0, done.printed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page make one program, which prints what the page shows."""
    for library in NEEDS.get(name_of(page), []):
        pytest.importorskip(library, reason="the extra `test` is not installed")
    if "import jax2torch" in page.read_text("utf-8") and not hasattr(package, "jax2torch"):
        pytest.skip("jax2torch is not there yet")
    if jax.__version_info__ < (0, 10):
        pytest.skip("the pages show what jax 0.10 prints")
    run_page(str(page), cwd=tmp_path)


def test_readme_runs(tmp_path: Path) -> None:
    """Each block stands alone: a reader copies one."""
    run_page("--alone", str(README), cwd=tmp_path)


@pytest.mark.parametrize("page", [README, *DOCS.rglob("*.md")], ids=lambda page: page.stem)
def test_blocks_are_closed_and_printed(page: Path) -> None:
    """What is shown as printed stands right after the code that prints it."""
    fences = re.findall(r"^ *```(\w*)", page.read_text("utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    kinds = fences[::2]
    assert set(fences[1::2]) <= {""}, "a block is not closed"
    assert set(kinds) <= {"", "python", "py", "text", "bash"}
    for before, kind in zip(["", *kinds], kinds, strict=False):
        assert kind != "text" or before == "python"


# -- docstrings ------------------------------------------------------------------------------------

LIBRARIES = ("flax", "equinox")


def examples_of(thing: Any, name: str, module: ModuleType) -> list[doctest.DocTest]:
    names = {**vars(module), name.rpartition(".")[2]: thing}
    return [t for t in doctest.DocTestFinder().find(thing, name, module, names) if t.examples]


def public() -> list[str]:
    on_device = [f"device.{name}" for name in package.device.__all__ if name != "Tensor"]
    adapters = ["flax.TorchModule", "equinox.TorchModule", "equinox.trainable"]
    return [*package.__all__, *on_device, *adapters]


def found(name: str) -> tuple[Any, ModuleType]:
    library, _, attribute = name.rpartition(".")
    if library:
        if library in LIBRARIES:
            pytest.importorskip(library, reason="the extra `test` is not installed")
        module = importlib.import_module(f"{package.__name__}.{library}")
        return getattr(module, attribute), module
    thing = getattr(package, name)
    return thing, inspect.getmodule(thing) or package


@pytest.mark.parametrize("name", public())
def test_docstrings(name: str) -> None:
    """Every public function has an example, and every example runs."""
    thing, module = found(name)
    if not callable(thing) or name == "Size":
        return
    assert thing.__doc__
    tests = examples_of(thing, name, module)
    is_data = isinstance(thing, type) and (issubclass(thing, Exception) or name == "TapeInfo")
    assert tests or is_data, f"{name} has no example"
    if name == "tape_info":
        package.clear_tape()
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_reference_is_complete() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    listed = set(re.findall(rf"^::: {package.__name__}\.([\w.]+)$|^`(\w+)` is", text, re.MULTILINE))
    names = {(a or b).removeprefix("device.lower.") for a, b in listed}
    assert names == set(public()) - {"__version__"}


# -- what pages refer to ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_to_files(page: str) -> None:
    """The strict build of the site checks those inside docs/."""
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text("utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_example_is_in_their_table() -> None:
    linked = re.findall(r"\]\((\w+\.py)\)", (ROOT / "examples" / "README.md").read_text("utf-8"))
    assert sorted(linked) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_the_diagram_has_the_names_of_the_code() -> None:
    """Every name in the diagram is that of a class, a package or the primitive."""
    text = (DOCS / "images" / "path.svg").read_text("utf-8")
    (names,) = re.findall(r'<g [^>]*font-family="ui-monospace[^>]*>(.*?)</g>', text, re.DOTALL)
    labels = set(re.findall(r">([^<]+)</text>", names)) - {"XLA", "handler", "rules", "fn"}
    homes = {
        "TorchFunction": "calls.function",
        "Planner": "calls.planning",
        "torch_call_p": "jax_side.primitive",
        "Callee": "torch_side.callee",
        "tape": "torch_side.tape",
    }
    assert labels == set(homes)
    for label, home in homes.items():
        module = importlib.import_module(f"{package.__name__}._bridge.{home}")
        assert home.endswith(f".{label}") or hasattr(module, label)
    (header,) = (ROOT / "cpp").rglob("handler.h")
    assert "Handler" in header.read_text("utf-8")


def test_the_extra_docs_builds_the_site() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extra = " ".join(settings["project"]["optional-dependencies"]["docs"])
    assert "mkdocs-material" in extra
    assert "mkdocstrings" in extra


# -- figures ---------------------------------------------------------------------------------------


def section(page: Path, mark: str) -> str:
    (found,) = re.findall(
        rf"<!-- {mark}: begin -->\n(.*?)<!-- {mark}: end -->", page.read_text("utf-8"), re.DOTALL
    )
    return found


def test_the_figures_of_the_readme_are_those_of_the_page() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pages" / "summary.py")],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    ).stdout
    assert section(README, "summary") == printed


def figures(mark: str) -> dict[str, list[list[float]]]:
    """Return the numbers of the rows of a section of the page with all figures, by row's name."""
    found: dict[str, list[list[float]]] = {}
    for name, cells in re.findall(
        r"^\| ([^|]+?) \|(.*)\|$", section(DOCS / "performance.md", mark), re.M
    ):
        numbers = [float(x.replace(",", "")) for x in re.findall(r"\d[\d.,]*", cells)]
        found.setdefault(name, []).append(numbers)
    return found


def test_figures_that_other_pages_quote() -> None:
    device = {name: rows[0][0] for name, rows in figures("device").items() if rows[0]}
    page = " ".join((DOCS / "migrating" / "torchax.md").read_text("utf-8").split())
    quoted = re.search(
        r"`x \+ x` takes (\d+) µs here and (\d+) there, and `x\[0\].add_\(1\)` takes (\d+) here and (\d+)",
        page,
    )
    assert quoted
    whats = ("x + x", "x[0].add_(1)")
    names = [f"{who}, {what}" for what in whats for who in ("device jax", "torchax")]
    assert [int(x) for x in quoted.groups()] == [round(device[name]) for name in names]

    page = (DOCS / "pytorch_on_jax.md").read_text("utf-8")
    adds = [int(x) for x in re.findall(r"\| (\d+) µs \|", page)]
    ways = ["torch2jax, a + a", "torch2jax(lower=True) under jax.jit, a + a", "device jax, x + x"]
    assert adds == [round(device[way]) for way in [*ways, "jax2torch, y + y"]]
    bridge, lowered = (float(x) for x in re.findall(r"µs \| ([\d.]+) x \|", page))
    assert bridge == round(figures("training")["torch2jax, tape"][0][2], 2)
    assert lowered == figures("lowering")["torch2jax, lower=True"][1][2]


def test_every_benchmark_has_its_section() -> None:
    path = ROOT / "benchmarks" / "run.py"
    spec = importlib.util.spec_from_file_location("run", path)
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    sys.modules["run"] = run  # a NamedTuple looks for its module
    spec.loader.exec_module(run)
    del sys.modules["run"]
    for program in run.PROGRAMS:
        assert (path.parent / program.folder / f"{program.name}.py").exists()
        assert section(ROOT / program.page, program.name).strip(), program.name
