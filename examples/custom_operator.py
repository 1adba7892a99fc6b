"""A C++ and CUDA operator of your own, called from JAX: shortest paths that have gradients.

    python examples/custom_operator.py               # build, check, draw
    python examples/custom_operator.py --smoke       # a smaller map: does everything work?

`demo::minplus(a, b)` is the matrix product in which + is `min` and * is `+`. Neither PyTorch nor
JAX has it. If you square a matrix of distances with it again and again, you get all shortest paths.

Here it is an operator in C++ and, where PyTorch and JAX have a GPU, in CUDA. The script registers
it with PyTorch in the usual way: a kernel, what it returns for fake tensors, its gradient and its
batched form. `torch2jax(torch.ops.demo.minplus.default)` is then a JAX function with `jit`, `grad`
and `vmap`. The gradient of a path's length says which roads the path takes. The kernel runs on the
stream that XLA computes on, which is PyTorch's current one during the call.

The first run compiles for about a minute. Later runs find the result in PyTorch's cache. Without
ninja and a C++ compiler (with a GPU: nvcc) the script says so and stops with exit status 77.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from rich.console import Console
from torch.utils.cpp_extension import load_inline

from torch2jax import torch2jax

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

SOURCE = r"""
#include <torch/extension.h>
#include <limits>

// c[i][j] = min over k of a[i][k] + b[k][j], and the k that reaches it.
std::tuple<at::Tensor, at::Tensor> minplus(const at::Tensor& a_in, const at::Tensor& b_in) {
  TORCH_CHECK(a_in.dim() == 2 && b_in.dim() == 2 && a_in.size(1) == b_in.size(0), "shapes");
  TORCH_CHECK(a_in.scalar_type() == at::kFloat && b_in.scalar_type() == at::kFloat, "dtypes");
  const auto a = a_in.contiguous(), b = b_in.contiguous();
  const int64_t n = a.size(0), inner = a.size(1), m = b.size(1);
  auto c = at::full({n, m}, std::numeric_limits<float>::infinity(), a.options());
  auto at_k = at::zeros({n, m}, a.options().dtype(at::kInt));
  const float* pa = a.const_data_ptr<float>();
  const float* pb = b.const_data_ptr<float>();
  float* pc = c.data_ptr<float>();
  int* pk = at_k.data_ptr<int>();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < m; ++j) {
        const float sum = pa[i * inner + k] + pb[k * m + j];
        if (sum < pc[i * m + j]) {
          pc[i * m + j] = sum;
          pk[i * m + j] = static_cast<int>(k);
        }
      }
  return {c, at_k};
}

TORCH_LIBRARY(demo, m) { m.def("minplus(Tensor a, Tensor b) -> (Tensor, Tensor)"); }
TORCH_LIBRARY_IMPL(demo, CPU, m) { m.impl("minplus", minplus); }
"""

CUDA_SOURCE = r"""
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

// A thread for each element of the result.
__global__ void minplus_kernel(const float* a, const float* b, float* c, int* at_k, int64_t n,
                               int64_t inner, int64_t m) {
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (at >= n * m) return;
  const int64_t i = at / m, j = at % m;
  float least = INFINITY;
  int reached_by = 0;
  for (int64_t k = 0; k < inner; ++k) {
    const float sum = a[i * inner + k] + b[k * m + j];
    if (sum < least) {
      least = sum;
      reached_by = static_cast<int>(k);
    }
  }
  c[at] = least;
  at_k[at] = reached_by;
}

std::tuple<at::Tensor, at::Tensor> minplus_cuda(const at::Tensor& a_in, const at::Tensor& b_in) {
  TORCH_CHECK(a_in.dim() == 2 && b_in.dim() == 2 && a_in.size(1) == b_in.size(0), "shapes");
  TORCH_CHECK(a_in.scalar_type() == at::kFloat && b_in.scalar_type() == at::kFloat, "dtypes");
  const c10::cuda::CUDAGuard guard(a_in.device());
  const auto a = a_in.contiguous(), b = b_in.contiguous();
  const int64_t n = a.size(0), m = b.size(1), threads = 256;
  auto c = at::empty({n, m}, a.options());
  auto at_k = at::empty({n, m}, a.options().dtype(at::kInt));
  const auto blocks = static_cast<unsigned>((n * m + threads - 1) / threads);
  if (blocks > 0) {
    minplus_kernel<<<blocks, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        a.const_data_ptr<float>(), b.const_data_ptr<float>(), c.data_ptr<float>(),
        at_k.data_ptr<int>(), n, a.size(1), m);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {c, at_k};
}

