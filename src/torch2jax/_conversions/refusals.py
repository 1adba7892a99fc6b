"""What `t2j` and `j2t` refuse, with the remedies."""

from __future__ import annotations

import jax
import numpy as np
import torch
from jax.core import Tracer

from .._compat.jax import local_device
from .._errors import SignatureError, Torch2JaxError
from .dtypes import dtype_t2j, type_name

GPU = "rocm" if torch.version.hip else "cuda"
"""JAX's name of the platform of the GPUs that PyTorch knows."""


def check_tensor(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        if isinstance(tensor, jax.Array):
            remedy = "It is a JAX array already; j2t goes the other way."
        elif isinstance(tensor, torch.nn.Module):
            remedy = "from_module(module) makes a JAX function and its variables of a module."
        elif isinstance(tensor, torch.dtype):
            remedy = "dtype_t2j converts dtypes."
        elif callable(tensor):
            remedy = "torch2jax(fn) makes a JAX function of a PyTorch function."
        else:
            remedy = (
                "jnp.asarray makes arrays of numbers, lists and NumPy arrays; "
                "tree_t2j takes trees of tensors."
            )
        raise SignatureError(f"t2j takes a torch.Tensor, got {type_name(tensor)}. {remedy}")
    dtype_t2j(tensor.dtype)
    without_memory = _without_memory(tensor)
    if without_memory is not None:
        raise SignatureError(f"t2j got {without_memory}")


def _without_memory(tensor: torch.Tensor) -> str | None:
    """Say what a tensor without dense memory of its own is, and the remedy; None for others."""
    if tensor.is_nested:
        return (
            "a nested tensor, and JAX arrays are dense. Convert it first: "
            "tensor.to_padded_tensor(padding), or tensor.unbind() and tree_t2j."
        )
    if tensor.layout is not torch.strided:
        return (
            f"a tensor of layout {tensor.layout}, and JAX arrays are dense. "
            f"Convert it first: tensor.to_dense()."
        )
    if tensor.is_meta:
        return (
            "a meta tensor, which has a shape and no values. Give it values first, "
            'for example torch.zeros_like(tensor, device="cpu").'
        )
    try:
        if type(tensor) is not torch.Tensor and tensor.untyped_storage().device.type == "meta":
            return (
                "a fake tensor, which has a shape and no values. PyTorch makes them where it "
                "traces (torch.compile, torch.export, shape inference): convert outside of that."
            )
        if tensor.data_ptr() or not tensor.numel():
            return None
    except ValueError:
        return "a parameter that is not initialized. Run its lazy module once first."
    except RuntimeError:
        return (
            "a tensor inside a torch.func transform (vmap, grad, jvp), which holds no values "
            "of its own. Convert outside of the transform; jax2torch calls a JAX function in it."
        )
    return (
        f"a tensor of type {type_name(tensor)} that holds no memory of its own. "
        f"Convert the tensors that it wraps, or a dense copy."
    )


def check_device(tensor: torch.Tensor) -> None:
    if not tensor.is_cuda:  # ROCm's tensors are "cuda" too
        raise SignatureError(
            f"t2j got a tensor on {tensor.device}, and PyTorch and JAX share memory on CPU, CUDA "
            f"and ROCm devices. Move it first: tensor.cpu()."
        )
    if local_device(GPU, tensor.device.index or 0) is None:
        here = jax.local_devices()
        found = ", ".join(sorted({device.platform for device in here}))
        if any(device.platform == "gpu" for device in here):
            found = f"GPU {', '.join(str(device.local_hardware_id) for device in here)}"
        raise Torch2JaxError(
            f"t2j got a tensor on {tensor.device}, and JAX has no such device here, only: {found}. "
            f"Move it first, tensor.cpu(), or install JAX for this GPU."
        )


def check_array(array: object) -> None:
    if not isinstance(array, jax.Array):
        if isinstance(array, torch.Tensor):
            remedy = "It is a tensor already; t2j goes the other way."
        elif isinstance(array, np.dtype | type):
            remedy = "dtype_j2t converts dtypes."
        elif callable(array):
            remedy = "jax2torch(fn) makes a PyTorch function of a JAX function."
        else:
            remedy = (
                "torch.tensor makes tensors of numbers and lists; tree_j2t takes trees of arrays."
            )
        raise SignatureError(
            f"j2t takes a jax.Array or a NumPy array, got {type_name(array)}. {remedy}"
        )
    if isinstance(array, Tracer):
        raise SignatureError(
            f"j2t got a tracer, {array.aval}, which has no values yet: this code runs inside "
            f"jax.jit, jax.grad, jax.vmap or another transform. Call the PyTorch code through "
            f"torch2jax(fn), which works there, or convert outside."
        )
    if array.is_deleted():
        raise Torch2JaxError(
            f"j2t got an array, {array.aval}, that is deleted: it "
            f"was donated to a jitted call (donate_argnums), or delete() "
            f"was called. Use what that call returned, or donate a copy: jnp.copy(array)."
        )
    devices = array.sharding.device_set
    if len(devices) > 1:
        raise SignatureError(
            f"j2t got an array, {array.aval}, over {len(devices)} devices "
            f"({array.sharding}), and a tensor is on one. Gather "
            f"it first, jax.device_put(array, jax.devices()[0]), or convert its shards: "
            f"[shard.data for shard in array.addressable_shards]."
        )
    (device,) = devices
    if not array.is_fully_addressable:
        raise SignatureError(
            f"j2t got an array, {array.aval}, on {device}, which "
            f"belongs to process {device.process_index}, not to this one "
            f"({jax.process_index()}). Convert it there, or bring it here first: "
            f"jax.experimental.multihost_utils.process_allgather(array)."
        )
    if device.platform != "cpu" and not (device.platform == "gpu" and torch.cuda.is_available()):
        raise Torch2JaxError(
            f"j2t got an array, {array.aval}, on {device}, which PyTorch does not reach here. "
            f'Move it first: jax.device_put(array, jax.devices("cpu")[0]).'
        )
