"""The limits of device "jax" that PyTorch's tests for devices show, by name."""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """A test whose name matches ``test``, and whose error matches ``text``, shows the limit."""

    name: str
    why: str
    test: str
    text: str


LIMITS: tuple[Limit, ...] = (
    Limit(
        "storage",
        "an array has no storage whose pointer could be asked for or shared",
        "",
        r"data pointer|torch\.storage|UntypedStorage|storage to share|python storage|"
        r"Storage device not",
    ),
    Limit("storage", "memory has no address that could be compared", "TestAsArray", r"in _check\]"),
    Limit(
        "copies on write",
        "a lazy clone shares its array until a write, which PyTorch's flags do not show",
        "lazy_clone|_cow_",
        "",
    ),
    Limit(
        "dtypes",
        "JAX has no complex32 and no quantised numbers",
        "",
        r"no counterpart of torch\.(complex32|qu?int)|quantized|_to_int4pack'",
    ),
    Limit(
        "the name in C++",
        "`device=` beside `out=` and `torch.asarray(x, device=...)` compare it, and C++ says lazy",
        "",
        r"does not match device type of out parameter|can.t alias tensor from device",
    ),
    Limit(
        "sparse",
        "arrays are dense",
        "",
        r"aten::(_coalesced_|_indices|sparse|_sparse)|Sparse|sparse coordinate",
    ),
    Limit("sparse", "arrays are dense", "mask_layout_sparse", r"in test_mask_layout\]"),
    Limit(
        "torch.compile",
        "`device.jit` compiles functions of tensors on the device",
        "",
        "torch.compile does not compile functions of tensors on device jax",
    ),
    Limit(
        "channels last",
        "XLA chooses how an array lies in memory",
        r"channels_last|memory_format|n\w?hwc",
        r"channels_last|memory.format|False is not true",
    ),
    Limit(
        "channels last",
        "XLA chooses how an array lies in memory",
        r"test_Dropout|output_size_one",
        r"in _test_dropout_discontiguous\]|failure occurred for item \[2\]",
    ),
    Limit(
        "determinism",
        "`torch.use_deterministic_algorithms` changes nothing, and memory always has values",
        r"determinis",
        "",
    ),
    Limit(
        "expanded memory",
        "a write to an expanded tensor is an error where PyTorch warns",
        "",
        "more than one element of the written-to tensor",
    ),
    Limit(
        "two devices", "an index or operand on the CPU is no constant", "", "at least two devices"
    ),
    Limit(
        "values",
        "an index beyond the end raises nothing, because a program would have to wait for it",
        r"out_of_bounds|index_error|out_of_range",
        "not raised",
    ),
    Limit(
        "division by zero",
        "of integers it raises nothing, for the same reason",
        "by_zero",
        "",
    ),
    Limit(
        "dtype of out=",
        "of some operators it may be any to which the result can be cast",
        r"_out(_|$)|nonzero",
        "not raised",
    ),
    Limit(
        "convolutions",
        "XLA chooses the algorithm, so there is no name of one to compare",
        "conv_backend",
        "_ConvBackend",
    ),
    Limit(
        "more dtypes",
        "operators take dtypes for which PyTorch has no kernel",
        "nonsupported_dtypes|no_suppot_input",
        "not raised",
    ),
    Limit(
        "texts",
        "an error may have the text of PyTorch's code in Python",
        "addcdiv_deprecated",
        "does not match",
    ),
    Limit(
        "rounding",
        "products and sums are taken in another order",
        r"reduce_prod|irfftn|per_sample_weights",
        "Tensor-likes are not (equal|close)",
    ),
    Limit("time", "more than 20 to 30 s of CPU, which compiling takes", "", r"^more than"),
)
