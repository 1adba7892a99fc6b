"""The public names of each module of torchax 0.0.14: what its modules define themselves."""

from __future__ import annotations

NAMES: dict[str, str] = {
    "(itself)": (
        "CompileOptions VERSION compile default_env disable_globally disable_temporarily "
        "enable_accuracy_mode enable_globally enable_performance_mode extract_jax "
        "unsupported_dtype"
    ),
    "amp": "CastPolicy autocast autocast_policy execute_policy",
    "checkpoint": "load_checkpoint save_checkpoint",
    "config": "Configuration",
    "decompositions": (
        "DECOMPOSITIONS DispatchKey MUTABLE_DECOMPOSITION aten bernoulli bernoulli_float "
        "channel_shuffle rand_like"
    ),
    "device_module": (
        "current_device device_count get_amp_supported_dtype get_rng_state is_available "
        "manual_seed_all set_rng_state"
    ),
    "export": (
        "DEBUG JaxInterpreter exported_program_to_jax exported_program_to_stablehlo extract_avals"
    ),
    "flax": "FlaxNNModule",
    "interop": (
        "JittableModule call_jax call_torch extract_all_buffers fori_loop gradient_checkpoint "
        "j2t_autograd jax_jit jax_shard_map jax_value_and_grad jax_view jax_view_elem "
        "set_all_buffers torch_view torch_view_elem wrap_jax_jit"
    ),
    "mesh_util": "Mesh SingleAxisSharder",
    "ops": "all_aten_jax_ops",
    "ops.jaten": (
        "adaptive_avg_pool2or3d all_ops diag_indices_with_offset geometric "
        "highest_precision_int_dtype kthvalue linear max_pool "
        "max_pool2d_with_indices_backward_custom mutation_needs_env mutation_ops_to_functional "
        "op permute pool repeat_interleave split_with_sizes"
    ),
    "ops.jax_reimplement": "compute_weight_mat scale_and_translate",
    "ops.jc10d": "op",
    "ops.jimage": (
        "compute_contribs cubic_kernel gather_weights interpolate_along_axis_bchw "
        "interpolate_bicubic_no_aa"
    ),
    "ops.jlibrary": "register_jax_composite register_torch_composite",
    "ops.jtorch": (
        "arange empty empty_strided functional_interpolate functional_linear getitem linalg_det "
        "linalg_slogdet linalg_solve linalg_solve_ex linalg_svd linalg_tensorsolve logdet lu "
        "lu_solve matrix_power one_hot pad rand randint randn register_function "
        "scaled_dot_product_attention svd tensor_split torch_Tensor_repeat_interleave "
        "unravel_index"
    ),
    "ops.jtorchvision_nms": "nms non_max_suppression_padded",
    "ops.mappings": (
        "JAX_DTYPE_TO_TORCH NUMPY_UNSUPPORTED_DTYPES TORCH_DTYPE_TO_JAX j2t j2t_dtype t2j t2j_dtype"
    ),
    "ops.op_base": (
        "InplaceOp OutVariant P convert_dtype foreach_loop maybe_convert_constant_dtype "
        "promote_int_input"
    ),
    "ops.ops_registry": (
        "Operator all_aten_ops all_torch_functions register_torch_dispatch_op "
        "register_torch_function_op"
    ),
    "tensor": (
        "Environment OperatorNotFound RuntimeProperty SUPPORTED_JAX_PLATFROM "
        "TENSOR_CONSTRUCTORS Tensor XLADispatchMode XLAFunctionMode debug_accuracy log_nested "
        "logger"
    ),
    "train": "Container ScannedModule make_train_step mark_sharding remat",
    "types": "JaxCallable JaxValue P TorchCallable TorchValue",
    "util": "merge partition",
    "view": "AsStridedInfo DiagonalInfo NarrowInfo SelectInfo View ViewInfo ViewInfoType",
}
