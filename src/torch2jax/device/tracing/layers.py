"""Some of PyTorch's layers ask for values that a traced function does not have."""

from __future__ import annotations

from typing import Any

import torch

from ..._compat.jax import trace_state_clean
from ..._compat.torch import transformers
from ..setup.changes_of_pytorch import replace_while_tracing
from ..tensors.tensor import Tensor, ValueNeeded

__all__: list[str] = []

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm
_their_forward: Any = _BatchNorm.forward
_their_detect: Any = transformers._detect_is_causal_mask


def _detect_is_causal_mask(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
    """Say whether a mask is the causal one. A traced mask counts as another, so it is used."""
    try:
        return _their_detect(mask, is_causal, size)
    except ValueNeeded:
        return False


def _forward(self: Any, input: Any) -> Any:
    """Run batch norm; where its statistics are plain means, the momentum is traced."""
    count = self.num_batches_tracked
    plain = self.training and self.momentum is None and self.track_running_stats
    if not (plain and type(count) is Tensor and not trace_state_clean()):
        return _their_forward(self, input)
    self._check_input_dim(input)
    mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
    out = torch.nn.functional.batch_norm(
        input, mean, var, self.weight, self.bias, True, 1.0, self.eps
    )
    with torch.no_grad():
        count.add_(1)
        factor = 1.0 / count
        self.running_mean.copy_((1 - factor) * self.running_mean + factor * mean)
        self.running_var.copy_((1 - factor) * self.running_var + factor * var)
    return out


replace_while_tracing(transformers, "_detect_is_causal_mask", _detect_is_causal_mask)
replace_while_tracing(_BatchNorm, "forward", _forward)
