"""docs/reliability.md names the libraries and models that the tests run, and the extras have them."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import programs  # noqa: E402


def test_the_table_is_that_of_the_tests() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    assert programs.read(page) == programs.rows(), (
        "run `python tools/programs.py --output docs/reliability.md`"
    )


def test_every_version_is_a_version() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    for row in programs.rows():
        assert re.search(rf"^\| {row.library} \| \d+\.\d+[\w.+]* \|", page, re.MULTILINE)


def test_what_is_read_of_a_source() -> None:
    found = programs.uses_of(
        "import lib.sub as l\n"
        "from lib import Model, make, Config\n"
        "other = pytest.importorskip('other.part')\n"
        "def f():\n"
        "    import third\n"
        "    return l.Layer(), make(), other.run(), l.constant, l.set_backend('x'), l.LayerConfig()\n"
    )
    assert found == {
        ("lib", ""), ("lib", "Model"), ("lib", "make"), ("lib", "Layer"),
        ("other", ""), ("other", "run"), ("third", ""),
    }  # fmt: skip


def test_the_extras_have_them() -> None:
    """Every library comes with `test` or `demo`; torchvision's wheels pin one PyTorch."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = extras["optional-dependencies"]
    wanted = {
        re.split(r"[\[<>=;]", name)[0].strip().lower().replace("-", "_")
        for extra in ("test", "demo", "flax", "equinox", "orbax", "safetensors", "numpyro")
        for name in optional[extra]
    }
    own = {
        "orbax": "orbax_checkpoint",
        "yaml": "pyyaml",
        "torchcrf": "pytorch_crf",
        "torchpme": "torch_pme",
        "mtst": "mtst_forecasting",
    }
    missing = {
        row.library
        for row in programs.rows()
        if own.get(row.library, row.library.lower()) not in wanted
    }
    assert missing == {"torchvision"}
