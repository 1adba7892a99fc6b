"""Tensors become arrays and arrays tensors, without a copy where the memory allows.

NOTE [When t2j and j2t copy]. Both go through DLPack, which hands over a pointer. `j2t` never copies
a `jax.Array`. `t2j` copies what XLA cannot read in place: strides other than row-major, lazy
conjugation or negation, an address off XLA's alignment, int64 while x64 is off. XLA could take a
dense transposed block as it is, but such an array has a layout of its own: functions compiled ahead
of time refuse it, `jax.jit` compiles once more for it, an FFI call transposes it each time, and
jaxlib 0.7 reads it wrong on CPU without an error. The table for users, row by row as the tests hold
it, is in docs/conversions.md.

NOTE [Where arrays are]. A tensor on a CPU says nothing about where JAX should compute, so its array
is where JAX puts new arrays: on the default device, committed to none. All CPU devices of JAX read
the same memory, so that costs no copy where the default device is a CPU. A tensor on a GPU was put
there, so its array is committed to that GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from .._compat.jax import (
    cpu_device,
    default_device,
    import_capsule,
    uncommitted,
)
from .._errors import Torch2JaxError, UnsupportedDtypeError
from .._refusals import check_may_call_jax
from .dtypes import TO_JAX, carrier_of, dtype_j2t, needs_x64, x64_enabled
from .lifetimes import borrowed, lend
from .narrowed import NARROWED
from .refusals import GPU, check_array, check_device, check_tensor

__all__ = [
    "array_beside",
    "default_array",
    "j2t",
    "needed_cpu",
    "own_array",
    "t2j",
    "tree_j2t",
    "tree_t2j",
]

NDArray: TypeAlias = "np.ndarray[Any, Any]"

_INT32 = torch.iinfo(torch.int32)

_ENABLE_X64 = 'jax.config.update("jax_enable_x64", True)'

# --- tensor to array -----------------------------------------------------------------------------

_ALIGNMENT = 64
"""XLA reads CPU memory in place where it is aligned to so many bytes."""

_GPU_ALIGNMENT = 16
"""A program that XLA compiled for a GPU takes operands that are aligned to so many bytes, and ends
with an error for others: ``kEntryParameterAlignBytes`` in XLA's ``gpu_constants.h``."""


def t2j(tensor: torch.Tensor) -> jax.Array:
    """Make a JAX array of a PyTorch tensor, in the same memory where XLA can read it in place.

    Array and tensor then share that memory, and either keeps it alive. JAX takes arrays for
    immutable: writing into the tensor afterwards changes the array, and what JAX computes from it
    is undefined. Where the tensor is still written to, give `t2j` a clone.

    Args:
        tensor: a dense tensor of any shape and strides on a CPU or GPU that JAX has too; an
            `nn.Parameter` is one. `requires_grad` is no obstacle: the array carries no autograd
            history, as if the tensor were detached.

    Returns:
        An array of the same shape in row-major layout, of the dtype of the same name; while x64 is
        off, int32 for int64. That of a tensor on a GPU is committed to that GPU. That of a tensor
        on a CPU is on JAX's default device and, like one from `jnp.asarray`, committed to none.

        These are copied: a tensor on a CPU where JAX's default device is none; one that is not
        contiguous (transposed, expanded, sliced with a step), one lazily conjugated or negated,
        int64 while x64 is off; memory that is not aligned to 64 bytes on a CPU (most slices that do
        not begin at the first element) or to 16 bytes on a GPU; pinned memory.

    Raises:
        SignatureError: not a tensor, or one without dense memory of its own (sparse, nested, meta,
            fake, inside a `torch.func` transform).
        UnsupportedDtypeError: JAX has no such dtype. While x64 is off also: uint64, float64 and
            complex128, and int64 values on a CPU that do not fit into int32. (On a GPU they wrap,
            because to look at them would be to wait for the device.)
        Torch2JaxError: JAX does not have the device on which the tensor is, or the call is inside a
            `torch2jax` function that runs on several devices at once.

    Examples:
        >>> t = torch.arange(3.)
        >>> a = t2j(t)
        >>> a
        Array([0., 1., 2.], dtype=float32)
        >>> a.unsafe_buffer_pointer() == t.data_ptr()
        True
    """
    check_may_call_jax("t2j")
    tensor = _readable(tensor)
    if not tensor.is_cpu:
        return _on_gpu(tensor)
    device = default_device()
    if device.platform != "cpu":
        return _new(tensor)
    return uncommitted(_array(_aligned(tensor), device, None))


def array_beside(tensor: torch.Tensor) -> jax.Array:
    """Return what `t2j` does, committed to the device on which the tensor is, a CPU too."""
    tensor = _readable(tensor)
    if not tensor.is_cpu:
        return _on_gpu(tensor)
    return _array(_aligned(tensor), needed_cpu("a tensor is"), None)


