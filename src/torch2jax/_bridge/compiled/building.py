"""PyTorch compiles graphs ahead of time into shared libraries. This file imports torch, never JAX.

A library takes the operands, the constants and then the results, which it writes: so they land in
XLA's buffers. AOTInductor makes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import map_arg

from ..._compat.torch import VERSION, refusing_foreign
from ..._progress import telling
from .graphs import Graph, NotCompiled, carried, restored, specs_of

Tensor = torch.Tensor


def digest_of(graph: Graph) -> str:
    """Return what the library of a graph is called: a digest of all that decides it."""
    facts = [
        _text_of(graph.module),
        *(f"{s.shape} {s.dtype} {s.device}" for s in (*graph.operands, *graph.results)),
        *(f"{tuple(c.shape)} {c.dtype} {c.device}" for c in graph.constants),
        json.dumps([surroundings(), _OPTIONS], sort_keys=True),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:40]


def surroundings() -> dict[str, Any]:
    """Return what a library was made with and must be used with."""
    return {
        "torch": VERSION,
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "layout": _LAYOUT,
    }


_LAYOUT = 1
"""It counts up when libraries take or give something else than before."""


def _processor() -> str:
    """Return a digest of the instructions that this processor has."""
    flags = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    text = flags or platform.processor()
    return hashlib.sha256(" ".join(sorted(text.split())).encode()).hexdigest()[:16]


def _text_of(module: torch.fx.GraphModule) -> str:
    """Return a graph as text that is the same in each process, with the graphs that it holds."""
    names: dict[Any, str] = {}
    lines = []
    for i, node in enumerate(module.graph.nodes):
        names[node] = f"%{i}"
        args = map_arg((node.args, dict(node.kwargs)), lambda n: _Named(names[n]))  # type: ignore[arg-type,return-value]
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append(f"{names[node]} {node.op} {target} {args}")
        if node.op == "get_attr":  # an operator of higher order, such as torch.cond, has branches
            held = operator.attrgetter(node.target)(module)
            lines.append(_text_of(held) if isinstance(held, torch.fx.GraphModule) else repr(held))
    return "\n".join(lines)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def build(graph: Graph, path: Path, label: str) -> None:
    """Compile a graph into the library ``path``.

    Raises:
      NotCompiled: where there is no C++ compiler, or the graph calls what no library can call.
    """
    from torch._inductor import aot_compile

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotCompiled(
            f"{label} cannot be compiled: there is no C++ compiler {compiler!r}. Install one "
            "(apt-get install g++; on macOS xcode-select --install), or name yours in the variable "
            "CXX of the environment."
        )

    def foreign(names: list[str]) -> NotCompiled:
        return NotCompiled(
            f"{label} cannot be compiled: libraries cannot call {', '.join(names)}. Leave "
            "compiled=True out: the bridge calls every operator."
        )

    module, operands = _writing(graph)
    progress = telling(f"compiling {label} with PyTorch")
    with tempfile.TemporaryDirectory(prefix="torch2jax-") as folder, progress:
        target = os.path.join(folder, "library.so")
        options = {**_OPTIONS, "aot_inductor.output_path": target}
        try:
            with warnings.catch_warnings(), torch.no_grad(), refusing_foreign(foreign):
                warnings.simplefilter("ignore")
                aot_compile(module, tuple(operands), options=options)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, NotCompiled):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise NotCompiled(
                f"{label} cannot be compiled: PyTorch's compiler raised {type(error).__name__}: "
                f"{reason[0]}\nLeave compiled=True out: the bridge runs such functions."
            ) from error
        shutil.move(target, path)


_OPTIONS = {
    # A loop has several threads where each gets so many elements: a team costs microseconds, and
    # far more on a busy machine.
    "cpp.min_chunk_size": 8192,
    "cpp.enable_unsafe_math_opt_flag": False,
    "aot_inductor.enable_line_tables": False,
}


def _writing(graph: Graph) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Return the graph as a module that writes its results into its last operands."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    held, at = specs_of(graph.constants), len(graph.operands)

    def split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        end = at + len(held)
        return tensors[:at], tensors[at:end], tensors[end:]

    def write(*tensors: Tensor) -> tuple[()]:
        operands, constants, places = split(tensors)
        whole = [restored(t, s) for t, s in zip(constants, held, strict=True)]
        results = graph.run([*operands, *whole])
        for place, result in zip(places, results, strict=True):
            place.copy_(result)
        return ()

    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = [
            *(torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in graph.operands),
            *(carried(torch.empty(s.shape, dtype=s.dtype, device=s.device)) for s in held),
            *(torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in graph.results),
        ]
        with torch.no_grad():
            return make_fx(write)(*operands), operands
