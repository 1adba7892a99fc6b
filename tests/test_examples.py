"""The examples run in their short form, `--smoke`, and draw what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NEEDS = {
    "bert_topics": ["transformers", "optax", "scipy", "rich", "matplotlib"],
    "custom_operator": ["rich", "matplotlib"],
    "equinox_digits": ["equinox", "sklearn", "rich", "matplotlib"],
    "feature_extractor": ["flax", "sklearn", "rich", "matplotlib"],
    "force_field": ["rich", "matplotlib"],
    "gpt_on_jax": ["transformers"],
    "jax_in_pytorch": [],
    "numpyro_nuts": ["numpyro", "sklearn", "rich", "matplotlib"],
    "ode_layer": ["diffrax"],
    "physics_informed": ["optax", "rich", "matplotlib"],
    "resnet_features": ["sklearn", "rich", "matplotlib"],
    "specifications": ["rich"],
    "train_digits": ["optax", "sklearn", "rich", "matplotlib"],
}
"""What an example imports beside jax and torch."""

PRINTS = {
    "jax_in_pytorch": ["ms an update"],
    "ode_layer": ["error of the rates"],
    "train_digits": ["Test accuracy", "native PyTorch"],
}
SUFFIXES = {
    "equinox_digits": ".eqx",
    "gpt_on_jax": None,
    "jax_in_pytorch": None,
    "ode_layer": None,
    "specifications": None,
}
"""Of what an example writes; the others draw a picture."""

NOT_RUN = 77
"""The exit status of an example that lacks a tool, and says so."""


def run(*command: str, cwd: Path) -> str:
    """Run an example; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *command],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "XLA_FLAGS": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if done.returncode == NOT_RUN:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    return done.stdout


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
    script = str(ROOT / "examples" / f"{name}.py")
    options = ["--output", str(output)] if suffix else []
    printed = run(script, "--smoke", *options, cwd=tmp_path)
    for text in PRINTS.get(name, []):
        assert text in printed
    if suffix:
        assert suffix != ".png" or output.read_bytes().startswith(b"\x89PNG")
        assert output.stat().st_size > 10_000
