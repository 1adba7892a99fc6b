"""``torch.compile(model, backend="torch2jax")``: forward and backward graphs as JAX programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from .._bridge.calls.options import Options
from .._bridge.wrapping import wrapped
from .._conversions.convert import j2t, t2j
from ..device.tensors.tensor import Tensor, wrap
from .function import LoweredFunction

__all__ = ["backend"]


def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
    """The backend that ``torch.compile(..., backend="torch2jax")`` calls, once for each graph.

    Forward and backward graphs become programs of their own, for tensors of any device; tensors are
    shared with JAX where their memory allows, as in ``t2j``.
    """
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=_compiled, bw_compiler=_compiled)(graph, examples)


def _compiled(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    spots = [i for i, x in enumerate(examples) if isinstance(x, torch.Tensor)]
    made = [node.meta.get("val") for node in graph.graph.nodes]
    ours = any(isinstance(x, torch.Tensor) and x.device.type == "jax" for x in made)
    dtypes: list[list[Any]] = []

    def run(tensors: list[Any], numbers: tuple[Any, ...]) -> Any:
        full = list(numbers)
        for i, x in zip(spots, tensors, strict=True):
            full[i] = x
        outs = graph(*full)
        dtypes[:] = [[x.dtype if isinstance(x, torch.Tensor) else None for x in outs]]
        return [x for x in outs if isinstance(x, torch.Tensor)]

    programs: dict[Any, LoweredFunction] = {}

    def call(*args: Any) -> list[Any]:
        numbers = tuple(None if i in spots else x for i, x in enumerate(args))
        tensors = [args[i] for i in spots]
        given = tuple(x.dtype for x in tensors)
        program = programs.get((numbers, given))
        if program is None:
            program = programs[numbers, given] = wrapped(
                LoweredFunction,
                lambda *t: run(list(t), numbers),
                "a graph of torch.compile",
                Options(arg_dtypes=given),
            )
        # XLA reads shared memory later than it returns: results are waited for.
        arrays = [x.jax() if isinstance(x, Tensor) else t2j(x) for x in tensors]
        out = jax.block_until_ready(program(*arrays))
        values = iter(out)
        result: list[Any] = []
        for dtype in dtypes[0]:
            if dtype is None:
                result.append(None)
                continue
            array = next(values)
            result.append(wrap(array, dtype) if ours else j2t(array).to(dtype))
        return result

    return make_boxed_func(call)
