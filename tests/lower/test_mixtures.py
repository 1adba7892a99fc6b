"""Mixtures of experts of transformers 5: values and all gradients are PyTorch's, without the bridge.

They sort tokens by expert, count them by `torch.histc` and multiply by `F.grouped_mm`. Jamba has
experts after a state space model, DeepSeek experts that are chosen by groups, gpt-oss biases.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hugging_face as hf
import pytest
import torch
from lowered_models import agrees, close, leaves, score

from torch2jax import device

transformers = hf.transformers


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*reach it as int64.*")
        warnings.filterwarnings("ignore", module="transformers")
        yield


SIZES = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    **SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4,
    "first_k_dense_replace": 0, "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        norm_topk_prob=True,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def deepseek_v2() -> Any:
    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**DEEPSEEK))


def deepseek_v3() -> Any:
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def jamba() -> Any:
    config = transformers.JambaConfig(
        **SIZES, num_experts=4, expert_layer_period=1, expert_layer_offset=0,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config)


MODELS: list[Callable[[], Any]] = [
    mixtral, qwen2_moe, deepseek_v2, deepseek_v3, gpt_oss, jamba,
]  # fmt: skip
INPUTS = {**hf.TEXT, "labels": hf.TOKENS, "use_cache": False}


@pytest.mark.parametrize("make", MODELS)
def test_as_a_jax_program(make: Callable[[], Any]) -> None:
    agrees(make(), INPUTS, False)


@pytest.mark.parametrize("make", MODELS)
def test_on_the_device(make: Callable[[], Any]) -> None:
    device.enable()
    model = make().eval()
    twin = copy.deepcopy(model)
    expected = twin(**INPUTS)
    score(expected).backward()
    model.to("jax")
    out = model(**{k: x.to("jax") if torch.is_tensor(x) else x for k, x in INPUTS.items()})
    score(out).backward()
    for k, (y, want) in enumerate(zip(leaves(out), leaves(expected), strict=True)):
        close(y.detach().jax(), want, f"result {k}")
    ours = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        mine = ours[name].grad
        assert (mine is None) == (p.grad is None), name
        if p.grad is not None:
            close(mine.jax(), p.grad, name)
