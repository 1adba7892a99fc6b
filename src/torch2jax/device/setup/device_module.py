"""``torch.jax`` has the functions that PyTorch expects of every device."""

from __future__ import annotations

from typing import Any

import torch

from .. import random_streams
from ..tensors.tensor import Tensor as _Tensor


class DeviceModule:
    """``torch.jax`` is an instance, with the device's functions and the class of its tensors."""

    Tensor = _Tensor

    def is_available(self) -> bool:
        # DataLoader would pin memory for an accelerator that is available.
        return False

    def is_initialized(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        """Do nothing: programs are dispatched asynchronously, and reading a value waits for it."""

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        random_streams.seed(seed)

    manual_seed_all = manual_seed

    def seed(self) -> None:
        random_streams.seed(torch.seed())

    def initial_seed(self) -> int:
        return random_streams.initial_seed()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return random_streams.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        random_streams.set_state(state)

    class device:  # torch looks it up as torch.jax.device(index)
        def __init__(self, index: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            pass
