"""A program becomes one graph of ATen operators. This file imports torch, never JAX.

The graph is what ``make_fx`` records while the program runs on fake tensors, with Inductor's
decompositions. A tensor that is no operand is a constant of the graph.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import map_arg

from ..._compat.torch import compiling
from ..._errors import Torch2JaxError
from ..._progress import telling
from ..torch_side import ambient
from ..torch_side.answers import asked_in, users_line
from ..torch_side.exceptions import clear_frames
from ..torch_side.inference import Spec, fake_tensors
from ..torch_side.preserving import preserved, take_out
from ..torch_side.recorder import Recorder
from .recording import Calls, NotCompiled

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph is a module from operands, then constants, to a tuple of results."""

    module: torch.fx.GraphModule
    operands: tuple[Spec, ...]
    constants: tuple[Tensor, ...]
    results: tuple[Spec, ...]

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """Run it on operands."""
        return self.run((*operands, *self.constants))

    def run(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it on operands and constants, whose strides may be others than recorded."""
        return run_graph(self.module, operands)


@dataclass(frozen=True)
class Surroundings:
    """A program is traced in these surroundings."""

    label: str
    default_dtype: torch.dtype
    roots: tuple[Any, ...]
    rng: int | None
    """The operand that holds the words of a key."""


def trace(run: Callable[..., Any], specs: Sequence[Spec], around: Surroundings) -> Graph:
    """Record what ``run`` does on operands of these specs.

    Raises:
      NotCompiled: where it asks for values, changes a tensor that is no operand, draws without a
        key, or calls what cannot be recorded.
    """
    from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, to_fun
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(*operands: Tensor) -> tuple[Tensor, ...]:
        with FunctionalTensorMode():
            given = tuple(map(to_fun, operands))
            words = None if around.rng is None else given[around.rng]
            with Calls(around.label, words, to_fun, has_data_mutation):
                out = tuple(run(*given))
            return tuple(from_fun(t) for t in out)  # type: ignore[return-value]

    recorder, handled = None, sys.exc_info()[1]
    try:
        with (
            ambient.clean_surroundings(around.default_dtype),
            preserved(around.roots),
            warnings.catch_warnings(),
            fake_tensors(),
            compiling(),
            telling(f"tracing {around.label} for compiled=True"),
        ):
            warnings.simplefilter("ignore")  # torch warns of slow batching rules
            operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
            recorder = Recorder(operands)
            record = make_fx(
                traced,
                decomposition_table=select_decomp_table(),
                _allow_non_fake_inputs=True,
            )
            with recorder.restoring(), recorder, torch.no_grad():
                module = record(*operands)
            constants = _lift_constants(module)
            results = tuple(
                Spec(tuple(t.shape), t.dtype, t.device) for t in map(value_of, results_of(module))
            )
    except Torch2JaxError:
        raise
    except Exception as error:
        clear_frames(error, handled)
        raise _not_compiled(error, around.label) from error
    finally:
        if recorder is not None and (alive := recorder.alive()):
            take_out(alive)
    constants = tuple(c.detach() for c in constants)
    return Graph(_tidied(module), tuple(specs), constants, results)


def _not_compiled(error: Exception, label: str) -> NotCompiled:
    question = asked_in(error)
    if type(error).__name__ == "DynamicOutputShapeException":
        why = f"The shape of what it computes depends on values: {question}"
    elif question is not None:
        why = f"It asks for values, which a compiled graph does not have: {question}"
    else:
        reason = str(error).strip() or type(error).__name__
        why = f"{type(error).__name__}: {reason}"
        if line := users_line(error):
            why += f"\n({line})"
    return NotCompiled(
        f"{label} cannot be compiled. {why}\nLeave compiled=True out: the bridge runs such "
        "functions."
    )


# --- the recorded graph --------------------------------------------------------------------------


def results_of(module: torch.fx.GraphModule) -> Sequence[Any]:
    [output] = module.graph.find_nodes(op="output")
    return output.args[0]


def value_of(node: Any) -> Tensor:
    return node.meta["val"]


def view_base(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node of whose memory this one is a view."""
    while node.op == "call_function":
        view: Any = node.args[0] if node.target is operator.getitem else node
        target = view.target
        schema = target._schema if isinstance(target, torch._ops.OpOverload) else None
        if schema is None or schema.is_mutable or not schema.arguments:
            break
        if schema.arguments[0].alias_info is None or not isinstance(view.args[0], torch.fx.Node):
            break
        node = view.args[0]
    return node


def _lift_constants(module: torch.fx.GraphModule) -> tuple[Tensor, ...]:
    """Make the tensors that the graph holds its last operands, and return them."""
    graph = module.graph
    places = list(graph.find_nodes(op="placeholder"))
    constants: list[Tensor] = []
    known: dict[str, torch.fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = node.target
        value = operator.attrgetter(name)(module)
        if not isinstance(value, Tensor):
            continue
        if name not in known:
            before = places[-1] if places else None
            with (
                graph.inserting_after(before)
                if before
                else graph.inserting_before(next(iter(graph.nodes)))
            ):
                place = graph.placeholder(f"constant_{len(constants)}")
            place.meta["val"] = torch.empty_like(value, device=value.device)
            places.append(place)
            constants.append(value)
            known[name] = place
        node.replace_all_uses_with(known[name])
        graph.erase_node(node)
    for name in known:
        with contextlib.suppress(AttributeError):
            delattr(module, name)
    return tuple(constants)


_NOTHING_DONE = (
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
)


def _tidied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Remove what computes nothing."""
    written = any(
        isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
        for n in module.graph.nodes
    )
    if not written:
        for target in _NOTHING_DONE:
            for node in module.graph.find_nodes(op="call_function", target=target):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _AnyStrides(torch.fx.Interpreter):
    """It runs a graph on tensors whose strides are others than those that were recorded."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _VIEWS:
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def run_graph(module: torch.fx.GraphModule, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a recorded graph on tensors of any strides."""
    return tuple(_AnyStrides(module).run(*operands))


def run_node(node: torch.fx.Node, values: dict[torch.fx.Node, Tensor]) -> Tensor:
    """Return what a node makes of ``values``, by way of the views that lie between."""
    if node not in values:
        base = node.args[0]
        assert isinstance(base, torch.fx.Node)
        run_node(base, values)
        target: Any = torch.ops.aten.reshape.default if node.target in _VIEWS else node.target
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = target(*args, **kwargs)
    return values[node]


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def carried(t: Tensor) -> Tensor:
    """Return a tensor as JAX can carry it with 64-bit types off: those are pairs of int32."""
    if t.element_size() < 8 or t.dtype is torch.complex64:
        return t
    if t.is_complex():
        t = torch.view_as_real(t)
    return t.contiguous().unsqueeze(-1).view(torch.int32)


def restored(t: Tensor, spec: Spec) -> Tensor:
    """Return what ``carried`` carries; ``spec`` says what it was."""
    if t.dtype is spec.dtype:
        return t
    if spec.dtype is torch.complex128:
        return torch.view_as_complex(t.view(torch.float64).squeeze(-1))
    return t.view(spec.dtype).squeeze(-1)


def specs_of(tensors: Iterable[Tensor]) -> tuple[Spec, ...]:
    """Return shapes, dtypes and devices."""
    return tuple(Spec(tuple(t.shape), t.dtype, t.device) for t in tensors)
