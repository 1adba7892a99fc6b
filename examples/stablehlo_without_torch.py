"""A PyTorch model as a file of StableHLO, run by a process that never imports torch.

    python examples/stablehlo_without_torch.py --output model.stablehlo
    python examples/stablehlo_without_torch.py --smoke

The first process lowers the model to a JAX program and serialises it with `jax.export`. The second
has jax and NumPy alone. It checks that it has neither torch nor transformers nor torch2jax.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

READER = """
import sys
import jax, jax.export, numpy as np
model, inputs, results = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(model, "rb").read()))
x = np.load(inputs)
np.save(results, exported.call(x))
print("ran", exported.fun_name, exported.in_avals[0], "->", exported.out_avals[0])
strangers = {"torch", "transformers", "torch2jax"} & set(sys.modules)
assert not strangers, f"the program needed {strangers}"
"""


def export(path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Write the file, and return an input and PyTorch's own result."""
    import jax
    import jax.numpy as jnp
    import torch
    from jax import export

    from torch2jax import lowering_report, torch2jax

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, padding=1),
        torch.nn.BatchNorm2d(width),
        torch.nn.SiLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * width, 10),
        torch.nn.Softmax(-1),
    ).eval()
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = model(x).numpy()

    assert not lowering_report(model, jnp.asarray(x.numpy())).bridge
    # The weights are constants of the program; from_module makes them arguments.
    exported = export.export(jax.jit(torch2jax(model, lower=True, name="classifier")))(
        jax.ShapeDtypeStruct(x.shape, jnp.float32)
    )
    assert "custom_call" not in exported.mlir_module()
    path.write_bytes(exported.serialize())
    return x.numpy(), expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small model")
    parser.add_argument("--output", type=Path, help="keep the file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = args.output or Path(folder) / "model.stablehlo"
        inputs, results = Path(folder) / "x.npy", Path(folder) / "y.npy"
        x, expected = export(model, 4 if args.smoke else 32)
        np.save(inputs, x)
        command = [sys.executable, "-c", READER, str(model), str(inputs), str(results)]
        subprocess.run(command, check=True)
        np.testing.assert_allclose(np.load(results), expected, 1e-4, 1e-6)
        print(f"{model.stat().st_size:,} bytes; the results are PyTorch's.")


if __name__ == "__main__":
    main()
