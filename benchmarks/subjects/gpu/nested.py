"""What JAX compiles inside of a call on a GPU. See docs/devices.md.

A process that hangs here is ended, and the page says so: each check has a process of its own.
"""

from __future__ import annotations

from .common import Found, on_gpu


def refused_compile() -> Found:
    """A function of `jax2torch` that has never run is refused there; one that has run is not."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import j2t, jax2torch, torch2jax

    product = jax2torch(lambda x: x @ x)
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    f = torch2jax(lambda x: product(x.clone()).clone(), output_shapes=shape)
    x = jnp.eye(64) * 2
    told = "runs on a CPU"
    if on_gpu():
        said = ""
        try:
            jax.block_until_ready(f(x))
        except Exception as error:
            said = str(error)
        assert "for the first time" in said, said or "it was compiled inside of the call"
        told = "is refused before its first run, and runs after it"
    product(j2t(x).clone())
    np.testing.assert_allclose(f(x), np.eye(64) * 4)
    assert isinstance(product(torch.eye(64, device=j2t(x).device)), torch.Tensor)
    return {"jax2torch inside of a call": told}


def own_compile() -> Found:
    """A jitted function of the user's own, which cannot be seen, compiles inside of a call."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from torch2jax import j2t, t2j, torch2jax

    inner = jax.jit(lambda x: x @ x)
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    f = torch2jax(lambda x: j2t(inner(t2j(x.clone()))).clone(), output_shapes=shape)
    np.testing.assert_allclose(f(jnp.eye(256) * 2), np.eye(256) * 4)
    return {"a jitted function compiled inside of a call": "ended, this time"}
