"""A Llama block of transformers, split over eight devices, without a change to its code.

    python examples/llama_sharded.py             # on eight devices that XLA makes of one CPU
    python examples/llama_sharded.py --smoke     # the same, smaller

The block is PyTorch's. `from_module(..., lower=True)` makes a JAX program of it, and XLA splits
that program as its weights are split. This is tensor parallelism: the projections into heads and
into the hidden units of the MLP are split by columns, and those out of them by rows. Loss and
gradients are those of one device.
"""

from __future__ import annotations

import argparse
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from torch2jax import from_module

DEVICES = 8
# PyTorch's weights are (out, in), so a split by columns of the product is one by rows of them.
BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_ROWS = ("o_proj", "down_proj")


class Block(torch.nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(config)
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)[None]
        out = self.layer(x, position_embeddings=self.rotary(x, places))
        return out[0] if isinstance(out, tuple) else out


def layout(name: str) -> PartitionSpec:
    """Say how a parameter is split over the axis "model"."""
    if any(part in name for part in BY_COLUMNS):
        return PartitionSpec("model", None)
    if any(part in name for part in BY_ROWS):
        return PartitionSpec(None, "model")
    return PartitionSpec()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small block")
    width = 64 if parser.parse_args().smoke else 512
    warnings.filterwarnings("ignore", module="transformers")

    jax.config.update("jax_num_cpu_devices", DEVICES)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=DEVICES,
        num_key_value_heads=DEVICES,
        attn_implementation="sdpa",
    )
    apply, variables = from_module(Block(config), lower=True)
    x = jnp.asarray(torch.randn(4, 32, width).numpy())

    @jax.jit
    def step(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return (apply({**variables, "params": params}, x) ** 2).mean()

        return jax.value_and_grad(loss)(params)

    params = variables["params"]
    expected, expected_grads = step(params, x)

    mesh = jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,))
    split = {
        name: jax.device_put(p, NamedSharding(mesh, layout(name))) for name, p in params.items()
    }
    inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    loss, grads = step(split, inputs)

    for name, p in split.items():
        shard = p.addressable_shards[0].data.shape
        print(f"{name:38s} {p.shape!s:14s} {shard} on each of {len(p.sharding.device_set)} devices")
    program = step.lower(split, inputs).compile().as_text()
    sums = len(re.findall(r"= .* all-reduce(?:-start)?\(", program))
    print(f"loss {float(loss):.6f}, on one device {float(expected):.6f}; {sums} all-reduces")

    np.testing.assert_allclose(loss, expected, 1e-5)
    for name, g in grads.items():
        np.testing.assert_allclose(g, expected_grads[name], 1e-3, 1e-6, err_msg=name)
    assert sums >= 2, "nothing was summed over the devices"
    assert split["layer.self_attn.q_proj.weight"].addressable_shards[0].data.shape == (
        width // DEVICES,
        width,
    )
    print("Loss and all gradients are those of one device.")


if __name__ == "__main__":
    main()
