"""The examples run in their short form, `--smoke`, and draw what they promise; so do notebooks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import run_script

ROOT = Path(__file__).resolve().parents[2]

NEEDS = {
    "bert_topics": ["transformers", "optax", "scipy", "rich", "matplotlib"],
    "compiled_dynamics": [],
    "custom_operator": ["rich", "matplotlib"],
    "equinox_digits": ["equinox", "sklearn", "rich", "matplotlib"],
    "feature_extractor": ["flax", "sklearn", "rich", "matplotlib"],
    "force_field": ["rich", "matplotlib"],
    "gpt_on_jax": ["transformers"],
    "jax_in_pytorch": [],
    "llama_sharded": ["transformers"],
    "numpyro_nuts": ["numpyro", "sklearn", "rich", "matplotlib"],
    "ode_layer": ["diffrax"],
    "physics_informed": ["optax", "rich", "matplotlib"],
    "resnet_features": ["sklearn", "rich", "matplotlib"],
    "specifications": ["rich"],
    "stablehlo_without_torch": [],
    "train_digits": ["optax", "sklearn", "rich", "matplotlib"],
    "vllm_style": ["transformers"],
}
"""What an example imports beside jax and torch."""

PRINTS = {
    "compiled_dynamics": ["steps a second", "energy drifts by 0.0"],
    "jax_in_pytorch": ["ms an update"],
    "llama_sharded": ["(8, 64) on each of 8 devices", "those of one device"],
    "stablehlo_without_torch": ["ran", "the results are PyTorch's"],
    "ode_layer": ["error of the rates"],
    "train_digits": ["Test accuracy", "native PyTorch"],
    "vllm_style": ["of int8", "donated", "those of plain PyTorch"],
}
SUFFIXES = {
    "compiled_dynamics": None,
    "equinox_digits": ".eqx",
    "gpt_on_jax": None,
    "jax_in_pytorch": None,
    "llama_sharded": None,
    "ode_layer": None,
    "specifications": None,
    "stablehlo_without_torch": None,
    "vllm_style": None,
}
"""Of what an example writes; the others draw a picture."""

NOT_RUN = 77
"""The exit status of an example that lacks a tool, and says so."""


def run(script: Path, *options: str, cwd: Path) -> str:
    """Run an example; returns what it printed."""
    environment = {"COLUMNS": "100", "XLA_FLAGS": ""}
    output = cwd / "printed.txt"
    done = run_script(script, *options, cwd=cwd, environment=environment, output=output)
    if done.status == NOT_RUN:
        pytest.skip(done.printed.strip())
    assert done.status == 0, done.printed
    return done.printed


def test_every_example_is_listed() -> None:
    assert {script.stem for script in (ROOT / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_example(name: str, tmp_path: Path) -> None:
    for library in NEEDS[name]:
        pytest.importorskip(
            library, reason="the extra `demo` is not installed", exc_type=ImportError
        )
    suffix = SUFFIXES.get(name, ".png")
    output = tmp_path / f"output{suffix}"
    script = ROOT / "examples" / f"{name}.py"
    options = ["--output", str(output)] if suffix else []
    printed = run(script, "--smoke", *options, cwd=tmp_path)
    for text in PRINTS.get(name, []):
        assert text in printed
    if suffix:
        assert suffix != ".png" or output.read_bytes().startswith(b"\x89PNG")
        assert output.stat().st_size > 10_000


# -- notebooks -------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_notebooks_are_what_their_scripts_and_pages_say(tmp_path: Path) -> None:
    assert len(NOTEBOOKS) == 3
    run(ROOT / "tools" / "notebooks.py", "--check", cwd=tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook(notebook: Path, tmp_path: Path) -> None:
    for library in ["nbclient", "ipykernel", *NEEDS.get(notebook.stem, [])]:
        pytest.importorskip(
            library, reason="the extras `test` and `demo` are not installed", exc_type=ImportError
        )
    import nbclient
    import nbformat

    cells = nbformat.read(notebook, as_version=4)
    options = [cell for cell in cells.cells if cell.source.startswith("options")]
    assert len(options) == (notebook.stem in NEEDS)  # the others are pages
    for cell in options:
        cell.source = 'options = ["--smoke"]'
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(cells, timeout=300, resources=resources).execute()
    if notebook.stem == "quick_start":
        outputs = [cell.outputs for cell in cells.cells if cell.cell_type == "code"]
        printed = ["".join(part.get("text", "") for part in parts) for parts in outputs]
        page = (ROOT / "docs" / "getting-started.md").read_text("utf-8")
        shown = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
        assert [text for text in printed if text] == shown
        return
    (shown,) = cells.cells[-1].outputs
    assert len(shown.data["image/png"]) > 10_000
