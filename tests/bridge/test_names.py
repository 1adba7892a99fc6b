"""Names of calls, lifetimes of callables, and an import without effects."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch2jax as package
from torch2jax import torch2jax

X = np.arange(4, dtype=np.float32)
PACKAGE = Path(package.__file__).parent


def names(f: Any, *args: Any) -> list[str]:
    """The names of the calls in the HLO of a function."""
    text = jax.jit(f).lower(*args).as_text()
    return re.findall(r'name = "([^"]*)"', text)


def python(program: str) -> str:
    """What a fresh Python prints; warnings are errors there."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- names ---------------------------------------------------------------------------------------


def test_derived_names_extend_the_name() -> None:
    f = torch2jax(lambda a: torch.sin(a), name="derived")
    assert names(f, X) == ["derived"]
    keep, vjp = names(jax.grad(lambda a: f(a).sum()), X)
    assert re.fullmatch(r"derived/keep\(0\)", keep)
    assert re.fullmatch(r"derived/vjp\(.*\)/tape\(0\)", vjp)
    g = torch2jax(lambda a: torch.sin(a), name="recomputed", residuals="recompute")
    assert names(jax.grad(lambda a: g(a).sum()), X)[-1].startswith("recomputed/vjp(")
    (rows,) = names(jax.vmap(f), X)
    assert re.fullmatch(r"derived/vmap\(0\)", rows)
    assert any("/jvp(" in n for n in names(lambda a: jax.jvp(f, (a,), (a,)), X))


