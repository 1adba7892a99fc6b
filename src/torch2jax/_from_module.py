"""``apply, variables = from_module(module)`` takes modules as JAX's own libraries do."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch
from jax.tree_util import tree_flatten_with_path
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ._bridge.calls.checks import argument_label
from ._bridge.calls.function import TorchFunction
from ._bridge.torch_side.modules.forward import Forward
from ._bridge.torch_side.modules.replica import Layout
from ._conversions.convert import j2t, own_array
from ._conversions.float64 import admit, narrow_floats
from ._errors import SignatureError
from ._torch2jax import torch2jax

Variables = dict[str, dict[str, Any]]


class Apply:
    """``Apply`` is a module's forward pass as a function of variables; ``from_module`` makes it."""

    def __init__(
        self,
        layout: Layout,
        wrap: Callable[[Any], Any],
        own_keywords: bool,
        options: Any,
        examples: tuple[Any, ...] = (),
    ) -> None:
        self.module = layout.module
        self.layout = layout
        self.__name__ = type(layout.module).__name__
        self._wrap, self._own_keywords, self._options = wrap, own_keywords, options
        self._examples = examples
        self._functions: dict[tuple[bool, bool], TorchFunction] = {}

    def __deepcopy__(self, memo: Any) -> Apply:
        return self  # it is a function: nothing in it changes

    def __repr__(self) -> str:
        return f"from_module({self.__name__}).apply"

    def untraced(self) -> Apply:
        """Return a copy without cached traces, which runs the module when it is called."""
        options = {**self._options, "name": "report"}
        return Apply(self.layout, self._wrap, self._own_keywords, options, self._examples)

    def __call__(
        self,
        variables: Mapping[str, Mapping[str, Any]],
        /,
        *args: Any,
        train: bool = False,
        rng: Any = None,
        kwargs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Any:
        if keywords and self._own_keywords:
            raise SignatureError(
                f"{self.__name__} has keywords of its own that apply has too, so it takes them as "
                f"apply(..., kwargs={{...}}); got {', '.join(keywords)} beside it."
            )
        self._check(variables)
        function = self._function(bool(train), rng is not None)
        own = {**keywords, **(kwargs or {})}
        # The module's own ``rng`` travels inside, past the wrapper's.
        key = {} if rng is None else {"rng": rng}
        plain = {group: dict(variables[group]) for group in _GROUPS}
        if self._own_keywords:
            return function(plain, args, own, **key)
        return function(plain, *args, **own, **key)

    def _check(self, variables: Any) -> None:
        if not isinstance(variables, Mapping) or set(variables) != set(_GROUPS):
            got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
            raise SignatureError(
                f"variables of {self.__name__} must be a dict with the keys {', '.join(_GROUPS)}, "
                f"as from_module returns it; got {got}."
            )
        for group in _GROUPS:
            got, expected = set(variables[group]), set(self.layout.tensors[group])
            if got != expected:
                missing, unknown = sorted(expected - got), sorted(got - expected)
                raise SignatureError(
                    f"variables[{group!r}] of {self.__name__} does not have the module's names: "
                    + "; ".join(
                        f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                        for what, names in (("missing", missing), ("unknown", unknown))
                        if names
                    )
                )

    def _function(self, train: bool, keyed: bool) -> TorchFunction:
        function = self._functions.get((train, keyed))
        if function is None:
            forward = Forward(self.layout, train, self._wrap, keyed)
            given = (self._examples,) if self._own_keywords else self._examples
            forward.examples = _by_label((None, *given))
            forward.values = _by_label((self.layout.tensors,))
            function = torch2jax(forward, stochastic=keyed, **self._options)
            self._functions[train, keyed] = function
        return function


_GROUPS = ("params", "frozen", "buffers")


def _by_label(args: tuple[Any, ...]) -> dict[str, Any]:
    paths, _ = tree_flatten_with_path((args, {}))
    return {argument_label(path): x for path, x in paths}


def from_module(
    module: torch.nn.Module, *example_args: Any, kwargs: bool = False, **options: Any
) -> tuple[Apply, Variables]:
    """Make a pure function of a module and its variables, which are JAX arrays.

    Args:
      module: any ``torch.nn.Module``. It is never changed, and it may be used from several threads:
        a call works on a replica of its structure.
      *example_args: arrays or tensors. A module with lazy parameters is run once with them, on a
        copy. A module that cannot be copied (lazy buffers) is run itself. A module that asks for
        values, with ``.item()`` or ``if x.any()``, runs on theirs where results are inferred for
        arguments of their shapes. Integer tensors of 64 bits say that it takes int64.
      kwargs: True where the module's forward has keywords named ``train``, ``rng`` or ``kwargs``:
        ``apply`` then takes all of the module's keywords as ``apply(..., kwargs={...})``.
      **options: options of ``torch2jax``: ``depth``, ``vmap_method``, ``residuals``, ``name``...

    Returns:
      ``(apply, variables)``. ``variables`` is ``{"params": {name: array}, "frozen": {...},
      "buffers": {...}}`` with the names of ``state_dict()``; "frozen" holds the parameters with
      ``requires_grad=False``, which get no gradient work. Tied weights are one leaf, under the
      first of their names. The arrays are copies; with x64 off 64-bit integers are int32, and
      float64 is float32, with a warning. The module computes in its own dtypes.

      ``apply(variables, *args, train=False, rng=None, **keywords)`` returns the output. With
      ``train=True`` it returns ``(output, new_buffers)``: BatchNorm's statistics move in
      ``new_buffers``, which belong into ``{**variables, "buffers": new_buffers}``. ``rng`` is a JAX
      key for modules that draw random numbers. To draw without a key is an error; to pass one that
      is not needed is not.

    Raises:
      SignatureError: for lazy parameters without examples, clashing keywords, or variables that are
        not the module's.

    Examples:
      >>> import jax, jax.numpy as jnp, torch
      >>> apply, variables = from_module(torch.nn.Linear(3, 2))
      >>> {name: p.shape for name, p in sorted(variables["params"].items())}
      {'bias': (2,), 'weight': (2, 3)}
      >>> apply(variables, jnp.ones((4, 3))).shape
      (4, 2)
      >>> def loss(params, x):
      ...     return apply({**variables, "params": params}, x).sum()
      >>> jax.jit(jax.grad(loss))(variables["params"], jnp.ones((4, 3)))["bias"]
      Array([4., 4.], dtype=float32)
    """
    if not isinstance(module, torch.nn.Module):
        raise SignatureError(
            f"from_module takes a torch.nn.Module, got {type(module).__name__}; functions are for "
            "torch2jax."
        )
    if "stochastic" in options:
        raise SignatureError(
            "from_module takes no stochastic=: a call with rng= draws from that key, one without "
            "does not."
        )
    inner, wrap = _uncompiled(module)
    inner = _initialised(inner, example_args)
    _check_keywords(inner, kwargs)
    layout = Layout(inner)
    for dtype in {t.dtype for tensors in layout.tensors.values() for t in tensors.values()}:
        admit(dtype)
    variables: Variables = {
        group: {
            name: own_array(narrow_floats(t.detach())) for name, t in layout.tensors[group].items()
        }
        for group in _GROUPS
    }
    wrap = _verbatim(wrap) if kwargs else wrap
    return Apply(layout, wrap, kwargs, options, example_args), variables


def to_state_dict(
    variables: Mapping[str, Mapping[str, Any]], module: Apply | torch.nn.Module | None = None
) -> OrderedDict[str, torch.Tensor]:
    """Return variables as a ``state_dict``, for ``module.load_state_dict``.

    Args:
      variables: the variables as ``from_module`` returns them, or as training left them.
      module: the module or its ``apply``. Pass it whenever it is at hand: variables do not know
        their ties. With it tied weights come under all of their names, as ``load_state_dict`` wants
        them, and every tensor in the module's dtype. Without it integer buffers come as int64,
        PyTorch's own.

    Returns:
      Names and CPU tensors, which share no memory with the arrays.

    Raises:
      SignatureError: for anything else than variables, or those of another module.

    Examples:
      >>> import torch
      >>> module = torch.nn.BatchNorm1d(2)
      >>> _, variables = from_module(module)
      >>> module.load_state_dict(to_state_dict(variables, module))
      <All keys matched successfully>
    """
    unknown = [group for group in variables if group not in _GROUPS]
    if unknown:
        raise SignatureError(
            f"to_state_dict takes variables, a dict of the groups {', '.join(_GROUPS)}, and got "
            f"the key {unknown[0]!r}."
        )
    tensors = {
        name: j2t(jax.device_get(x)).clone() for g in variables.values() for name, x in g.items()
    }
    if module is None:
        return OrderedDict(
            (name, t.long() if t.dtype is torch.int32 else t) for name, t in tensors.items()
        )
    layout = module.layout if isinstance(module, Apply) else Layout(_uncompiled(module)[0])
    strange = sorted(tensors.keys() - layout.dtypes.keys())
    if strange:
        names = ", ".join(strange[:5])
        raise SignatureError(f"the module has no {names}: the variables are those of another.")
    state = {name: t.to(layout.dtypes[name]) for name, t in tensors.items()}
    for alias, canonical in layout.aliases.items():
        if canonical in state:
            state[alias] = state[canonical]
    order = [name for name in layout.module.state_dict() if name in state]
    prefix = "_orig_mod." if isinstance(module, torch._dynamo.OptimizedModule) else ""
    return OrderedDict((prefix + name, state[name]) for name in order)


def _verbatim(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``wrap`` for calls that take ``(args, kwargs)``, so that no keyword can clash."""

    def wrapped(replica: Any) -> Any:
        call = wrap(replica)
        return lambda args, own: call(*args, **own)

    return wrapped


def _uncompiled(module: torch.nn.Module) -> tuple[torch.nn.Module, Callable[[Any], Any]]:
    """Return the module inside ``torch.compile``, and a function that compiles a replica alike."""
    inner = getattr(module, "_orig_mod", None)
    if inner is None:
        if getattr(module, "_compiled_call_impl", None) is None:
            return module, lambda replica: replica

        def compile_in_place(replica: Any) -> Any:
            replica.compile()
            return replica

        return module, compile_in_place
    optimized = type(module)
    return inner, lambda replica: optimized(replica, module.dynamo_ctx)


def _initialised(module: torch.nn.Module, examples: tuple[Any, ...]) -> torch.nn.Module:
    """Return the module; one with lazy parameters or buffers has run once, so they have shapes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, t in tensors if isinstance(t, UninitializedTensorMixin)]
    if not lazy:
        return module
    if not examples:
        raise SignatureError(
            f"{type(module).__name__} has lazy parameters without a shape ({lazy[0]}, ...): call "
            "the module once, or give from_module(module, *example_args) what to run it with."
        )
    with contextlib.suppress(ValueError):  # torch refuses to copy lazy buffers
        module = copy.deepcopy(module)
    training = {m: m.training for m in module.modules()}
    with torch.no_grad():
        module.eval()(*(j2t(x) if isinstance(x, jax.Array) else x for x in examples))
    for m, flag in training.items():
        m.training = flag
    return module


def _check_keywords(module: torch.nn.Module, given: bool) -> None:
    own = _keywords(module.forward)
    clash = [name for name in ("train", "rng", "kwargs") if name in own]
    if clash and not given:
        raise SignatureError(
            f"{type(module).__name__}.forward has a keyword of its own named {clash[0]}, which "
            f"apply has too: use from_module(module, kwargs=True) and pass the module's keywords "
            f"as apply(..., kwargs={{{clash[0]!r}: ...}})."
        )


def _keywords(forward: Any) -> set[str]:
    """Return the names of a forward's parameters, without that of ``**keywords``."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except ValueError:  # TorchScript's forward has none
        return {argument.name for argument in forward.schema.arguments}
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
