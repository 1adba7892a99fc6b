"""All that differs between versions of torch stands here, and so do its private functions.

This file imports torch, never JAX. It is one file, so that a new version of torch is read beside it
alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._C import _autograd
from torch._C._functorch import (  # type: ignore[attr-defined]
    TransformType,
    get_unwrapped,
    is_batchedtensor,
    is_gradtrackingtensor,
    peek_interpreter_stack,
)
from torch._C._functorch import (
    unwrap_if_dead as _unwrap_if_dead,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.vmap import (
    _add_batch_dim,
    _remove_batch_dim,
    lazy_load_decompositions,
    vmap_increment_nesting,
)
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext as DeviceContext

from .._errors import Torch2JaxError

VERSION: Any = torch.__version__

SHARES_TIES: bool = VERSION >= (2, 14)
"""Whether equal operands of ``fmax``, ``fmin`` and ``clamp`` share the derivative, and a number at
which ``clamp`` cuts takes all of it. Before 2.14 the first operand has it."""

unwrap_if_dead: Any = _unwrap_if_dead
add_batch_dim: Any = _add_batch_dim
remove_batch_dim: Any = _remove_batch_dim


def vmap_level(size: int) -> Any:
    """Return a context in which tensors can have rows that operators do not see; it yields a level.

    Random numbers are the same in all rows.
    """
    lazy_load_decompositions()
    return vmap_increment_nesting(size, "same")


def outside_transforms() -> Any:
    """Return a context outside of all transforms of ``torch.func``; new tensors are plain in it."""
    return temporarily_clear_interpreter_stack()


def numbers(x: torch.Tensor) -> list[int]:
    """Return ``x.tolist()`` of a plain tensor, which torch 2.6 refuses inside of ``torch.func``."""
    try:
        return x.tolist()
    except RuntimeError:
        with outside_transforms():
            return x.tolist()


def exchange_api() -> Any:
    """Return the capsule of torch's DLPack C exchange API, or None before torch 2.10."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


copy_all: Any = torch._foreach_copy_
"""``copy_all(tensors, sources)`` copies each source in one launch for many of a dtype on a GPU."""


def stream_functions() -> list[Any] | None:
    """Return torch's functions for current streams and devices; None without GPU support.

    They are set_stream(id, device, device type), get_stream(device), get_raw_stream(device),
    get_device(), set_device(device) and init(). A stream that is not torch's own has its handle for
    an id.
    """
    names = ("setStream", "getCurrentStream", "getCurrentRawStream", "getDevice", "setDevice")
    functions = [getattr(torch._C, f"_cuda_{name}", None) for name in names]
    return None if None in functions else [*functions, torch.cuda.init]


# --- gradients -----------------------------------------------------------------------------------

python_node: Any = torch._C._FunctionBase
"""A ``torch.autograd.Function`` has a node of this class. In torch 2.6 it lives as long as the
function's result or the node after it, not as long as this object, and a backward pass from it then
crashes."""

_run_backward: Any = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]