def test_names_are_module_and_qualname_with_a_counter() -> None:
    class Model(torch.nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return a * 2

    first, second = torch2jax(Model()), torch2jax(Model())
    (a,), (b,) = names(second, X), names(first, X)  # the order of lowering counts
    for name in (a, b):
        assert name.startswith(
            f"{__name__}.test_names_are_module_and_qualname_with_a_counter.<locals>.Model"
        )
    assert a != b
    assert names(first, X) == [b]
    assert names(first, X[:2]) == [b] or names(first, X[:2])[0].startswith(b.rpartition("#")[0])


def test_the_same_name_for_two_functions_that_live() -> None:
    f = torch2jax(lambda a: a + 1, name="taken")
    g = torch2jax(lambda a: a + 2, name="taken")
    np.testing.assert_allclose(f(X), X + 1)
    np.testing.assert_allclose(g(X), X + 2)
    np.testing.assert_allclose(f(X), X + 1)


def test_one_name_for_many_shapes() -> None:
    f = torch2jax(lambda a: a * 3, name="shapes")
    assert names(f, X) == names(f, X[:2]) == ["shapes"]


PROGRAM = """
import jax, jax.numpy as jnp, torch
from torch2jax import torch2jax
f = torch2jax(lambda a: torch.sin(a))
g = torch2jax(torch.nn.Linear(4, 2))
h = torch2jax(lambda a: torch.sin(a))
def loss(a):
    return (jax.vmap(f)(a) ** 2).sum() + g(a).sum() + h(a).sum() + jax.lax.scan(lambda c, x: (f(c * x), c), a[0], a)[0].sum()
x = jnp.ones((3, 4))
for fn in (loss, jax.grad(loss), jax.hessian(loss), lambda a: jax.jvp(loss, (a,), (a,))):
    print(jax.jit(fn).lower(x).as_text())
"""


def test_equal_programs_have_equal_hlo_in_every_process() -> None:
    texts = [python(PROGRAM), python("import random, uuid; list(map(str, range(1000)))" + PROGRAM)]
    assert texts[0] == texts[1]
    assert texts[0].count("custom_call") > 4
    assert "0x" not in texts[0]


CACHE = """
import jax
jax.config.update("jax_compilation_cache_dir", {folder!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **kw: hits.append(event))
"""
"""What begins a program: the list of the events of JAX's persistent cache."""


def test_the_compilation_cache_hits_in_another_process(tmp_path: Path) -> None:
    program = f"""{CACHE.format(folder=str(tmp_path))}
import torch
from torch2jax import torch2jax
f = torch2jax(lambda a: torch.sin(a) * 2, name="cached")
x = jax.numpy.arange(4.)
def program(a):
    return (f(a) * 3).sum()
hits.clear()
value, grad = jax.jit(jax.value_and_grad(program))(x)
print(value, grad, sum("cache_hits" in h for h in hits))
"""
    *first, miss = python(program).split()
    *second, hit = python(program).split()
    assert first == second
    assert (miss, hit) == ("0", "1")


LOWERED = """
import torch, transformers
from torch2jax import from_module
transformers.logging.set_verbosity_error()
sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=24)
sizes |= dict(vocab_size=12, max_position_embeddings=8)
tokens = jax.numpy.arange(8, dtype="int32").reshape(2, 4)
for name in ("Bert", "Llama"):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**sizes, pad_token_id=0)
    config.use_cache = False
    model = getattr(transformers, name + "Model")(config).eval()
    apply, variables = from_module(model, lower=True)
    def loss(params, tokens):
        out = apply({**variables, "params": params}, input_ids=tokens)
        return (out["last_hidden_state"] ** 2).mean()
    hits.clear()
    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"], tokens)
    print(value, sum("cache_hits" in h for h in hits), sum("cache_misses" in h for h in hits))
"""


def test_the_compilation_cache_hits_for_lowered_models(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is a test dependency")
    program = CACHE.format(folder=str(tmp_path)) + LOWERED
    found = [[line.split() for line in python(program).splitlines()] for _ in range(2)]
    for (value, hits, misses), (again, *second) in zip(*found, strict=True):
        assert value == again
        assert hits == "0"
        assert 1 <= int(misses) <= 4  # the model, and what jax compiles for itself
        assert second == [misses, "0"]


# --- lifetimes -----------------------------------------------------------------------------------


def released(*refs: weakref.ref[Any]) -> bool:
    # JAX's caches and C++ objects hold cycles of each other: a round frees what the next one sees.
    for _ in range(3):
        gc.collect()
        jax.clear_caches()
    gc.collect()
    return all(r() is None for r in refs)


class Weights:
    def __init__(self) -> None:
        self.w = torch.ones(4)

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        return torch.sin(a * self.w)


def use(f: Any, how: str) -> None:
    if how == "eager":
        f(X)
    elif how == "jit":
        jax.jit(f)(X)
    elif how == "grad":
        jax.grad(lambda a: f(a).sum())(X)
    elif how == "jit grad":
        jax.jit(jax.grad(lambda a: f(a).sum()))(X)
    elif how == "vmap":
        jax.vmap(f)(X[:, None] * np.ones(4, np.float32))
    elif how == "hessian":
        jax.jacrev(jax.grad(lambda a: f(a).sum()))(X)
    elif how == "lower":
        f.lower(X)
    elif how == "raises":
        with pytest.raises(TypeError):
            f(X, X)


@pytest.mark.parametrize(
    "how", ["nothing", "eager", "jit", "grad", "jit grad", "vmap", "hessian", "lower", "raises"]
)
@pytest.mark.parametrize("depth", [None, 2])
def test_callables_are_freed(how: str, depth: int | None) -> None:
    fn = Weights()
    ref, weight = weakref.ref(fn), weakref.ref(fn.w)
    f = torch2jax(fn, depth=depth)
    use(f, how)
    wrapper = weakref.ref(f)
    del f, fn
    assert released(ref, weight, wrapper)


def test_an_executable_keeps_its_callable() -> None:
    fn = Weights()
    ref = weakref.ref(fn)

    def compiled_gradient(f: Any) -> Any:
        return jax.jit(jax.grad(lambda a: f(a).sum())).lower(X).compile()

    compiled = compiled_gradient(torch2jax(fn))
    del fn
    assert not released(ref)
    np.testing.assert_allclose(compiled(X), np.cos(X), rtol=1e-5)
    del compiled
    assert released(ref)


def test_a_jaxpr_keeps_its_callable() -> None:
    f = torch2jax(Weights())
    jaxpr = jax.make_jaxpr(f)(X)
    del f
    gc.collect()
    jax.clear_caches()
    gc.collect()
    np.testing.assert_allclose(
        jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, X)[0], np.sin(X), rtol=1e-5
    )


def test_an_exception_of_fn_is_not_kept_for_long() -> None:
    class Marked(Exception):
        pass

    def fn(a: torch.Tensor) -> torch.Tensor:
        raise Marked("x")

    f = torch2jax(fn, output_shapes=torch.Size([4]))
    with pytest.raises(RuntimeError) as caught:
        f(X)
    ref = weakref.ref(caught.value.__cause__)
    del caught
    sys.last_value = None  # type: ignore[attr-defined]
    gc.collect()
    assert ref() is None


def test_arguments_are_not_kept() -> None:
    f = torch2jax(lambda a: torch.sin(a))
    x = jnp.arange(1000.0)
    ref = weakref.ref(x)
    jax.block_until_ready(jax.grad(lambda a: f(a).sum())(x))
    del x
    gc.collect()
    assert ref() is None


# --- import --------------------------------------------------------------------------------------


def test_import_changes_no_global_setting() -> None:
    out = python(
        """
import os, sys, warnings, logging
import jax, torch
def settings():
    return {
        "environment": dict(os.environ),
        "jax": dict(jax.config.values),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "torch": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads(),
                  torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch._C._len_torch_function_stack(), torch.get_rng_state().tolist()),
        "torch names": set(dir(torch)),
        "loggers": logging.root.level, "hooks": (sys.excepthook, sys.displayhook), "limit": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(), "path": list(sys.path),
        "array": {n for n in dir(jax.Array)}, "tensor": set(dir(torch.Tensor)),
    }
before = settings()
import torch2jax
after = settings()
print([k for k in before if before[k] != after[k]])
import jax._src.xla_bridge as xb
print(bool(xb._backends))
print(sorted(m for m in sys.modules if m.split(".")[0] in ("flax", "equinox", "torchax", "optax", "transformers")))
"""
    )
    changed, started, loaded = out.splitlines()
    assert changed == "[]"
    assert started == "False", "importing starts no backend: the user may still choose a platform"
    assert loaded == "[]"


def test_wrapping_starts_no_backend() -> None:
    out = python(
        """
import torch
from torch2jax import torch2jax
f = torch2jax(lambda a: a * 2)
import jax
import jax._src.xla_bridge as xb
print(bool(xb._backends))
"""
    )
    assert out.strip() == "False"


def test_public_names() -> None:
    for name in package.__all__:
        assert hasattr(package, name), name
    for name in ("torch2jax", "torch2jax_with_vjp", "torch2jax_without_vjp", "t2j", "j2t", "tree_t2j", "tree_j2t", "dtype_t2j",
                 "dtype_j2t", "Size", "Torch2JaxError", "SignatureError", "UnsupportedDtypeError", "DifferentiationError",
                 "TorchCallError", "__version__"):  # fmt: skip
        assert name in package.__all__, name
    errors = {package.SignatureError: TypeError, package.UnsupportedDtypeError: TypeError,
              package.DifferentiationError: TypeError, package.TorchCallError: RuntimeError}  # fmt: skip
    for error, base in errors.items():
        assert issubclass(error, base)
        assert issubclass(error, package.Torch2JaxError)
