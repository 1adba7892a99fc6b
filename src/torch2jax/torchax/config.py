"""This module holds an environment's settings under torchax's names."""

from __future__ import annotations

import dataclasses

__all__ = ["Configuration"]


@dataclasses.dataclass
class Configuration:
    """A program may set these fields in ``default_env().config``.

    ``debug_print_each_op`` prints each operator to stderr; ``debug_print_each_op_operands`` adds
    its operands. Under ``treat_cuda_as_jax_device`` the device "cuda" means jax within the
    environment, and under ``allow_mixed_math_with_scalar_tensor`` a CPU tensor of one element may
    stand beside tensors on device jax. The other fields choose among ways to compute in torchax and
    have no effect here: views share memory, and results have PyTorch's dtypes.
    """

    debug_print_each_op: bool = False
    debug_print_each_op_operands: bool = False
    debug_accuracy_for_each_op: bool = False
    debug_mixed_tensor: bool = False
    use_int32_for_index: bool = False
    allow_mixed_math_with_scalar_tensor: bool = True
    force_materialize_views: bool = False
    use_dlpack_for_data_conversion: bool = False
    treat_cuda_as_jax_device: bool = True
    internal_respect_torch_return_dtypes: bool = True
    use_tpu_flash_attention: bool = False
    shmap_flash_attention: bool = False