def needed_cpu(what: str) -> Any:
    """Return JAX's CPU, or raise where JAX has none; ``what`` should be on it."""
    device = cpu_device()
    if device is None:
        raise Torch2JaxError(
            f"{what} on the CPU, and JAX has no such device here: JAX_PLATFORMS leaves it out. Add "
            f'it, as in JAX_PLATFORMS="{GPU},cpu", or move the tensors to the GPU.'
        )
    return device


def own_array(tensor: torch.Tensor) -> jax.Array:
    """Return an array in memory of its own. That of a tensor on a CPU is JAX's, and can be donated.

    It is committed if the tensor is on another GPU than the default one. See NOTE [Where arrays
    are].
    """
    if tensor.is_cpu:
        return _new(_readable(tensor))
    array = t2j(tensor.clone())
    return uncommitted(array) if array.devices() == {default_device()} else array


def default_array(tensor: torch.Tensor) -> jax.Array:
    """Return an array of a tensor that only the array uses, on JAX's default device, uncommitted.

    A tensor that is already there is not copied.
    """
    array = t2j(tensor)
    if tensor.is_cpu:
        return array
    device = default_device()
    return uncommitted(array if array.devices() == {device} else jax.device_put(array, device))


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor with these values in row-major memory, or raise."""
    check_tensor(tensor)
    if tensor.dtype in NARROWED and not x64_enabled():
        tensor = _narrowed(tensor)
    if tensor.requires_grad or type(tensor) is not torch.Tensor:
        tensor = tensor.detach().as_subclass(torch.Tensor)
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    if min(tensor.shape, default=2) < 2:
        # The strides of such sizes are arbitrary, and XLA would read a layout into them.
        tensor = tensor.reshape(-1).view(tensor.shape)
    return tensor


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    # Pinned memory would go to JAX's GPU backend; what comes from the CPU stays on the CPU.
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT or tensor.is_pinned() else tensor


def _on_gpu(tensor: torch.Tensor) -> jax.Array:
    check_device(tensor)
    if tensor.data_ptr() % _GPU_ALIGNMENT:
        tensor = tensor.clone()
    with torch.cuda.device(tensor.device):  # torch exports from the current device only
        array = _bits(tensor, jax.dlpack.from_dlpack)
    lend(tensor)
    return array


def _array(tensor: torch.Tensor, device: Any, stream: int | None) -> jax.Array:
    return _bits(tensor, lambda x: import_capsule(to_dlpack(x), device, stream))


def _bits(tensor: torch.Tensor, imported: Callable[[torch.Tensor], jax.Array]) -> jax.Array:
    """Return the array of a tensor; where DLPack lacks its dtype, by way of its bits."""
    carrier = carrier_of(tensor.dtype)
    if carrier is None:
        return imported(tensor)
    bits = imported(tensor.view(carrier))
    with jax.ensure_compile_time_eval():  # it is an array also while a function is traced
        return jax.lax.bitcast_convert_type(bits, TO_JAX[tensor.dtype])


def _new(tensor: torch.Tensor) -> jax.Array:
    """Return a copy of a tensor on a CPU, as JAX makes one of a NumPy array."""
    with jax.ensure_compile_time_eval():
        return jnp.array(_as_numpy(tensor))


def _as_numpy(tensor: torch.Tensor) -> NDArray:
    dtype = TO_JAX[tensor.dtype]
    if dtype.isbuiltin == 1:
        return tensor.numpy()
    return tensor.view(_SIGNED[dtype.itemsize]).numpy().view(dtype)


_SIGNED = {1: torch.int8, 2: torch.int16}
"""NumPy knows the bits of bfloat16 and float8 as those of such integers."""


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 tensor as int32, checked on a CPU; other 64-bit dtypes are an error."""
    if needs_x64(tensor.dtype):
        raise UnsupportedDtypeError(
            f"t2j got a tensor of {tensor.dtype}, and 64-bit values are switched off in JAX. "
            f"Switch them on, {_ENABLE_X64}, or convert the tensor first: "
            f"tensor.to({NARROWED[tensor.dtype]})."
        )
    if tensor.is_cpu and tensor.numel():
        low, high = (int(x) for x in tensor.detach().aminmax())
        if low < _INT32.min or high > _INT32.max:
            raise UnsupportedDtypeError(
                f"t2j got a tensor of torch.int64 with values from {low} to {high}: they do not "
                f"fit into int32, and 64-bit values are switched off in JAX. "
                f"Switch them on: {_ENABLE_X64}."
            )
    return tensor.to(torch.int32, memory_format=torch.contiguous_format)