def pull_back(
    outputs: Sequence[Any],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Return ``torch.autograd.grad(..., allow_unused=True)`` of tensors or edges.

    It leaves out the checks of shapes: cotangents are known to have the shapes of the outputs.
    """
    return _run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def pull_back_rows(
    outputs: Sequence[Any],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    retain_graph: bool,
) -> list[torch.Tensor | None]:
    """Return the same with ``is_grads_batched=True``: the cotangents have leading rows.

    It leaves out the pytrees, which cost ``torch.autograd.grad`` more than a small backward pass.
    """
    size = cotangents[0].shape[0]
    level = torch._C._vmapmode_increment_nesting()
    try:
        rows = [torch._add_batch_dim(c, 0, level) for c in cotangents]
        grads = pull_back(outputs, inputs, rows, retain_graph)
        return [None if g is None else torch._remove_batch_dim(g, level, size, 0) for g in grads]
    finally:
        torch._C._vmapmode_decrement_nesting()


_stash: Any = torch._C._stash_obj_in_tls  # type: ignore[attr-defined]
_stashed: Any = torch._C._get_obj_in_tls  # type: ignore[attr-defined]
_is_stashed: Any = torch._C._is_key_in_tls  # type: ignore[attr-defined]


class BackwardLocal:
    """A flag of a thread that holds in the backward passes which the thread starts, too.

    PyTorch runs those of GPUs on threads of its own, one for each GPU, and there sets what it calls
    the state of the thread that asked: grad mode, and objects like this one.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def get(self) -> bool:
        return _is_stashed(self._name) and _stashed(self._name)

    def set(self, value: bool) -> None:
        _stash(self._name, value)


differentiated_further = BackwardLocal("torch2jax.differentiated_further")
"""Whether a derivative is taken of the gradients of the backward passes that run."""

_DelayedError: Any = torch._C._functions.DelayedError  # type: ignore[attr-defined]


def _delayed_error(message: bytes, count: int) -> Any:
    """Raise at once what PyTorch raises where a node is reached.

    ``once_differentiable`` makes this node. One who asks for gradients in given leaves never
    reaches it, and gets zeros.
    """
    if differentiated_further.get():
        raise RuntimeError(message.decode())
    return _DelayedError(message, count)


torch._C._functions.DelayedError = _delayed_error  # type: ignore[attr-defined]

# --- jax2torch -----------------------------------------------------------------------------------

transforms_active: Any = torch._C._are_functorch_transforms_active
_vmap_enter: Any = torch._C._vmapmode_increment_nesting
_vmap_leave: Any = torch._C._vmapmode_decrement_nesting
grad_enabled: Any = torch.is_grad_enabled


def eager() -> bool:
    """Return whether no transform is at work here but autograd's own backward pass.

    Then there is none of ``torch.func``, no level of ``torch.autograd.forward_ad``, and not the
    older vmap below.
    """
    _vmap_enter()
    return not (_vmap_leave() or transforms_active() or forward_ad._current_level >= 0)


def forward_ad_active() -> bool:
    """Return whether a level of ``torch.autograd.forward_ad`` is entered."""
    return forward_ad._current_level >= 0


dispatch_modes: Any = torch._C._len_torch_dispatch_stack
"""This returns how many of ``TorchDispatchMode`` are at work: tracers, fake tensors, counters."""


def plain_apply(function: Any) -> Any:
    """Return ``function.apply`` for calls outside of ``torch.func``.

    The public one binds default arguments by ``inspect.signature``, at 8 µs a call.
    """
    base: Any = super(torch.autograd.Function, function)
    return base.apply


module_calls: Any = torch.nn.modules.module
"""A module's call looks here for ``BackwardHook``."""

BackwardHook: Any = torch.utils.hooks.BackwardHook

transformers: Any = torch.nn.modules.transformer
"""Encoders and decoders look here for ``_detect_is_causal_mask``."""


def innermost_is_vmap() -> bool:
    """Return whether the innermost transform of ``torch.func`` at work is ``vmap``."""
    return peek_interpreter_stack().key() == TransformType.Vmap


def asks_for_gradient(x: torch.Tensor) -> bool:
    """Say whether ``x`` requires a gradient at a ``torch.func`` level inside the next ``vmap``."""
    while not is_batchedtensor(x):
        if x.requires_grad:
            return True
        if not is_gradtrackingtensor(x):
            return False
        x = get_unwrapped(x)
    return False


# torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional(vectorize=True) batch by
# an older vmap below autograd. torch.func knows nothing of it.


def legacy_vmap_level() -> int:
    """Return the level of that vmap at work here; 0 says that there is none."""
    _vmap_enter()
    return _vmap_leave()


def is_legacy_batched(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and torch._C._dispatch_keys(x).has(_BATCHED)


_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def in_backward_pass() -> bool:
    """Say whether a backward pass of autograd runs on this thread."""
    return torch._C._current_graph_task_id() >= 0


keeps_graph: Any = _autograd._get_current_graph_task_keep_graph
"""This returns whether the backward pass that runs now leaves the graph for another one."""

_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)


def saving_is_watched() -> bool:
    """Return whether hooks take the tensors that autograd saves; torch before 2.7 does not tell."""
    return _top_hooks is None or _top_hooks(True) is not None


def nonstrict_trace(function: Any) -> Any:
    """Mark ``function``: ``torch.compile`` calls it on placeholders and does not look into it."""
    import torch._dynamo as dynamo

    mark: Any = getattr(dynamo, "nonstrict_trace", dynamo.allow_in_graph)  # torch < 2.7
    return mark(function)


def check_compiles() -> None:
    """Raise where this PyTorch has not all that ``compiled=True`` needs of its compiler."""
    if torch.__version__ < "2.10":
        raise Torch2JaxError(
            f"compiled=True needs PyTorch 2.10 or later; this is {torch.__version__}."
        )


# --- the device jax ----------------------------------------------------------------------------


def set_up_device(name: str, module: Any) -> None:
    """Make a device of Python alone, called ``name``, of PyTorch's device for libraries."""
    try:
        from torch.utils.backend_registration import (
            _setup_privateuseone_for_python_backend as set_up,
        )
    except ImportError:
        raise Torch2JaxError(
            f"the device {name!r}, which lower=True, device.enable() and torch2jax.torchax need, "
            f"needs PyTorch 2.10 or later; this is {torch.__version__}."
        ) from None
    set_up(name, backend_module=module)


AFTER_AUTOGRAD: Any = torch._C._after_autograd_keyset  # type: ignore[attr-defined]
ANY_AUTOGRAD: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)  # type: ignore[attr-defined]
"""The dispatcher has these keys: those below autograd's, and the one of autograd's own kernels for
devices that have none of theirs."""


