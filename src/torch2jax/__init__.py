"""This package makes JAX functions of PyTorch functions. See ``torch2jax``."""

import importlib
from typing import TYPE_CHECKING, Any

from torch import Size

try:
    from ._bridge import jax_side as jax_side  # registers the primitive's rules
except (ImportError, AttributeError) as error:
    from ._compat.private_names import explain

    raise explain(error) from error

from ._bridge.jax_side.exporting import export_checks
from ._bridge.torch_side.tape.table import TapeInfo, clear_tape, set_tape_budget, tape_info
from ._conversions.convert import j2t, t2j, tree_j2t, tree_t2j
from ._conversions.dtypes import dtype_j2t, dtype_t2j
from ._errors import (
    DifferentiationError,
    SignatureError,
    Torch2JaxError,
    Torch2JaxWarning,
    TorchCallError,
    UnsupportedDtypeError,
)
from ._from_module import from_module, to_state_dict
from ._jax2torch.function import jax2torch
from ._jax2torch.module import jax_module
from ._torch2jax import register, torch2jax, torch2jax_with_vjp, torch2jax_without_vjp

__version__ = "0.1.0"

__all__ = [
    "DifferentiationError",
    "SignatureError",
    "Size",
    "TapeInfo",
    "Torch2JaxError",
    "Torch2JaxWarning",
    "TorchCallError",
    "UnsupportedDtypeError",
    "__version__",
    "clear_tape",
    "dtype_j2t",
    "dtype_t2j",
    "export_checks",
    "from_module",
    "j2t",
    "jax2torch",
    "jax_module",
    "load_compiled",
    "lowering_report",
    "register",
    "save_compiled",
    "set_tape_budget",
    "t2j",
    "tape_info",
    "to_state_dict",
    "torch2jax",
    "torch2jax_with_vjp",
    "torch2jax_without_vjp",
    "tree_j2t",
    "tree_t2j",
]

if TYPE_CHECKING:
    from . import device as device
    from . import equinox as equinox
    from . import flax as flax
    from . import torchax as torchax
    from ._bridge.compiled.archive import load_compiled, save_compiled
    from ._lower.report import lowering_report
else:

    def __getattr__(name: str) -> Any:
        # Optional libraries are imported on use, and so is what few programs need.
        if name in ("device", "equinox", "flax", "torchax"):
            return importlib.import_module(f".{name}", __name__)
        if name == "lowering_report":
            from ._lower.report import lowering_report as found

            return found
        if name in ("save_compiled", "load_compiled"):
            return getattr(importlib.import_module("._bridge.compiled.archive", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
