"""Results on a GPU are those of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .common import Found, device, on_gpu


def dtypes() -> Found:
    """An identity function of every dtype, and the way there and back."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import dtype_t2j, j2t, t2j, torch2jax

    short = "bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32 complex64 "
    short += "float8_e4m3fn float8_e5m2"
    long = "int64 uint64 float64 complex128"
    for names, x64 in ((short, False), (long, True)):
        jax.config.update("jax_enable_x64", x64)
        try:
            for name in names.split():
                x = jnp.asarray([0, 1, 2, 3]).astype(dtype_t2j(getattr(torch, name)))
                y = jax.jit(torch2jax(lambda x: x.clone()))(x)
                assert y.dtype == x.dtype, (name, y.dtype)
                assert y.devices() == x.devices()
                np.testing.assert_array_equal(np.asarray(y), np.asarray(x))
                z = t2j(j2t(x))
                assert (z.dtype, z.unsafe_buffer_pointer()) == (x.dtype, x.unsafe_buffer_pointer())
        finally:
            jax.config.update("jax_enable_x64", False)
    return {"dtypes": ", ".join(short.split()), "dtypes with x64 on": ", ".join(long.split())}


def conversions() -> Found:
    """`t2j` and `j2t` share memory on the device; a transposed tensor is copied there."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import j2t, t2j

    tensor = torch.arange(64.0, device=device()).reshape(8, 8)
    array = t2j(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = j2t(jnp.arange(64.0))
    assert back.device.type == device()
    np.testing.assert_array_equal(np.asarray(t2j(tensor.T)), tensor.T.cpu().numpy())
    assert t2j(tensor.T).unsafe_buffer_pointer() != tensor.data_ptr()
    source = jnp.arange(8.0)
    assert j2t(source).data_ptr() == source.unsafe_buffer_pointer()
    flat = tensor.reshape(-1)
    total = jax.jit(jnp.sum)
    for start in range(9):  # XLA refuses an operand that is not aligned
        assert float(total(t2j(flat[start:]))) == float(flat[start:].sum())
    return {
        "conversions": "`t2j` and `j2t` share the device's memory; a transposed tensor is copied",
        "unaligned": "slices of a tensor that begin at any element are operands of a program",
    }


def transforms() -> Found:
    """Each transform beside the same function in `jax.numpy`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import torch2jax

    f = torch2jax(lambda x, w: (torch.tanh(x) * w).sum() + (x**3).mean())

    def twin(x: jax.Array, w: jax.Array) -> jax.Array:
        return (jnp.tanh(x) * w).sum() + (x**3).mean()

    x, w = jnp.linspace(-1.0, 1.0, 12), jnp.linspace(0.5, 2.0, 12)
    rows = jnp.stack([x, 2 * x, -x])
    every: dict[str, Callable[[Any], Any]] = {
        "grad": lambda f: jax.grad(f, (0, 1))(x, w),
        "jvp": lambda f: jax.jvp(f, (x, w), (w, x)),
        "hessian": lambda f: jax.hessian(f)(x, w),
        "third derivative": lambda f: jax.jacfwd(jax.hessian(f))(x, w),
        "vmap": lambda f: jax.vmap(f, (0, None))(rows, w),
        "vmap(grad)": lambda f: jax.vmap(jax.grad(f), (0, None))(rows, w),
        "jacrev": lambda f: jax.jacrev(lambda x: jax.vmap(f, (None, 0))(x, rows))(x),
        "scan": lambda f: jax.lax.scan(lambda c, r: (c + f(c * r, w), c), 0.1, rows)[0],
        "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(x, w),
    }
    for name, transform in every.items():
        got, want = jax.jit(lambda t=transform: t(f))(), transform(twin)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name)
    return {"transforms under jit": ", ".join(every)}