TORCH_LIBRARY_IMPL(demo, CUDA, m) { m.impl("minplus", minplus_cuda); }
"""

FAR = 1e6  # no road
console = Console()


def build(cuda: bool) -> None:
    """Compile the operator and tell PyTorch the rest about it."""
    with console.status("compiling the operator (a minute, the first time)"):
        load_inline(
            "torch2jax_demo_cuda" if cuda else "torch2jax_demo",
            SOURCE,
            CUDA_SOURCE if cuda else "",
            is_python_module=False,
            extra_cflags=["-O3"],
        )

    @torch.library.register_fake("demo::minplus")
    def _(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (a.shape[0], b.shape[1])
        return a.new_empty(shape), a.new_empty(shape, dtype=torch.int32)

    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(output[1])
        ctx.inner = inputs[0].shape[1]

    def backward(ctx: Any, g: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of a minimum goes to the term that reached it."""
        (k,) = ctx.saved_tensors
        k = k.long()
        into_a = g.new_zeros(k.shape[0], ctx.inner).scatter_add(1, k, g)
        into_b = g.new_zeros(ctx.inner, k.shape[1]).scatter_add(0, k, g)
        return into_a, into_b

    torch.library.register_autograd("demo::minplus", backward, setup_context=keep)

    @torch.library.register_vmap("demo::minplus")
    def _(info: Any, in_dims: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[Any, Any]:
        def rows(x: torch.Tensor, dim: int | None) -> list[torch.Tensor]:
            return [x] * info.batch_size if dim is None else list(x.unbind(dim))

        pairs = zip(rows(a, in_dims[0]), rows(b, in_dims[1]), strict=True)
        results = [torch.ops.demo.minplus(*pair) for pair in pairs]
        return tuple(torch.stack(part) for part in zip(*results, strict=True)), (0, 0)


def roads(side: int, seed: int) -> np.ndarray:
    """Return the lengths of roads between neighbours on a map, float32[side**2, side**2]."""
    rng = np.random.default_rng(seed)
    lengths = np.full((side**2, side**2), FAR, np.float32)
    np.fill_diagonal(lengths, 0)
    for place in range(side**2):
        for other in (place + 1 if (place + 1) % side else None, place + side):
            if other is not None and other < side**2:
                lengths[place, other] = lengths[other, place] = rng.uniform(1, 4)
    return lengths


def draw(lengths: np.ndarray, used: np.ndarray, side: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.5, 5.8), dpi=120, layout="constrained")
    for a, b in np.argwhere(np.triu((lengths > 0) & (lengths < FAR))):
        on_path = used[a, b] + used[b, a] > 0.5
        axes.plot(
            *zip(divmod(a, side), divmod(b, side), strict=True),
            color="#ee4c2c" if on_path else "#9ca3af",
            linewidth=3.5 if on_path else 3 / lengths[a, b],
            zorder=2 if on_path else 1,
        )
    axes.plot([0, side - 1], [0, side - 1], "o", color="#111827", markersize=8, zorder=3)
    axes.set_title(
        "The gradient of the distance between two corners\nis 1 on the roads of the shortest path",
        loc="left",
        weight="bold",
        size=10,
    )
    axes.set_aspect("equal")
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=14, help="places on a side (default 14)")
    parser.add_argument("--seed", type=int, default=0, help="of the roads (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("custom_operator.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="a smaller map")
    arguments = parser.parse_args(argv)
    side = 6 if arguments.smoke else arguments.side

    # PyTorch looks for ninja on the path; pip puts it beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
    tools = ("ninja", "g++", "nvcc") if cuda else ("ninja", "g++")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        console.print(f"[bold red]Not run:[/] there is no {' and no '.join(missing)} here.")
        return 77
    build(cuda)
    minplus = torch2jax(torch.ops.demo.minplus.default)

    def distances(lengths: jax.Array) -> jax.Array:
        """Square the matrix until paths may have any number of roads: all shortest paths."""
        for _ in range((side**2).bit_length()):
            lengths = minplus(lengths, lengths)[0]
        return lengths

    lengths = roads(side, arguments.seed)
    corner = side**2 - 1
    distance, used = jax.jit(jax.value_and_grad(lambda x: distances(x)[0, corner]))(lengths)

    reference = lengths.copy()  # Floyd and Warshall
    for k in range(side**2):
        reference = np.minimum(reference, reference[:, k, None] + reference[k])
    np.testing.assert_allclose(distance, reference[0, corner], rtol=1e-5)
    used = np.asarray(used)
    np.testing.assert_allclose((used * lengths).sum(), distance, rtol=1e-5)
    taken = int(((used > 0.5) & (lengths > 0)).sum())
    console.print(
        f"{side**2} places: the corners are [bold]{float(distance):.3f}[/] apart, as Floyd and "
        f"Warshall find too; the gradient names the {taken} roads of the path"
    )

    many = np.stack([roads(side, seed) for seed in range(4)])
    batched = jax.jit(jax.vmap(distances))(many)
    one_by_one = jnp.stack([distances(x) for x in many])
    np.testing.assert_array_equal(batched, one_by_one)
    console.print("vmap over 4 maps gives what 4 calls give")

    draw(lengths, used, side, arguments.output)
    console.print(f"The path: [bold]{arguments.output}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
