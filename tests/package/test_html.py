"""What notebooks show of the reports, and their plots, say what the reports say."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.torch_version import TorchVersion

from torch2jax import clear_tape, lowering_report, tape_info, torch2jax
from torch2jax._bridge.torch_side.tape.table import TapeInfo
from torch2jax._html import bar, bytes_of, table
from torch2jax._lower.report import Report


def parsed(text: str) -> Any:
    """Return the block as a tree, which it is only if every element is closed."""
    return xml.fromstring(text.replace("<br>", "<br/>").replace("&nbsp;", " "))


def widths(text: str) -> list[float]:
    """Return the widths of the parts of the first bar; its last rectangle is the outline."""
    svg = next(parsed(f"<p>{text}</p>").iter("svg"))
    return [float(part.get("width")) for part in svg.iter("rect")][:-1]


@pytest.fixture
def empty_tape() -> Iterator[None]:
    clear_tape()
    yield
    clear_tape()


def test_a_bar_shows_shares() -> None:
    assert widths(bar({"a": 3, "b": 1})) == [360, 120]
    assert widths(bar({"a": 1}, whole=4)) == [120]
    assert widths(bar({"a": 5}, whole=4)) == [480]  # what is over the budget fills it
    assert widths(bar({"a": 0, "b": 0})) == [0, 0]


def test_text_is_no_markup() -> None:
    found = parsed(f"<div>{table(['<b>'], [['x < y & z', 1234]])}{bar({'<i>': 1})}</div>")
    cells = ["".join(x.itertext()) for x in found.iter() if x.tag in ("th", "td")]
    assert cells == ["<b>", "x < y & z", "1,234"]
    assert "<i>" in "".join(found.itertext())


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_bytes(size: int, text: str) -> None:
    assert bytes_of(size) == text


@pytest.mark.usefixtures("empty_tape")
def test_the_tape() -> None:
    f = torch2jax(lambda x: torch.sin(torch.sin(x)).sum())
    jax.vjp(f, jnp.ones(1000))[1](jnp.ones(()))  # the first graph of a function may be refused
    _, pull = jax.vjp(f, jnp.ones(1000))
    info = tape_info()
    found = parsed(info._repr_html_())
    text = "".join(found.itertext())
    assert info.entries == 1
    assert f"{bytes_of(info.bytes)} are kept by 1 graphs" in text
    assert f"{info.hits} backward passes found their graph" in text
    pull(jnp.ones(()))
    after = "".join(parsed(tape_info()._repr_html_()).itertext())
    assert f"{info.hits + 1} backward passes found their graph" in after
    assert "0 B are kept by 0 graphs" in after
    told = TapeInfo(1, 512, 2048, 0, 0, 0, ["<lambda> of mine"])._repr_html_()
    assert widths(told) == [120]
    assert "<lambda> of mine" in "".join(parsed(told).itertext())


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.10"), reason="lower=True needs PyTorch 2.10"
)
def test_the_lowering_report() -> None:
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    net = torch.nn.Sequential(torch.nn.Linear(3, 3), Asks())
    report = lowering_report(net, jnp.ones((2, 3)))
    found = parsed(report._repr_html_())
    rows = [["".join(x.itertext()) for x in row] for row in found.iter("tr")]
    ((name, question, where),) = report.modules
    assert ["1", name, question, where] in rows
    for (op, where), count in report.native.items():
        assert [f"{count:,}", op, "lowered", where] in rows
    total = sum(report.native.values())
    assert f"{total} lowered" in "".join(found.itertext())


# --- plots ----------------------------------------------------------------------------------------


def drawn(axes: Any) -> dict[str, float]:
    """Return the length of each bar with all of its parts, by its label."""
    labels = [x.get_text() for x in axes.get_yticklabels()]
    lengths = dict.fromkeys(labels, 0.0)
    for container in axes.containers:
        for label, part in zip(labels, container, strict=True):
            lengths[label] += part.get_width()
    return lengths


@pytest.fixture
def axes() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def test_the_plot_of_the_tape(axes: Any) -> None:
    assert TapeInfo(3, 1024, None, 5, 2, 1).plot(axes) is axes
    assert drawn(axes) == {
        "found their graph": 5,
        "ran forward again": 2,
        "graphs kept now": 3,
        "graphs dropped": 1,
    }
    assert "1.0 KiB" in axes.get_title()


def test_the_plot_of_the_lowering_report(axes: Any) -> None:
    native = {("aten.mm", "a:1"): 3, ("aten.mm", "a:2"): 4, ("aten.add", "a:3"): 5}
    report = Report(native, {("aten.mm", "a:4"): 1}, {("mine::op", "a:5"): 2})
    assert report.plot(axes) is axes
    assert drawn(axes) == {"aten.mm": 8, "aten.add": 5, "mine::op": 2}
    names = [x.get_text() for x in axes.get_legend().get_texts()]
    assert names == ["lowered", "decomposed", "through the bridge"]


def test_a_plot_makes_its_own_figure() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed").use("agg")
    from matplotlib import pyplot

    report = Report({(f"op{i}", "a:1"): 30 - i for i in range(30)}, {}, {})
    axes = report.plot(most=4)
    assert drawn(axes) == {"op0": 30, "op1": 29, "op2": 28, "op3": 27}
    pyplot.close(axes.figure)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or torch2jax-ffi\[plot\]"):
        TapeInfo().plot()
