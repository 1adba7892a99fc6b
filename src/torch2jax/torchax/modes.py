"""Within an environment these modes see PyTorch's functions and operators."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["XLADispatchMode", "XLAFunctionMode"]


class XLAFunctionMode(TorchFunctionMode):
    """This mode gives PyTorch's functions to an environment's ``dispatch``."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.env.dispatch(func, types, args, kwargs)


class XLADispatchMode(TorchDispatchMode):
    """This mode prints operators to stderr, where the environment's configuration says so."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        config = self.env.config
        if config.debug_print_each_op:
            text = str(func)
            if config.debug_print_each_op_operands:
                text += " " + ", ".join(map(_described, (*args, *(kwargs or {}).values())))
            print(text, file=sys.stderr)
        return func(*args, **(kwargs or {}))


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