# --- array to tensor -----------------------------------------------------------------------------


def j2t(array: jax.Array | NDArray) -> torch.Tensor:
    """Make a PyTorch tensor of a JAX array, in the same memory.

    The tensor keeps the memory alive, also when the array is deleted or donated. It must not be
    written to: JAX takes arrays for immutable, so an in-place operation on the tensor changes the
    array, and what JAX computes from it is undefined. Write to `j2t(array).clone()`.

    Args:
        array: an array of any shape on one device (CPU or GPU), or a NumPy array of any strides.

    Returns:
        A tensor of the same shape, of the dtype of the same name, on the device on which the array
        is, with `requires_grad=False`. A `jax.Array` is not copied: the tensor has its layout, and
        on a CPU the call waits until the array is computed. (Where the installed torch or JAX lacks
        float8 in DLPack, float8 is copied, here and in `t2j`.) A NumPy array is copied to a
        contiguous tensor on the CPU and keeps its dtype, float64 too, whatever `jax_enable_x64`
        says.

    Raises:
        SignatureError: not an array; a tracer (inside `jax.jit`, `jax.grad`, `jax.vmap`); an array
            over several devices.
        UnsupportedDtypeError: PyTorch has no such dtype (`int4`, random keys, `float0`).
        Torch2JaxError: the array is deleted or donated, or PyTorch does not have its device.

    Examples:
        >>> import jax.numpy as jnp
        >>> a = jnp.arange(3.)
        >>> t = j2t(a)
        >>> t
        tensor([0., 1., 2.])
        >>> t.data_ptr() == a.unsafe_buffer_pointer()
        True
    """
    if isinstance(array, np.ndarray):
        return _from_numpy(array)
    check_array(array)
    dtype = dtype_j2t(array.dtype)
    carrier = carrier_of(dtype)
    if carrier is None:
        return _tensor(array)
    with jax.ensure_compile_time_eval():
        bits = jax.lax.bitcast_convert_type(array, TO_JAX[carrier])
    return _tensor(bits).view(dtype)


def _tensor(array: jax.Array) -> torch.Tensor:
    (device,) = array.sharding.device_set
    return torch.from_dlpack(array) if device.platform == "cpu" else borrowed(array)


def _from_numpy(array: NDArray) -> torch.Tensor:
    dtype = dtype_j2t(array.dtype)
    native = np.array(array, dtype=TO_JAX[dtype], order="C", copy=True)
    if native.dtype.isbuiltin == 1:
        return torch.from_numpy(native)
    # It is bfloat16 or float8.
    return torch.from_numpy(native.view(f"i{native.itemsize}")).view(dtype)


# --- trees ---------------------------------------------------------------------------------------


def tree_t2j(tree: Any) -> Any:
    """Make a JAX array of every tensor in a tree, by `t2j`.

    Args:
        tree: any JAX pytree; a module's `state_dict()` is one. Leaves that are not tensors
            (numbers, strings, NumPy and JAX arrays, objects that JAX does not know) pass unchanged,
            as does None.

    Returns:
        The same structure with arrays for tensors. They share memory as `t2j` says; a tensor that
        occurs twice gives two arrays.

    Raises:
        Torch2JaxError: what `t2j` raises, with the path of the leaf in front.

    Examples:
        >>> tree_t2j({"lr": 0.1, "w": torch.ones(2)})
        {'lr': 0.1, 'w': Array([1., 1.], dtype=float32)}
    """
    return _convert_leaves(t2j, torch.Tensor, tree)


def tree_j2t(tree: Any) -> Any:
    """Make a PyTorch tensor of every array in a tree, by `j2t`.

    Args:
        tree: any JAX pytree. Leaves that are neither a `jax.Array` nor a `numpy.ndarray` (numbers,
            NumPy scalars, strings, tensors, objects) pass unchanged, as does None.

    Returns:
        The same structure with tensors for arrays. They share memory as `j2t` says.

    Raises:
        Torch2JaxError: what `j2t` raises, with the path of the leaf in front.

    Examples:
        >>> import jax.numpy as jnp
        >>> tree_j2t([jnp.ones(2), "name", None])
        [tensor([1., 1.]), 'name', None]
    """
    return _convert_leaves(j2t, (jax.Array, np.ndarray), tree)


def _convert_leaves(convert: Callable[[Any], Any], kind: type | tuple[type, ...], tree: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    converted: list[Any] = []
    for path, leaf in leaves:
        try:
            converted.append(convert(leaf) if isinstance(leaf, kind) else leaf)
        except Torch2JaxError as error:
            raise type(error)(
                f"{jax.tree_util.keystr(path)}: {error}" if path else str(error)
            ) from None
    return jax.tree_util.tree_unflatten(structure, converted)
