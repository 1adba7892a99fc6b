"""From the first call to the first result: ten Hugging Face models under `lower=True` and torchax.

    python benchmarks/programs/first_calls.py --output docs/performance.md --torchax PYTHON

Tiny models with random weights, so that what is timed is tracing and compiling. Each subject has
two processes in each round, which call the models one after another under ``jax.jit``: the first
fills JAX's compilation cache, and the second finds it. A small function is called before, so that
no model pays for the start of the process. Each process counts how many programs hit the cache, and
checks that it computes what PyTorch computes. transformers 5 has no models in flax, so flax is
missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, table, write_section

OURS, TORCHAX = "torch2jax, lower=True", "torchax"
COMMON = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64,
}  # fmt: skip
TEXT = {**COMMON, "vocab_size": 64, "max_position_embeddings": 32}
DECODER = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
IMAGE = {**COMMON, "image_size": 16, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
DISTIL = {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 64, "vocab_size": 64}
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "BertConfig", TEXT),
    "RoBERTa": ("RobertaModel", "RobertaConfig", TEXT),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", DISTIL),
    "ALBERT": ("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    "GPT-2": ("GPT2Model", "GPT2Config", GPT2),
    "Llama": ("LlamaModel", "LlamaConfig", DECODER),
    "Mistral": ("MistralModel", "MistralConfig", DECODER),
    "Qwen2": ("Qwen2Model", "Qwen2Config", DECODER),
    "T5": ("T5EncoderModel", "T5Config", T5),
    "ViT": ("ViTModel", "ViTConfig", IMAGE),
}
"""The class of a model, that of its configuration, and the options of the configuration."""
STARTS = ("first process", "second process")

Start = Callable[[Any, dict[str, torch.Tensor]], Callable[[], Any]]


def model_of(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and its inputs."""
    torch.manual_seed(0)
    kind, config, options = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if options is IMAGE:
        return model, {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)}
    return model, {"input_ids": torch.arange(2, 34).reshape(2, 16)}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, jax.Array]:
    wide = {torch.int64: np.int32}
    return {k: jnp.asarray(x.numpy().astype(wide.get(x.dtype))) for k, x in inputs.items()}


def ours(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    from torch2jax import from_module

    apply, variables = from_module(model, lower=True)
    given = arrays(inputs)
    call = jax.jit(lambda variables, given: apply(variables, **given)["last_hidden_state"])
    return lambda: call(variables, given)


def torchax(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    import torchax  # type: ignore[import-not-found]

    state, fn = torchax.extract_jax(model)
    given = arrays(inputs)
    call = jax.jit(lambda state, given: fn(state, (), given)["last_hidden_state"])
    return lambda: call(state, given)


SUBJECTS: dict[str, Start] = {OURS: ours, TORCHAX: torchax}


class Small(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": torch.nn.functional.softmax(x.sin() @ x.mT + x[0].mean(), -1)}


def serve(subject: str, names: list[str], cache: str) -> None:
    """Print what each model takes, as JSON: its seconds, hits and misses of the cache."""
    start, counted = SUBJECTS[subject], {"cache_hits": 0, "cache_misses": 0}

    def listen(event: str, **_: Any) -> None:
        if (kind := event.rpartition("/")[2]) in counted:
            counted[kind] += 1

    jax.monitoring.register_event_listener(listen)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.block_until_ready(start(Small(), {"x": torch.ones(3, 3)})())
    found: dict[str, Any] = {}
    for name in names:
        model, inputs = model_of(name)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        try:
            call = start(model, inputs)
            counted.update(dict.fromkeys(counted, 0))
            begin = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds = time.perf_counter() - begin
        except Exception as error:  # a peer may not have an operator
            if subject == OURS:
                raise
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        np.testing.assert_allclose(np.asarray(result), expected.numpy(), 2e-3, 2e-4, err_msg=name)
        found[name] = [seconds, *counted.values()]
    versions = {k: importlib.metadata.version(k) for k in ("jax", "torch", "transformers")}
    if subject == TORCHAX:
        versions = {TORCHAX: sys.modules[TORCHAX].__version__, **versions}
    print(json.dumps([versions, found]))


def run(subject: str, python: str, names: list[str], cache: str) -> list[Any]:
    options = ["--serve", subject, "--models", *names, "--cache", cache]
    command = [python, "-W", "ignore", __file__, *options]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def section(names: list[str], rounds: int, torchax: str | None) -> str:
    load = os.getloadavg()[0]
    pythons = {OURS: sys.executable} | ({TORCHAX: torchax} if torchax else {})
    columns = [(subject, start) for subject in pythons for start in STARTS]
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {column: [] for column in columns}
    versions: dict[str, dict[str, str]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for start in STARTS:
                for subject, python in pythons.items():
                    cache = str(Path(folder) / subject.partition(",")[0])
                    versions[subject], found = run(subject, python, names, cache)
                    samples[subject, start].append(found)
    refused = {
        name: told for (found, *_) in samples.values() for name, told in found.items()
        if isinstance(told, str)
    }  # fmt: skip

    def seconds(column: tuple[str, str], name: str) -> str:
        if column[0] == TORCHAX and name in refused:
            return "-"
        return f"{statistics.median(found[name][0] for found in samples[column]):.2f}"

    lines = [measured(load, {"python": platform.python_version(), **versions[OURS]})]
    if torchax:
        named = ", ".join(f"{name} {version}" for name, version in versions[TORCHAX].items())
        lines.append(f"torchax in an environment of its own: {named}.")
    heads = [f"{subject.partition(',')[0]}, {start}" for subject, start in columns]
    rows = [[name, *(seconds(column, name) for column in columns)] for name in names]
    lines += ["", table([f"s, median of {rounds}", *heads], rows), ""]
    for subject in pythons:
        told = [t for found in samples[subject, STARTS[1]] for t in found.values()]
        hits, misses = [sum(t[i] for t in told if not isinstance(t, str)) for i in (1, 2)]
        where = f"In the second processes of {subject.partition(',')[0]}"
        lines.append(f"{where} {hits} programs hit the cache and {misses} missed it.")
    lines += [f"torchax has no figure for {name}: {told}." for name, told in refused.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    add("--rounds", type=int, default=3, help="each is two processes of each subject (3)")
    add("--torchax", metavar="PYTHON", help="interpreter that has torchax")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    add("--serve", help=argparse.SUPPRESS)
    add("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.serve:
        serve(arguments.serve, arguments.models, arguments.cache)
        return
    text = section(arguments.models, arguments.rounds, arguments.torchax)
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "first_calls")


if __name__ == "__main__":
    main()