def tape() -> Found:
    """The forward pass runs once; the graph of every token is found."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import tape_info, torch2jax

    calls: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.exp(x).sum()

    step = jax.jit(jax.value_and_grad(torch2jax(fn)))
    x = jnp.linspace(0.0, 1.0, 1000)
    jax.block_until_ready(step(x))
    before, _ = tape_info(), calls.clear()
    for _ in range(100):
        _, gradient = jax.block_until_ready(step(x))
    after = tape_info()
    assert jnp.allclose(gradient, jnp.exp(x), rtol=1e-5)
    assert len(calls) == 100, len(calls)
    assert (after.hits - before.hits, after.misses - before.misses, after.entries) == (100, 0, 0)
    return {"tape": "100 steps: 100 forward passes, 100 hits, no miss, no graph left"}


def randomness() -> Found:
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    drop = torch2jax(lambda x: torch.nn.functional.dropout(x, 0.5), stochastic=True)
    x, key = jnp.arange(1.0, 1001.0), jax.random.key(0)
    first = drop(x, rng=key)
    assert (first == jax.jit(drop)(x, rng=key)).all()
    assert (jax.grad(lambda x: drop(x, rng=key).sum())(x) * x == first).all()
    assert not (first == drop(x, rng=jax.random.key(1))).all()
    keyless = torch2jax(lambda x: torch.nn.functional.dropout(x, 0.5))
    compiled = jax.jit(keyless)
    draws = [keyless(x), keyless(x), compiled(x), compiled(x)]
    for i, a in enumerate(draws):
        assert 0 < int((a != 0).sum()) < x.size
        assert not any(bool((a == b).all()) for b in draws[:i])
    return {
        "randomness": "one key, one mask: eager, jit and gradient",
        "randomness without a key": "four calls, eager and compiled, four masks",
    }


def values_of_the_host() -> Found:
    """Numbers and CPU tensors in results."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import torch2jax

    def fn(x: torch.Tensor) -> Any:
        return x.sum(), 3.0, torch.arange(3), torch.full((2, 2), 7.0)

    f = torch2jax(fn)
    x = jnp.arange(4.0)
    for call in (f, jax.jit(f)):
        total, number, count, filled = call(x)
        assert (float(total), float(number)) == (6.0, 3.0)
        np.testing.assert_array_equal(count, np.arange(3))
        np.testing.assert_array_equal(filled, np.full((2, 2), 7.0))
        assert all(y.devices() == x.devices() for y in (total, number, count, filled))
    return {
        "results from the host": "a Python number, and tensors that the function made on the CPU"
    }


def placement() -> Found:
    """What comes from the CPU is where JAX computes, and committed to nothing."""
    import jax.numpy as jnp
    import torch

    import torch2jax
    from torch2jax import from_module, t2j

    there = jnp.ones(1).devices()
    torch2jax.device.enable()
    linear = torch.nn.Linear(3, 3)
    _, variables = from_module(linear)
    x = torch.ones(2, 3)
    expected = linear(x).detach()
    made = {
        "t2j": t2j(x),
        "from_module": variables["params"]["weight"],
        "tensor.to": x.to("jax").jax(),
        "module.to": linear.to("jax").weight.jax(),
    }
    for way, array in made.items():
        assert array.devices() == there, (way, array.devices())
        assert not array.committed, way
    y = linear(x.to("jax"))
    y.sum().backward()
    assert y.jax().devices() == linear.weight.grad.jax().devices() == there
    torch.testing.assert_close(y.cpu().detach(), expected, rtol=1e-4, atol=1e-4)
    told = f"{', '.join(made)} of what is on the CPU: on {next(iter(there))}, committed to nothing"
    return {"placement": told, "module.to": "forward and backward on device jax, as on the CPU"}


def jax_in_pytorch() -> Found:
    """`jax2torch`, forward and backward, on tensors of the device."""
    import jax.numpy as jnp
    import torch

    from torch2jax import jax2torch

    f = jax2torch(lambda x, w: {"y": jnp.sin(x) @ w})
    x, w = (torch.randn(*s, device=device(), requires_grad=True) for s in ((32, 16), (16, 8)))
    y = f(x, w)["y"]
    gradients = torch.autograd.grad((y**2).sum(), (x, w))
    expected = torch.sin(x) @ w
    wanted = torch.autograd.grad((expected**2).sum(), (x, w))
    for a, b in zip((y, *gradients), (expected, *wanted), strict=True):
        assert a.device == x.device
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    second = torch.func.hessian(lambda x: f(x, w.detach())["y"].sum())(x.detach()[:1])
    assert second.device == x.device
    return {"jax2torch": "forward, backward and a Hessian as PyTorch's own"}


def compiled_inside() -> Found:
    """`torch.compile` inside the function; on a GPU by CUDA graphs."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import torch2jax

    how: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu() else {"backend": "aot_eager"}
    inner = torch.compile(lambda x: torch.sin(x) * torch.cos(x) + x, **how)
    shape = jax.ShapeDtypeStruct((256,), jnp.float32)
    f = jax.jit(torch2jax(lambda x: inner(x).clone(), output_shapes=shape))
    for i in range(5):
        x = jnp.linspace(0.0, 1.0 + i, 256)
        np.testing.assert_allclose(f(x), jnp.sin(x) * jnp.cos(x) + x, rtol=1e-4, atol=1e-5)
    told = ", ".join(f"{name}={value}" for name, value in how.items())
    return {f"torch.compile({told}) inside": "five calls, right each time"}
