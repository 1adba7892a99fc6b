"""The private names of PyTorch and JAX that this package touches, each with what it is for.

A release of theirs may drop any of them. ``gone`` says which the installed ones lack. The tables
are written by hand. ``tools/private_names.py`` finds in the sources what has to stand in them, and
writes docs/private-names.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__all__ = ["ATTRIBUTES", "NAMES", "SOMETIMES", "explain", "gone"]

NAMES = {
    # JAX
    "jax._src.array.ArrayImpl": "Is the class of arrays; the check of the public one takes a microsecond.",
    "jax._src.config.default_device.value": "Tells where new arrays go, in this thread.",
    "jax._src.config.default_matmul_precision.get_local": "Tells the precision that decides what is traced.",
    "jax._src.config.enable_x64.value": "Tells whether 64-bit values are on, at each call.",
    "jax._src.core.Primitive": "Is the class of primitives; the public name of it loads pallas.",
    "jax._src.core.ShapedArray": "Describes a result that varies over axes of a mesh.",
    "jax._src.core.Var": "Tells variables of a program from its literals.",
    "jax._src.core.get_cur_mesh_sharding": "Gives the sharding of a new result.",
    "jax._src.core.get_opaque_trace_state": "Tells one trace from another.",
    "jax._src.core.trace_state_clean": "Tells that no transform of JAX is at work.",
    "jax._src.effects.Effect": "Is the class of effects, by which calls keep their order and stay.",
    "jax._src.effects.control_flow_allowed_effects": "Allows our effects in loops and branches.",
    "jax._src.effects.custom_derivatives_allowed_effects": "Allows our effects in custom derivatives.",
    "jax._src.effects.lowerable_effects": "Allows our effects in compiled programs.",
    "jax._src.effects.remat_allowed_effects.add_type": "Allows our calls under jax.checkpoint.",
    "jax._src.interpreters.partial_eval.RecomputeType": "Says that jax.checkpoint computes a value again.",
    "jax._src.interpreters.partial_eval.ensure_enum": "Reads the answer of a policy of jax.checkpoint.",
    "jax._src.interpreters.partial_eval.partial_eval_jaxpr_custom_rules": "Takes the rule for calls under jax.checkpoint.",
    "jax._src.interpreters.partial_eval.dce_rules": "Takes the rule by which unused results are dropped.",
    "jax._src.lib._jax.buffer_to_dlpack_managed_tensor": "Exports an array at the speed of a call.",
    "jax._src.lib._jax.dlpack_managed_tensor_to_buffer": "Imports an array at the speed of a call.",
    # PyTorch: tensors and devices of our own
    "torch.Tensor._make_wrapper_subclass": 'Makes a tensor of device "jax".',
    "torch._C.DisableTorchFunction": "Reads what a tensor is without its own overrides.",
    "torch._C.DispatchKey.AutocastPrivateUse1": 'Says where autocast for device "jax" stands.',
    "torch._C.DispatchKey.AutogradOther": "Says where the autograd of other devices stands.",
    "torch._C.DispatchKey.CompositeExplicitAutograd": "Says which operators PyTorch takes apart.",
    "torch._C.DispatchKeySet": "Is a set of the dispatcher's keys.",
    "torch._C.Generator": "Is the class of generators as operators get them.",
    "torch._C._ExcludeDispatchKeyGuard": "Runs an operator below autocast.",
    "torch._C._after_autograd_keyset": "Runs an operator below autograd.",
    "torch._C._disabled_torch_function_impl": 'Says that tensors of device "jax" override no functions.',
    "torch._C._dispatch_has_kernel_for_dispatch_key": "Says which operators PyTorch takes apart.",
    "torch._C._nn._parse_to": "Reads the arguments of Tensor.to.",
    "torch._decomp.decompositions_for_jvp": "Forward mode loads it; loaded first, it warns of nothing.",
    "torch._decomp.decomposition_table": "Has PyTorch's own ways to take operators apart.",
    "torch._prims": "Registers the operator to which decompositions cast.",
    "torch._ops.HigherOrderOperator": "Is the class of control flow in an exported program.",
    "torch._ops.OpOverload": "Is the class of operators.",
    "torch._ops.OpOverloadPacket": "Is the class of operators of one name.",
    "torch.compiler._is_compiling_flag": "Lets PyTorch's own code ask for no values while it is traced.",
    "torch.nn.Module._apply": "Lets modules move to the device in place.",
    "torch.nn.modules.batchnorm._BatchNorm": "Is the class of layers with running statistics.",
    "torch.nn.modules.batchnorm._NormBase": "Is the class of layers with running statistics.",
    "torch.utils._foreach_utils._get_foreach_kernels_supported_devices": "Lets optimizers take several tensors at a time.",
    # PyTorch: autograd
    "torch._C._FunctionBase": "Is the class of nodes of torch.autograd.Function.",
    "torch._C._autograd._get_current_graph_task_keep_graph": "Tells whether a backward pass keeps its graph.",
    "torch._C._current_graph_task_id": "Tells whether a backward pass runs on this thread.",
    "torch._C._functions.DelayedError": "Refuses second derivatives of once_differentiable functions, which would be zeros.",
    "torch._C._get_obj_in_tls": "Passes a flag on to the threads of a backward pass.",
    "torch._C._is_key_in_tls": "Passes a flag on to the threads of a backward pass.",
    "torch._C._stash_obj_in_tls": "Passes a flag on to the threads of a backward pass.",
    "torch._C._set_grad_enabled": "Turns gradients on and off without a context manager.",
    "torch._C._pop_torch_dispatch_stack": "Takes off the mode by which large results are placed.",
    "torch._C._push_on_torch_dispatch_stack": "Puts on the mode by which large results are placed.",
    "torch._C._storage_Use_Count": "Counts who refers to memory, where a tape or a user may keep it.",
    "torch._neg_view": "Makes an operand that shares memory the way a kept one did.",
    "torch.autograd.Variable._execution_engine.run_backward": "Runs a backward pass without the checks of shapes.",
    "torch.autograd.forward_ad._current_level": "Tells whether PyTorch's forward mode is at work.",
    # PyTorch: torch.func, modes, compilation
    "torch._C._are_functorch_transforms_active": "Tells whether a transform of torch.func is at work.",
    "torch._C._dispatch_keys": "Tells whether a tensor is batched by the older vmap.",
    "torch._C._functorch.TransformType.Vmap": "Tells which transform of torch.func is at work.",
    "torch._C._functorch.get_unwrapped": "Looks at the tensor inside of a transform.",
    "torch._C._functorch.is_batchedtensor": "Tells which transform a tensor belongs to.",
    "torch._C._functorch.is_gradtrackingtensor": "Tells which transform a tensor belongs to.",
    "torch._C._functorch.peek_interpreter_stack": "Tells which transform of torch.func is at work.",
    "torch._C._functorch.unwrap_if_dead": "Takes a tensor out of a transform that is over.",
    "torch._C._is_any_autocast_enabled": "Tells what surrounds a call that runs on another thread.",
    "torch._C._len_torch_dispatch_stack": "Tells how many dispatch modes are at work.",
    "torch._C._len_torch_function_stack": "Tells how many function modes are at work.",
    "torch._C._parse_dispatch_key": "Names the key of the older vmap.",
    "torch._C._vmapmode_decrement_nesting": "Batches a backward pass, and tells whether one is batched.",
    "torch._C._vmapmode_increment_nesting": "Batches a backward pass, and tells whether one is batched.",
    "torch._add_batch_dim": "Batches a backward pass.",
    "torch._remove_batch_dim": "Batches a backward pass.",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": "Leaves all transforms of torch.func for a while.",
    "torch._functorch.vmap._add_batch_dim": "Batches a call without the pytrees of torch.vmap.",
    "torch._functorch.vmap._remove_batch_dim": "Batches a call without the pytrees of torch.vmap.",
    "torch._functorch.vmap.lazy_load_decompositions": "Batches a call without the pytrees of torch.vmap.",
    "torch._functorch.vmap.vmap_increment_nesting": "Batches a call without the pytrees of torch.vmap.",
    "torch._dynamo.OptimizedModule": "Is the class of modules under torch.compile.",
    "torch._dynamo.allow_in_graph": "Lets torch.compile call jax2torch's functions.",
    "torch._C._set_throw_on_mutable_data_ptr": "Has a stand-in raise where a function asks for its memory.",
    "torch._dynamo.backends.common.aot_autograd": 'Is the way in for torch.compile(backend="torch2jax").',
    "torch._guards.TracingContext.try_get": "Tells whether torch.compile traces.",
    "torch._subclasses.fake_tensor.FakeTensorMode": "Infers shapes without computing.",
    "torch.autograd._engine_run_backward": "Lets errors of a backward pass say jax.",
    "torch.overrides._pop_mode": "Leaves the caller's function modes for a call.",
    "torch.overrides._push_mode": "Leaves the caller's function modes for a call.",
    "torch.utils._device.DeviceContext": "Is the class of the mode of a default device.",
    "torch.utils._python_dispatch.TorchDispatchMode": "Sees the operators of a function.",
    "torch.utils._python_dispatch._disable_current_modes": "Leaves all dispatch modes for a while.",
    "torch.utils._pytree.tree_flatten": "Takes PyTorch's pytrees apart.",
    "torch.utils._pytree.tree_leaves": "Takes PyTorch's pytrees apart.",
    "torch.utils._pytree.tree_map": "Takes PyTorch's pytrees apart.",
    "torch.utils._pytree.tree_unflatten": "Puts PyTorch's pytrees together.",
    # PyTorch: others
    "torch._C._distributed_c10d": "Has process groups and reductions as operators get them.",
    "torch._foreach_copy_": "Copies many tensors in one launch.",
    "torch.distributed.distributed_c10d._get_group_size_by_name": "Tells how many ranks a group has.",
    "torch.nn.utils.stateless._reparametrize_module": "Gives a module other tensors for a call.",
}
"""The package does not work, or a part of it, where one of these is gone."""

SOMETIMES = {
    "jax._src.config.abstract_mesh_context_manager": "Tells the mesh that decides what is traced, up to jax 0.11.",
    "jax._src.config.device_context": "Tells the mesh that decides what is traced, up to jax 0.11.",
    "jax._src.core.ManualAxisType": "Describes a result that varies over axes, from jax 0.10 on.",
    "jax._src.mesh.abstract_mesh_context_manager": "Tells the mesh that decides what is traced, from jax 0.12 on.",
    "jax._src.mesh.device_context": "Tells the mesh that decides what is traced, from jax 0.12 on.",
    "jax._src.mesh.empty_abstract_mesh": "Stands for jax.sharding.get_mesh, which jax 0.7 lacks.",
    "jax._src.mesh.get_concrete_mesh": "Stands for jax.sharding.get_mesh, which jax 0.7 lacks.",
    "torch._C._get_privateuse1_backend_name": 'Tells whether another library has made a device; device "jax" needs PyTorch 2.10.',
    "torch._functorch._aot_autograd.functional_utils.from_fun": "Records writes as results, for compiled=True.",
    "torch._functorch._aot_autograd.functional_utils.has_data_mutation": "Tells whether compiled=True met a write into a constant.",
    "torch._functorch._aot_autograd.functional_utils.to_fun": "Records writes as results, for compiled=True.",
    "torch._functorch.partitioners.min_cut_rematerialization_partition": "Splits a joint graph, for compiled=True.",
    "torch._inductor.aot_compile": "Compiles a graph into a library, for compiled=True.",
    "torch._inductor.decomposition.select_decomp_table": "Takes operators apart, for compiled=True.",
    "torch._inductor.extern_node_serializer.extern_node_json_serializer": "Tells the operators that a library cannot call.",
    "torch._subclasses.functional_tensor.FunctionalTensorMode": "Records writes as results, for compiled=True.",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend": "Makes a device of Python, from PyTorch 2.10 on.",
}
"""Some of the supported versions lack these, and the code asks for them first."""

ATTRIBUTES = {
    "_backward_hooks": "Has the hooks of a tensor.",
    "_base": "Tells the tensor of which another is a view.",
    "_backward_cls": "Is the class of the contexts of an autograd.Function.",
    "_c": "Is the compiled part of a module of TorchScript.",
    "_cache_size": "Counts the programs of a function of jax.jit.",
    "_can_decompose": "Says whether PyTorch can take an operator apart.",
    "_cdata": "Says which generator or which memory it is.",
    "_check_input_dim": "Checks a layer's input.",
    "_compiled_call_impl": "Says whether Module.compile was called.",
    "_create_work_from_future": "Makes the handle of a collective that is done.",
    "_cuda_*": "Are PyTorch's functions for current streams.",
    "_flat_weights_names": "Names the weights of a recurrent layer.",
    "_foreach_supported_types": "Lists the types that optimizers take several at a time.",
    "_get_method": "Gets a method of a module of TorchScript.",
    "_is_param": "Says whether a tensor is a parameter.",
    "_is_zerotensor": "Says whether a tensor of zeros has no memory.",
    "_method_names": "Lists the methods of a module of TorchScript.",
    "_non_persistent_buffers_set": "Lists the buffers that state_dict leaves out.",
    "_op_dk": "Calls an operator's kernel for a key.",
    "_opname": "Is the name of an operator.",
    "_orig_mod": "Is the module under torch.compile.",
    "_overloadname": "Is the name of an operator's overload.",
    "_post_accumulate_grad_hooks": "Has the hooks of a parameter.",
    "_schema": "Says what an operator takes and returns.",
    "_top_saved_tensors_default_hooks": "Says whether hooks take what autograd saves.",
    "_torch_load_uninitialized": "Says whether torch.load made a tensor without values.",
    "_use_count": "Counts who refers to a tensor in C++.",
}
"""Private attributes of their objects. Whether these are there shows where they are used."""


def gone() -> list[str]:
    """Return those of ``NAMES`` that the installed PyTorch and JAX do not have."""
    return [name for name in NAMES if not _there(name)]


def explain(error: Exception) -> Exception:
    """Return the error with which the package's own import fails.

    It names the installed versions where they lack a private name. Any other error stays itself.
    """
    missing = gone()
    if not missing:
        return error
    versions = " and ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jax", "torch"))
    return ImportError(
        f"This torch2jax does not work with {versions}, which lack {', '.join(missing)}. Update "
        "torch2jax, or install versions that the table in its README names."
    )


def _there(name: str) -> bool:
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    path = module
    for part in rest.split("."):
        path = f"{path}.{part}"
        if not hasattr(found, part):
            try:
                found = importlib.import_module(path)
            except Exception:  # whatever a module says that no longer fits
                return False
        else:
            found = getattr(found, part)
    return True
