"""``torch.load(..., map_location="jax")`` moves the file's CPU tensors as they are rebuilt.

PyTorch restores storages and then lays tensors over them. A storage for device jax stays in the
CPU's memory and only says that it is on "jax". The tensor that is laid over it is a copy on JAX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.serialization import register_package

from ..._errors import Torch2JaxError
from ..operators.special.changes import refuse_storage
from ..operators.special.table import special
from ..tensors.tensor import Tensor, become, only_one

__all__ = ["register_loading"]

_FIRST = 5
"""It comes before PyTorch's own restorers, the first of which is 10."""


class _Loaded(torch.UntypedStorage):
    """It is a storage in the CPU's memory whose tensors are to be on device jax."""

    made: dict[Any, Tensor]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("jax", 0)


def _restore(storage: Any, location: str) -> Any:
    if location.partition(":")[0] != "jax":
        return None
    only_one(torch.device(location))
    if getattr(storage, "_torch_load_uninitialized", False):
        raise Torch2JaxError(
            "a file in PyTorch's format from before 1.6 cannot be loaded to device jax: its values "
            'are read after its tensors are made. Load it with map_location="cpu" and move what is '
            'in it, .to("jax").'
        )
    storage.__class__ = _Loaded
    storage.made = {}
    return storage


@special(torch.ops.aten.set_.source_Storage_storage_offset)
def _lay_over(args: Any, kwargs: Any) -> Any:
    x, storage, *layout = args
    if type(storage) is not _Loaded:
        return refuse_storage(args, kwargs)
    # Tensors that are the same in memory, such as tied weights, stay the same.
    key = (x.dtype, repr(layout))
    if key not in storage.made:
        host = torch.empty(0, dtype=x.dtype, device="cpu").set_(storage, *layout)
        storage.made[key] = host.to("jax")  # type: ignore[assignment]
    return become(x, storage.made[key])


def register_loading() -> None:
    register_package(_FIRST, lambda storage: None, _restore)
