"""Equal layers run as one ``jax.lax.scan``, which is compiled once and not once a layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import jax
import torch

from .._compat.jax import trace_state_clean
from .._errors import SignatureError
from . import random_streams
from .interop import call_jax, call_torch

__all__ = ["scan"]


def scan(
    layers: Iterable[torch.nn.Module], x: Any, *args: Any, checkpoint: bool = False, **kwargs: Any
) -> Any:
    """Run ``for layer in layers: x = layer(x, *args, **kwargs)`` with one layer in the program.

    A compiled program holds, and XLA compiles, one layer instead of all of them. Parameters are
    stacked for the call, which copies them; gradients reach the parameters of each layer.

    Args:
      layers: modules of one structure on device "jax" (an ``nn.ModuleList``), all in the same
        mode, whose parameters and buffers have the same names, shapes and dtypes. Python state of
        the layers is read when the program is made.
      x: a pytree of tensors on device "jax", which the first layer takes. Each layer returns one
        like it.
      *args: what each layer takes besides: pytrees of tensors, and anything else.
      checkpoint: whether only the input of a layer is kept; the backward pass runs it again.
      **kwargs: the same by keyword.

    Returns:
      What the last layer returns. What a layer writes to its buffers (statistics of a batch norm)
      is there after the call.

    Raises:
      SignatureError: layers differ, there is none, or a layer returns something unlike ``x``.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)).to("jax")
    >>> torch2jax.device.scan(layers, torch.ones(2, 4, device="jax")).shape
    torch.Size([2, 4])
    """
    modules = list(layers)
    if not modules:
        raise SignatureError("scan takes at least one layer.")
    first = modules[0]
    facts = _facts(first)
    for i, module in enumerate(modules[1:], 1):
        if _facts(module) != facts:
            raise SignatureError(
                f"layers 0 and {i} of a scan differ: {_difference(facts, _facts(module))}. "
                "They must have the same structure, mode, and parameters of the same shapes."
            )
    tensors = [_tensors(m) for m in modules]
    stacked = {name: torch.stack([t[name] for t in tensors]) for name in tensors[0]}
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=torch.is_tensor)
    operands = [leaf for leaf in leaves if torch.is_tensor(leaf)]
    statics = tuple(None if torch.is_tensor(leaf) else leaf for leaf in leaves)
    autocast = torch.is_autocast_enabled("jax"), torch.get_autocast_dtype("jax")
    key = (len(modules), structure, statics, checkpoint, autocast, tuple(facts.items()))
    program = _programs.setdefault(first, {}).get(key)
    if program is None:
        program = _programs[first][key] = ScanProgram(
            first, len(modules), structure, statics, checkpoint
        )
    # In a trace the layers may close over its tracers, which a program cannot keep.
    run = program.jitted if trace_state_clean() else program.run
    out, new = call_jax(run, x, stacked, operands, random_streams.next_words_if_any())
    with torch.no_grad():
        for name, values in new.items():
            for i, t in enumerate(tensors):
                t[name].copy_(values[i])
    return out


_programs: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()


class ScanProgram:
    """A scan program is the scan for arguments of one kind, as a function of arrays."""

    def __init__(
        self, layer: torch.nn.Module, count: int, structure: Any, statics: Any, checkpoint: bool
    ) -> None:
        self.layer, self.count = weakref.ref(layer), count
        self.structure, self.statics, self.checkpoint = structure, statics, checkpoint
        self.jitted = jax.jit(self.run)

    def run(self, x: Any, stacked: Any, operands: Any, words: Any) -> Any:
        """Return the result, and the new values of buffers by layer."""
        keys = None
        if words is not None:
            keys = jax.random.split(jax.random.wrap_key_data(words), self.count)
            keys = jax.random.key_data(keys)

        def body(carry: Any, row: Any) -> Any:
            weights, key = row
            with random_streams.drawing_from(key, words=True):
                out, new = call_torch(self._layer, carry, weights, operands)
            want = jax.tree.map(lambda a: (a.shape, a.dtype), carry)
            got = jax.tree.map(lambda a: (a.shape, a.dtype), out)
            if want != got:
                raise SignatureError(
                    f"a layer of a scan must return what it takes, {want}; it returns {got}."
                )
            return out, new

        step = jax.checkpoint(body) if self.checkpoint else body
        return jax.lax.scan(step, x, (stacked, keys), length=self.count)

    def _layer(self, carry: Any, weights: Any, operands: Any) -> Any:
        """Run one layer on tensors. Return its result, and the buffers that it has written to."""
        layer = self.layer()
        assert layer is not None
        given = iter(operands)
        leaves = [next(given) if leaf is None else leaf for leaf in self.statics]
        args, kwargs = self.structure.unflatten(leaves)
        buffers = [name for name, _ in layer.named_buffers()]
        before = {name: weights[name]._cell.version for name in buffers}
        out = torch.func.functional_call(layer, weights, (carry, *args), kwargs)
        changed = [name for name in buffers if weights[name]._cell.version != before[name]]
        return out, {name: weights[name].detach() for name in changed}


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _facts(module: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: f"{tuple(x.shape)} {x.dtype}" for name, x in _tensors(module).items()
    }
    for name, part in module.named_modules():
        mode = "train" if part.training else "eval"
        found[f"module {name or 'itself'}"] = f"{type(part).__name__}, {mode}"
    return found


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    for name in {**a, **b}:
        if a.get(name) != b.get(name):
            return f"{name} is {a.get(name, 'not there')} and {b.get(name, 'not there')}"
    return "names"
