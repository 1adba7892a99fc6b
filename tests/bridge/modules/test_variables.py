"""The variables of a module, wrong ones, and threads that share a module."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import Normed, array, close, mlp_twin, score
from torch import nn

from torch2jax import SignatureError, TorchCallError, from_module, to_state_dict


def test_variables_are_copies(mlp):
    module, apply, variables = mlp
    x = jnp.ones((1, 3))
    before = apply(variables, x)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    close(apply(variables, x), before, 0)
    assert float(abs(variables["params"]["0.weight"]).sum()) > 0
    state = to_state_dict(variables)
    state["0.weight"].zero_()
    assert float(abs(variables["params"]["0.weight"]).sum()) > 0


@pytest.mark.parametrize("with_module", [False, True])
def test_state_dict_round_trip(with_module):
    module = Normed()
    _, variables = from_module(module)
    moved = jax.tree.map(lambda p: p + 1, variables)
    state = to_state_dict(moved, module if with_module else None)
    other = Normed()
    other.load_state_dict(state)
    for (name, a), b in zip(other.state_dict().items(), module.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        close(array(a), array(b) + 1, 1e-6, name)
    _, again = from_module(other)
    assert jax.tree.structure(again) == jax.tree.structure(variables)


def test_wrong_variables(mlp):
    _, apply, variables = mlp
    x = jnp.ones((1, 3))
    params = dict(variables["params"])
    params["weights"] = params.pop("0.weight")
    with pytest.raises(SignatureError, match=r"missing: 0\.weight; unknown: weights"):
        apply({**variables, "params": params}, x)
    with pytest.raises(SignatureError, match="frozen"):
        apply(variables["params"], x)
    with pytest.raises(SignatureError, match="params"):
        apply(None, x)
    with pytest.raises(SignatureError, match=r"torch\.nn\.Module"):
        from_module(lambda x: x)
    with pytest.raises((SignatureError, TorchCallError), match="shape"):
        apply(variables, jnp.ones((1, 7)))
    close(apply(variables, x), mlp_twin(variables["params"], x))  # and the next call works


def test_wrong_argument_names(mlp):
    _, apply, variables = mlp
    with pytest.raises((SignatureError, TorchCallError), match="bogus"):
        apply(variables, jnp.ones((1, 3)), bogus=1)


def test_errors_in_forward_leave_replicas_whole():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.seen = []

        def forward(self, x, limit):
            y = self.linear(x)
            self.seen.append(1)
            if float(x.sum()) > float(limit):
                raise ArithmeticError("too much")
            return y * len(self.seen)

    apply, variables = from_module(Fails(), output_shapes=jax.ShapeDtypeStruct((1, 3), "float32"))
    x = jnp.ones((1, 3))
    good = apply(variables, x, 10.0)
    for _ in range(3):
        with pytest.raises(TorchCallError, match="too much"):
            jax.block_until_ready(apply(variables, x, 1.0))
        close(apply(variables, x, 10.0), good, 0)


def test_wrapping_twice_is_independent():
    module = nn.Linear(3, 3)
    (f, v), (g, w) = from_module(module), from_module(module)
    doubled = jax.tree.map(lambda p: 2 * p, w)
    x = jnp.ones((1, 3))
    close(2 * f(v, x), g(doubled, x))


def test_training_mode_of_the_module_does_not_matter():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    x = jnp.ones((1, 3))
    outs = []
    for mode in (True, False):
        module.train(mode)
        apply, variables = from_module(module)
        outs.append(apply(variables, x))
        assert module.training is mode
    close(outs[0], outs[1], 0)


def test_threads_share_a_module(mlp):
    _, apply, variables = mlp
    x = jnp.linspace(-1, 1, 15).reshape(5, 3)
    step = jax.jit(jax.value_and_grad(lambda p: score(apply({**variables, "params": p}, x))))
    scaled = [jax.tree.map(lambda p, k=k: p * k, variables["params"]) for k in (0.5, 1.0, 2.0)]
    expected = [jax.device_get(step(p)) for p in scaled]
    wrong: list[int] = []

    def work(first: int) -> None:
        for n in range(first, first + 100):
            out = jax.device_get(step(scaled[n % 3]))
            same = jax.tree.map(np.array_equal, out, expected[n % 3])
            if not all(jax.tree.leaves(same)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_variables_that_are_not_the_modules() -> None:
    module = torch.nn.Linear(2, 2)
    _, variables = from_module(module)
    with pytest.raises(SignatureError, match="got the key 'weight'"):
        to_state_dict(variables["params"])
    with pytest.raises(SignatureError, match="has no bias, weight"):
        to_state_dict(variables, torch.nn.Sequential(module))
    with pytest.raises(SignatureError, match="stochastic"):
        from_module(module, stochastic=True)
