"""``torch.compile(model, backend="torch2jax")`` turns graphs into JAX programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from .._bridge.calls.options import Options
from .._bridge.wrapping import wrapped
from .._conversions.convert import array_beside, j2t
from .._conversions.float64 import admit, narrow_floats
from ..device.tensors.tensor import Tensor, wrap
from .function import LoweredFunction

__all__ = ["backend"]


def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
    """Compile a graph; ``torch.compile(..., backend="torch2jax")`` calls it once for each.

    Forward and backward graphs become programs of their own, for tensors of any device. Tensors are
    shared with JAX where their memory allows, as in ``t2j``.
    """
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=_compiled, bw_compiler=_compiled)(graph, examples)


class _OfTensors:
    """``_OfTensors`` is a graph as a function of its tensors alone, for certain other arguments."""

    def __init__(self, graph: torch.fx.GraphModule, arguments: Sequence[Any]) -> None:
        self._graph, self._arguments = graph, arguments
        self.dtypes: list[torch.dtype | None] = []
        """The dtypes of the graph's results, once it has run; None stands for what is no tensor."""

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the results that are tensors."""
        rest = iter(tensors)
        outs = self._graph(*[next(rest) if x is _TENSOR else x for x in self._arguments])
        self.dtypes = [x.dtype if isinstance(x, torch.Tensor) else None for x in outs]
        return [x for x in outs if isinstance(x, torch.Tensor)]


_TENSOR = object()
"""This stands for a tensor among the arguments of a graph."""


def _compiled(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    spots = {i for i, x in enumerate(examples) if isinstance(x, torch.Tensor)}
    made = [node.meta.get("val") for node in graph.graph.nodes]
    on_jax = any(isinstance(x, torch.Tensor) and x.device.type == "jax" for x in made)
    programs: dict[Any, tuple[LoweredFunction, _OfTensors]] = {}

    def call(*args: Any) -> list[Any]:
        arguments = tuple(_TENSOR if i in spots else x for i, x in enumerate(args))
        tensors = [args[i] for i in sorted(spots)]
        given = tuple(x.dtype for x in tensors)
        if (arguments, given) not in programs:
            fn = _OfTensors(graph, arguments)
            label, options = "a graph of torch.compile", Options(arg_dtypes=given)
            programs[arguments, given] = wrapped(LoweredFunction, fn, label, options), fn
        program, fn = programs[arguments, given]
        for dtype in {x.dtype for x in tensors if not isinstance(x, Tensor)}:
            admit(dtype)
        arrays = [
            x.jax() if isinstance(x, Tensor) else array_beside(narrow_floats(x)) for x in tensors
        ]
        # XLA may read shared memory after the call returns, so the results are awaited.
        results = iter(jax.block_until_ready(program(*arrays)))
        return [None if d is None else as_tensor(next(results), d) for d in fn.dtypes]

    def as_tensor(array: jax.Array, dtype: torch.dtype) -> torch.Tensor:
        return wrap(array, dtype) if on_jax else j2t(array).to(dtype)

    return make_boxed_func(call)
