"""A Llama of transformers, served in the way in which vLLM's TPU backend serves one.

    python examples/vllm_style.py             # a small Llama with random weights
    python examples/vllm_style.py --smoke     # a smaller one

vLLM's tpu-inference is a program for torchax, and here it is one for `torch2jax.torchax`. The model
is PyTorch's. One function of arrays, compiled by `jax.jit`, makes a step of it for all requests.
The caches of keys and values are arrays of a fixed size. Each step is given them for good (they are
donated) and returns them with the new keys and values in them. The linear layers have weights of
int8. The tokens are those of `generate`, in plain PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import torch2jax.torchax

torch2jax.torchax.install()  # before the first `import torchax`

import torchax  # noqa: E402
from torchax.interop import call_jax, jax_view, torch_view  # noqa: E402

# --- layers of int8 ------------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight is int8, with one scale for each output."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call_jax(int8_matmul, x, self.weight, self.scale)


def int8_matmul(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype)) * scale


def quantize(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the linear layers; returns a copy with ordinary ones of the same values."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Int8Linear):
                linear = torch.nn.Linear(*reversed(child.weight.shape), bias=False)
                linear.weight.data = child.weight.float() * child.scale[:, None]
                setattr(module, name, linear)
    return plain


# --- attention over caches -----------------------------------------------------------------------


class Context:
    """What the attention of one step reads and writes: the caches, and the tokens' positions."""

    def __init__(self, caches: list[jax.Array], positions: jax.Array) -> None:
        self.caches, self.positions = caches, positions


_contexts: list[Context] = []


@contextlib.contextmanager
def serving(caches: list[jax.Array], positions: jax.Array) -> Iterator[Context]:
    _contexts.append(Context(list(caches), positions))
    try:
        yield _contexts[-1]
    finally:
        _contexts.pop()


def cached_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' models, over the caches of the step under way."""
    context = _contexts[-1]
    attend = functools.partial(attention, scale=scaling)
    new, out = attend(
        context.caches[module.layer_idx], *jax_view((query, key, value)), context.positions
    )
    context.caches[module.layer_idx] = new
    return torch_view(out), None


def attention(
    cache: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Put keys and values into the cache (2, batch, heads, length, size), and attend to it."""
    new = jnp.stack([k, v]).astype(cache.dtype)
    cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, positions[0], 0))
    keys, values = jnp.repeat(cache, q.shape[1] // k.shape[1], axis=2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, keys) * scale
    seen = jnp.arange(cache.shape[3]) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    return cache, jnp.einsum("bhqk,bhkd->bqhd", weights, values)


# --- the server ----------------------------------------------------------------------------------


class Server:
    """It runs a model on device jax, step by step, for a batch of requests."""

    def __init__(self, model: LlamaForCausalLM, batch: int, length: int) -> None:
        config = model.config
        self.weights = jax_view({**dict(model.named_parameters()), **dict(model.named_buffers())})
        shape = (2, batch, config.num_key_value_heads, length, config.head_dim)
        self.caches = [jnp.zeros(shape) for _ in range(config.num_hidden_layers)]

        def step(weights: Any, caches: Any, ids: Any, positions: Any) -> tuple[Any, Any]:
            with torchax.default_env(), serving(caches, positions) as context:
                out = torch.func.functional_call(
                    model,
                    torch_view(weights),
                    kwargs={
                        "input_ids": torch_view(ids),
                        "position_ids": torch_view(positions[None]),
                        "use_cache": False,
                    },
                    tie_weights=False,
                )
            return context.caches, jax_view(out.logits[:, -1].argmax(-1))

        self.step = jax.jit(step, donate_argnums=1)

    def generate(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        """Return ``count`` further tokens of each request."""
        ids, place, found = jnp.asarray(prompt.numpy()), 0, []
        for _ in range(count):
            given, positions = self.caches, place + jnp.arange(ids.shape[1])
            self.caches, tokens = self.step(self.weights, given, ids, positions)
            assert all(cache.is_deleted() for cache in given)  # the step has written in them
            place, ids = place + ids.shape[1], tokens[:, None]
            found.append(tokens)
        return torch.from_dlpack(jnp.stack(found, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a smaller model")
    smoke = parser.parse_args().smoke
    warnings.filterwarnings("ignore", module="transformers")
    ALL_ATTENTION_FUNCTIONS.register("served", cached_attention)

    torch.manual_seed(0)
    width, layers, count = (64, 2, 12) if smoke else (512, 8, 64)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, attn_implementation="sdpa",
        eos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    plain = quantize(model)
    prompt = torch.randint(1, 512, (2, 7))
    expected = plain.generate(prompt, max_new_tokens=count, do_sample=False)[:, 7:]

    model.set_attn_implementation("served")
    server = Server(torchax.default_env().to_xla(model), len(prompt), 7 + count)
    tokens = server.generate(prompt, count)
    server.generate(prompt, 2)  # everything is compiled
    start = time.perf_counter()
    again = server.generate(prompt, count)
    each = (time.perf_counter() - start) / count * 1e3

    small = sum(w.nbytes for w in server.weights.values() if w.dtype == jnp.int8)
    print(f"weights: {sum(w.nbytes for w in server.weights.values()):,} bytes, {small:,} of int8")
    print(f"caches: {len(server.caches)} of {server.caches[0].shape}, donated")
    print(f"{each:.2f} ms a step")
    assert torch.equal(tokens, again)
    assert torch.equal(tokens.long(), expected), (tokens, expected)
    print("The tokens are those of plain PyTorch:", tokens[0].tolist()[:8], "...")


if __name__ == "__main__":
    main()