def uncompiled() -> Callable[[], None]:
    """Let what ``torch.compile`` has made run uncompiled, until the returned function is called."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and it takes a second
        return lambda: None
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def load_forward_mode() -> None:
    """Load what PyTorch's forward mode loads when it is first used, without its warning.

    PyTorch 2.14 compiles derivatives by ``torch.jit.script`` then, and warns that it is deprecated.
    """
    if "torch._decomp.decompositions_for_jvp" not in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
            import torch._decomp.decompositions_for_jvp  # noqa: F401


@contextlib.contextmanager
def refusing_foreign(refuse: Callable[[list[str]], Exception]) -> Iterator[None]:
    """Raise ``refuse(names)`` where AOTInductor meets operators that a library cannot call."""
    from torch._inductor import extern_node_serializer

    def serialize(nodes: Sequence[Any]) -> str:
        raise refuse(sorted({str(node.node.target) for node in nodes}))

    theirs = extern_node_serializer.extern_node_json_serializer
    extern_node_serializer.extern_node_json_serializer = serialize
    try:
        yield
    finally:
        extern_node_serializer.extern_node_json_serializer = theirs


_flag_lock = threading.Lock()
_flags: list[bool] = []


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """In this scope ``torch.compiler.is_compiling()`` is True.

    PyTorch's own code then asks for no values. All threads share the flag.
    """
    with _flag_lock:
        _flags.append(torch.compiler._is_compiling_flag)
        torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        with _flag_lock:
            torch.compiler._is_compiling_flag = _flags.pop()


def foreach_types() -> list[list[Any]]:
    """Return PyTorch's lists of types whose tensors optimizers and clipping take several at a time.

    There is one for each of the two, or one for both.
    """
    import torch.optim.optimizer as optimizers
    from torch.utils import _foreach_utils

    found = [getattr(m, "_foreach_supported_types", None) for m in (_foreach_utils, optimizers)]
    return [types for types in found if types is not None]


def answering_shapes(answer: Callable[[], bool]) -> Any:
    """Return a ``ShapeEnv`` in which ``answer`` answers questions about unknown sizes."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

    class Answering(ShapeEnv):
        def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().evaluate_expr(orig_expr, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                # To sympy a symbol is a number and a truth value at once.
                is_number = isinstance(orig_expr, sympy.Expr)
                if is_number or not isinstance(orig_expr, sympy.logic.boolalg.Boolean):
                    raise  # it asks for the size itself
                return sympy.true if answer() else sympy.false

    return Answering()


# --- process groups ------------------------------------------------------------------------------


def _groups() -> Any:
    return torch._C._distributed_c10d  # type: ignore[attr-defined]


def group_name(boxed: Any) -> str:
    """Return the name of a process group as an operator gets it."""
    return _groups().ProcessGroup.unbox(boxed).group_name


def group_size(boxed: Any) -> int:
    """Return the number of ranks of a process group as an operator gets it."""
    return _groups().ProcessGroup.unbox(boxed).size()


def reduction(boxed: Any) -> str:
    """Return the name of a reduction as an operator gets it, such as "sum"."""
    members: dict[str, Any] = _groups().ReduceOp.RedOpType.__members__
    return next(name for name, x in members.items() if int(x) == boxed.op()).lower()


def finished_work() -> Any:
    """Return the handle of a collective that is done, as an operator returns it."""
    future: Any = torch.futures.Future()
    future.set_result([])
    return _groups()._create_work_from_future(future).boxed()


# --- modes ---------------------------------------------------------------------------------------

push_mode: Any = torch._C._push_on_torch_dispatch_stack
"""Put a ``TorchDispatchMode`` on, in a third of the time that ``with`` takes. Nothing that asks
PyTorch about modes learns of it, and so functions of torch.compile's run as ever."""


def pop_mode(last: Any) -> None:
    """Take the last mode off.

    The caller has it, so that this is not its last reference: PyTorch 2.6 would free it too early.
    """
    torch._C._pop_torch_dispatch_stack(None)
    del last


# --- memory --------------------------------------------------------------------------------------


def owners_of_storage(storage: Any) -> int:
    """Return how many tensors and storages have a storage's memory, this object among them."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def owners_of_tensor(x: torch.Tensor) -> int:
    """Return how many owners PyTorch counts for a tensor; Python, for all its own, is one."""
    return x._use_count()  # type: ignore[attr-defined]
