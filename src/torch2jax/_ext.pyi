# What cpp/module.cc offers.
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

class Entry:
    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        label: str,
        inputs: list[str],
        outputs: list[str],
        default_dtype: torch.dtype | None,
        pass_outputs: bool = False,
        inplace: list[int] = ...,
        collect: Callable[[Any], tuple[torch.Tensor, ...]] | None = None,
        pure: bool = False,
        place: Callable[..., Any] | None = None,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def calls(self) -> int: ...

def cpu_handler() -> Any: ...
def gpu_handler() -> Any: ...
def prefetch_handler() -> Any: ...
def call_site() -> tuple[int, int, int] | None: ...
def current_execution() -> int: ...
def xla_stream(device: int) -> int | None: ...
def order_release(capsule: Any) -> Any: ...
def read_words(address: int, count: int) -> list[int] | None: ...
def setup(
    *,
    exchange_api: Any,
    torch: ModuleType,
    ambient_clean: Callable[[torch.dtype], bool],
    run_guarded: Callable[..., Any],
    describe_exception: Callable[[str, BaseException], str],
    collect: Callable[[], Any],
    resolve: Callable[[str], str] | None = None,
    streams: Sequence[Callable[..., Any]] | None = None,
    make_room: Callable[[int], None] | None = None,
    copy_all: Callable[..., Any] | None = None,
    force_capsules: bool = False,
    rocm: bool = False,
) -> None: ...
def to_arrays(
    operands: Sequence[Any],
    x64: bool,
    import_capsule: Callable[..., Any],
    cpu: Any,
    gpu: Callable[[int], tuple[Any, int] | None],
    is_pinned: Callable[[torch.Tensor], bool] | None,
    other: Callable[[torch.Tensor, int], Any],
) -> tuple[list[Any], int, int | None]: ...
def to_tensors(
    arrays: Sequence[Any], export_capsule: Callable[..., Any], place: int
) -> tuple[torch.Tensor, ...]: ...
def in_gpu_call() -> bool: ...
def requiring_grad(operands: Sequence[Any]) -> tuple[int, ...]: ...
def eager_dispatch(
    *,
    tensor_type: type,
    array_type: type,
    cell_type: type,
    make: Callable[..., Any],
    after_dtype: tuple[Any, ...],
    constants: tuple[type, ...],
    situation: Callable[[], Any],
    describe: Callable[[Any], Any],
    replay: Callable[[Any, Any, Any, Any], Any],
    array: Callable[[Any], Any],
    may_write: Callable[[Any, Any], None],
    inference: Callable[[], bool],
    sort: Callable[[Any], int | None],
    large: type[Exception],
) -> Callable[..., Any]: ...
def eager_key(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bytes, list[Any]] | None: ...
def forget_replays() -> None: ...
def begin_shutdown() -> None: ...
def dlpack_path() -> str: ...
def dtype_routes() -> dict[str, str]: ...
def compiled_cpu_handler() -> object: ...
def compiled_gpu_handler() -> object: ...
def load_library(name: str, path: str) -> None: ...
def library_calls(name: str) -> int: ...
