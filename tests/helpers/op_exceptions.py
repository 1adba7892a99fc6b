"""Operators of PyTorch's own table that do not pass through the bridge, each with its reason.

A name is the operator's, its variant's and the dtype's, as in the test's id. An operator listed
here that passes fails its test: then its line has to go.
"""

from __future__ import annotations

# fails with the first two samples of the operator
EXCEPTIONS: dict[str, str] = {}

# fails only where all samples are run (make test-ops)
EXCEPTIONS_OF_ALL_SAMPLES: dict[str, str] = {}

# Operators whose shapes depend on the values of a tensor, which PyTorch does not say in their tags and
# its fake tensors do not notice: the call needs output_shapes=.
UNTAGGED_DATA_DEPENDENT = {"tensor_split"}

# What PyTorch leaves undefined: memory that is not initialised. Shapes and dtypes are compared,
# values are not.
UNDEFINED_VALUES = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
