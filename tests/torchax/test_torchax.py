"""Programs written for torchax and torch_xla2, on `torch2jax.torchax`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2jax import torchax

optax = pytest.importorskip("optax", reason="optax is a test dependency")


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 28 * 28)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def test_running_a_model() -> None:
    torchax.enable_globally()
    try:
        inputs = torch.randn(3, 3, 28, 28, device="jax")
        m = MyModel().to("jax")
        res = m(inputs)
        assert type(res) is torchax.tensor.Tensor
        assert res.jax().shape == (9, 10)
        assert torch.ones(2).device.type == "cpu"
        with torchax.disable_temporarily():
            assert not torchax.default_env().enabled
        assert torchax.default_env().enabled
    finally:
        torchax.disable_globally()
    assert not torchax.default_env().enabled
    torchax.disable_globally()  # once more is no error


def test_environment_and_to_xla() -> None:
    env = torchax.default_env()
    with env:
        inputs = torch.randn(3, 3, 28, 28, device="jax")
        res = MyModel().to("jax")(inputs)
    assert isinstance(res, torchax.tensor.Tensor)
    m, x = MyModel(), torch.randn(2, 784)
    expected = m(x).detach()
    with env:
        got = env.to_xla(m)(env.to_xla({"x": x})["x"])
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_jitted() -> None:
    m, x = MyModel().to("jax"), torch.randn(2, 784).to("jax")
    expected = m(x)

    def model_func(param: Any, inputs: Any) -> Any:
        return torch.func.functional_call(m, param, inputs)

    for run in (
        lambda: torchax.interop.jax_jit(model_func)(m.state_dict(), x),
        lambda: torchax.interop.JittableModule(m)(x),
        lambda: torchax.compile(m)(x),
    ):
        got = run()
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
    assert not torchax.interop.JittableModule(m)(x).requires_grad


def test_extract_jax_and_calls() -> None:
    m = MyModel()
    weights, fn = torchax.extract_jax(m)
    out = jax.jit(fn)(weights, (jnp.ones((1, 784)),))
    np.testing.assert_allclose(out, m(torch.ones(1, 784)).detach(), 1e-4, 1e-4)
    x: Any = torch.ones(3, device="jax")
    assert torchax.interop.call_jax(jnp.sum, x).item() == 3
    assert x.apply_jax(jnp.add, 1).tolist() == [2.0, 2.0, 2.0]
    x.apply_jax_(jnp.multiply, 3)
    assert x.tolist() == [3.0, 3.0, 3.0]
    x.shard_(jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with torchax.amp.autocast("jax", torch.bfloat16):
        assert (x[None] @ x[:, None]).dtype is torch.bfloat16


def test_training_and_checkpoints(tmp_path: Any) -> None:
    m = MyModel().to("jax")
    x, label = torch.randn(8, 784).to("jax"), torch.arange(8).to("jax")
    weights, buffers = dict(m.named_parameters()), dict(m.named_buffers())
    optimizer = optax.adam(1e-3)
    opt_state = torchax.interop.call_jax(optimizer.init, weights)

    def model_fn(weights: Any, buffers: Any, args: Any) -> Any:
        return torch.func.functional_call(m, {**weights, **buffers}, args)

    step = torchax.train.make_train_step(model_fn, F.cross_entropy, optimizer)
    step = torchax.interop.jax_jit(step)
    losses = []
    for _ in range(5):
        loss, weights, opt_state = step(weights, buffers, opt_state, x, label)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = {"weights": weights, "opt_state": opt_state, "epoch": 10}
    pytest.importorskip("orbax.checkpoint", reason="orbax is a test dependency")
    torchax.save_checkpoint(state, tmp_path / "checkpoint")
    loaded = torchax.load_checkpoint(tmp_path / "checkpoint", like=state)
    m.load_state_dict(loaded["weights"])
    assert torch.equal(m.fc1.weight, weights["fc1.weight"])
    assert type(loaded["opt_state"][0]) is type(opt_state[0])
    plain = torchax.load_checkpoint(tmp_path / "checkpoint")
    assert int(plain["epoch"]) == 10
    with pytest.raises(TypeError, match="state_dict"):
        torchax.save_checkpoint({"weights": m.parameters()}, tmp_path / "other")


def test_random_numbers_of_compiled_functions() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.randn_like(x)

    env = torchax.default_env()
    x = torch.ones(8, 8, device="jax")
    module = torchax.interop.JittableModule(Noise())
    assert not torch.equal(module(x), module(x))

    def drawn(seed: int) -> torch.Tensor:
        with env.override_property(prng=jax.random.key(seed)):
            return module(x)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    with module.with_rng(jax.random.PRNGKey(0)) as inner:
        assert torch.equal(inner(x), drawn(0))

    # a key in front of the arguments
    call = torchax.interop.jax_jit(
        lambda key, x: module.functional_call("forward", {}, {}, key, x),
        {"static_argnums": (), "donate_argnums": (1,)},
    )
    key = jax.random.PRNGKey(3)
    assert torch.equal(call(key, torch.ones(4, device="jax")), call(key, x[0, :4].clone()))

    @torchax.interop.jax_jit
    def seeded(seed: Any) -> torch.Tensor:
        env.manual_seed(seed)
        return torch.rand(3)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    before = env.prng_key
    assert jnp.array_equal(before, env.prng_key)
    assert jnp.array_equal(before, env.get_and_rotate_prng_key())
    assert not jnp.array_equal(before, env.prng_key)


def test_environment_as_a_decorator_and_its_properties() -> None:
    env = torchax.Environment()

    @env
    def entered() -> bool:
        return env.enabled

    assert entered()
    assert not env.enabled
    with env.override_property(mesh="a mesh", autocast_dtype=torch.bfloat16):
        assert (env.param.mesh, env.param.autocast_dtype) == ("a mesh", torch.bfloat16)
        assert (torch.ones(2, 2, device="jax") @ torch.ones(2, 2, device="jax")).dtype == (
            torch.bfloat16
        )
    assert (env.param.mesh, env.param.autocast_dtype) == (None, None)
    with pytest.raises(TypeError, match="autocast_dtype"):
        env.override_property(autocast=torch.bfloat16).__enter__()
    cpu = {"x": torch.arange(3), "n": 2}
    arrays = env.t2j_copy(cpu)
    assert isinstance(arrays["x"], jax.Array)
    assert arrays["n"] == 2
    assert env.j2t_copy(arrays)["x"].device.type == "cpu"
    assert env.t2j_iso(env.j2t_iso(arrays))["x"] is arrays["x"]
    linear, (x,) = env.to_xla((nn.Linear(2, 2), [torch.ones(2, requires_grad=True)]))
    assert linear.weight.device.type == x.device.type == "jax"
    assert x.is_leaf
    assert not x.requires_grad


def test_printed_operators(capsys: pytest.CaptureFixture[str]) -> None:
    env = torchax.Environment(torchax.config.Configuration(debug_print_each_op=True))
    with env:
        _ = torch.ones(2, 3, device="jax") + 1
    assert "aten.add.Tensor" in capsys.readouterr().err
    env.config.debug_print_each_op_operands = True
    with env:
        _ = torch.ones(2, 3, device="jax") + 1
    assert "aten.add.Tensor torch.float32[2, 3], 1" in capsys.readouterr().err


def test_autograd_does_not_see_torchax_calls() -> None:
    """A loop whose weights come from ``named_parameters`` would keep one graph for each step."""
    interop = torchax.interop
    w: Any = torch.ones(3, device="jax", requires_grad=True)
    compiled = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
    for out in (
        interop.call_jax(jnp.sin, w),
        interop.torch_view(jnp.sin)(w),
        interop.torch_view(compiled)(w),
        interop.jax_jit(torch.sin)(w),
        interop.wrap_jax_jit(torch.sin)(w),
        interop.jax_value_and_grad(lambda w: w.sum())(w)[1],
        interop.JittableModule(nn.Linear(3, 2).to("jax"))(w),
    ):
        assert not out.requires_grad
        assert out.grad_fn is None
    assert interop.j2t_autograd(jnp.sin)(w).requires_grad
    with torch.no_grad():
        assert not interop.j2t_autograd(jnp.sin)(w).requires_grad


def test_a_training_loop_keeps_nothing() -> None:
    import gc

    model = nn.Linear(4, 4).to("jax")
    weights, x = dict(model.named_parameters()), torch.ones(2, 4, device="jax")
    optimizer = optax.adam(1e-3)
    state = torchax.interop.call_jax(optimizer.init, weights)
    step = torchax.train.make_train_step(
        lambda w, b, x: torch.func.functional_call(model, {**w, **b}, x), F.mse_loss, optimizer
    )
    step = torchax.interop.jax_jit(step)
    alive = []
    for i in range(1000):
        _, weights, state = step(weights, {}, state, x, x)
        if i in (20, 999):
            gc.collect()
            alive.append(len(jax.live_arrays()))
    assert alive[0] == alive[1]


def test_an_environment_promotes_as_torchax_does() -> None:
    env = torchax.Environment()
    x, cpu = torch.ones(2, 2, device="jax"), torch.ones(2, 2)
    half, index = x.bfloat16(), torch.tensor([[0], [1]], dtype=torch.int32, device="jax")
    with env:
        assert F.one_hot(index[:, 0], 2).tolist() == [[1, 0], [0, 1]]
        assert torch.take_along_dim(x, index, 1).tolist() == [[1.0], [1.0]]
        assert x.take_along_dim(index, 1).tolist() == [[1.0], [1.0]]
        for product in (
            x @ half, half @ x, torch.mm(x, half), F.linear(half, x), torch.matmul(half, x),
            F.scaled_dot_product_attention(x[None], half[None], half[None]),
            torch.einsum("ij,jk->ik", x, half), F.linear(half, x, bias=x[0]),
        ):  # fmt: skip
            assert product.dtype is torch.float32
        assert (x + torch.tensor([2.0])).tolist() == [[3.0, 3.0], [3.0, 3.0]]
        with pytest.raises(RuntimeError, match="same device"):
            _ = cpu + x
        assert torch.zeros(2, device="cuda").device.type == "jax"
        assert cpu.cuda().device.type == cpu.to("cuda").device.type == "jax"
        assert cpu.to(torch.device("cuda:0"), torch.int32).device.type == "jax"
        env.config.treat_cuda_as_jax_device = False
        assert torch.zeros(2, device="meta").device.type == "meta"
        kept = torch.zeros(3)
        kept.numpy()[0] = 5
        assert kept.tolist() == [5.0, 0.0, 0.0]
    with pytest.raises(RuntimeError, match="same dtype"):
        _ = x @ half


def test_functions_under_torch_compile_run_as_they_are() -> None:
    import torch._dynamo

    @torch.compile
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    x = torch.zeros(2, device="jax")
    with torchax.default_env():
        assert compiled(x).tolist() == [1.0, 1.0]
        assert torch.compile(nn.Linear(2, 3).to("jax"))(x).shape == (3,)
    assert torchax.interop.jax_jit(compiled)(x).tolist() == [1.0, 1.0]


def test_a_function_is_overridden_in_an_environment_that_is_entered_already() -> None:
    env = torchax.enable_globally()
    x = torch.ones(2, device="jax")
    try:
        env.override_op_definition(F.hardswish, lambda x, inplace=False: x * 100)
        assert F.hardswish(x).tolist() == [100.0, 100.0]
    finally:
        del env._ops[F.hardswish]
        torchax.disable_globally()
    assert F.hardswish(x).tolist() != [100.0, 100.0]


def test_overridden_operators() -> None:
    env = torchax.Environment()
    env.override_op_definition(F.gelu, lambda x, approximate="none": x * 100)
    x = torch.ones(3, device="jax")
    with env:
        assert F.gelu(x).tolist() == [100.0] * 3
    assert F.gelu(x).tolist() != [100.0] * 3

    shared = torchax.default_env()
    shared.override_op_definition(F.silu, lambda x, inplace=False: x * 7)
    try:
        assert torchax.interop.jax_jit(lambda x: F.silu(x))(x).tolist() == [7.0] * 3
    finally:
        del shared._ops[F.silu]

    with torch.library._scoped_library("torch2jax_test", "DEF") as library:
        library.define("shout(Tensor x) -> Tensor")
        shared.override_op_definition(torch.ops.torch2jax_test.shout, lambda x: x + 41)
        assert torch.ops.torch2jax_test.shout(x).tolist() == [42.0] * 3


def test_views_of_trees_functions_and_dtypes() -> None:
    interop = torchax.interop
    assert interop.jax_view([torch.bfloat16, 3]) == [jnp.dtype("bfloat16"), 3]
    assert interop.torch_view(jnp.dtype("int32")) is torch.int32
    key = jax.random.key(0)
    assert interop.torch_view({"key": key})["key"] is key
    x = torch.arange(3.0, device="jax")
    total = interop.fori_loop(0, 4, lambda i, c: c * 2 + x, torch.zeros(3, device="jax"))
    assert total.tolist() == [0.0, 15.0, 30.0]
    f = jax.jit(interop.jax_view(torch.matmul))
    with torchax.amp.autocast("jax", torch.bfloat16, env=torchax.default_env()):
        assert f.lower(jnp.ones((2, 2)), jnp.ones((2, 2))).out_info.dtype == jnp.bfloat16
    assert interop.call_jax(lambda x: None, x) is None
    assert interop.call_torch(lambda f, x: f(x), jnp.sin, jnp.zeros(2)).tolist() == [0.0, 0.0]


def test_transforms_take_the_options_as_a_dict() -> None:
    interop = torchax.interop
    x: Any = torch.arange(4.0, device="jax", requires_grad=True)
    f = interop.jax_value_and_grad(lambda x, y: ((x * y).sum(), y), {"argnums": 1, "has_aux": True})
    (value, aux), grad = f(x, x)
    assert (value.item(), aux.tolist()) == (14.0, grad.tolist())
    assert not value.requires_grad
    again = interop.gradient_checkpoint(torch.sin, {"prevent_cse": False})
    total = interop.jax_value_and_grad(lambda x: again(x).sum())
    torch.testing.assert_close(total(x)[1].cpu(), x.detach().cpu().cos())
    y = x.detach().requires_grad_()
    interop.j2t_autograd(jnp.square)(y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [0.0, 2.0, 4.0, 6.0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    mapped = interop.jax_shard_map(torch.cos, {"mesh": mesh, "in_specs": rows, "out_specs": rows})
    torch.testing.assert_close(mapped(y.detach()).cpu(), y.detach().cpu().cos())
    sharding = jax.sharding.NamedSharding(mesh, rows)
    placed = interop.jax_jit(
        lambda a, b: torch.add(a, b), {"in_shardings": (sharding, sharding), "donate_argnums": 0}
    )
    assert placed(y.detach().clone(), y.detach()).tolist() == [0.0, 2.0, 4.0, 6.0]

    @interop.jax_jit
    def marked(x: Any) -> torch.Tensor:
        x = torchax.train.mark_sharding(x + 1, sharding)
        x.shard_(sharding)
        return torchax.train.remat(torch.sin)(x)

    torch.testing.assert_close(marked(y.detach()).cpu(), (y.detach().cpu() + 1).sin())


def test_a_jittable_module_is_its_module() -> None:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(3)

    class Parent(MyModel):
        def __init__(self) -> None:
            super().__init__()
            self.fc4 = self.fc3
            self.fc1.weight.requires_grad_(False)
            self.child = Child()
            self.register_buffer("step", torch.zeros(()))
            self.scale = 2.0

        def scaled(self, x: torch.Tensor, *, by: Any = None) -> torch.Tensor:
            return x * self.scale * self.child.table * by

    module: Any = torchax.interop.JittableModule(Parent().to("jax"))
    assert isinstance(torchax.compile(Parent()), Parent)
    assert module.scale == 2.0
    assert not isinstance(torchax.compile(nn.ReLU()), Parent)
    names = {"fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"}
    assert set(module.params) == names
    assert set(module.buffers) == {"fc1.weight", "step", "child.table"}
    x = torch.randn(2, 784).to("jax")
    torch.testing.assert_close(module(x), module._model(x), rtol=1e-4, atol=1e-4)
    module.make_jitted("scaled")  # its table is on the CPU: a constant
    one = torch.ones(3, device="jax")
    assert module.scaled(one, by=one * 3).tolist() == [6.0] * 3
    assert module.jittable_call("scaled", one, by=one).tolist() == [2.0] * 3
    module.params = {k: torch.zeros_like(v) for k, v in module.params.items()}
    assert module(x).abs().sum().item() == 0
    doubled = module.functional_call(lambda m, x: x * m.scale, module.params, module.buffers, one)
    assert doubled.tolist() == [2.0] * 3
    with pytest.raises(TypeError, match="int"):
        module.functional_call(3, {}, {}, one)  # pyright: ignore
    set_to = {"fc1.bias": torch.ones(120)}
    torchax.interop.set_all_buffers(module._model, set_to, {"child.table": torch.zeros(3)})
    assert isinstance(module._model.fc1.bias, nn.Parameter)
    assert module._model.child.table.sum().item() == 0
    with pytest.raises(ValueError, match=r"torch\.compile"):
        torchax.compile(module, torchax.CompileOptions(mode="dynamo"))
    options = torchax.CompileOptions(methods_to_compile=["scaled"])
    assert "scaled" in torchax.compile(Parent().to("jax"), options)._jitted


def test_layers_as_a_scan() -> None:
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    x = torch.randn(2, 5)
    expected = x
    for layer in layers:
        expected = layer(expected)
    expected.sum().backward()
    scanned = torchax.train.ScannedModule(layers).to("jax")
    assert set(scanned.state_dict()) == {"params.0___weight", "params.0___bias"}
    out = scanned(x.to("jax"))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
    grads = torchax.interop.jax_value_and_grad(
        lambda p, x: torch.func.functional_call(scanned, p, x).sum()
    )(dict(scanned.named_parameters()), x.to("jax"))[1]
    grad = torch.stack([layer[0].weight.grad for layer in layers])  # pyright: ignore
    torch.testing.assert_close(grads["params.0___weight"].cpu(), grad, rtol=1e-4, atol=1e-4)
    again = torchax.interop.jax_jit(lambda p, x: torch.func.functional_call(scanned, p, x))
    torch.testing.assert_close(
        again(dict(scanned.named_parameters()), x.to("jax")).cpu(), out.cpu()
    )
    with pytest.raises(ValueError, match="one layer"):
        torchax.train.ScannedModule([])


def test_a_flax_module() -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is a test dependency")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, *, scale: float = 1.0) -> Any:
            return linen.Dense(2)(linen.relu(linen.Dense(3)(x))) * scale

    env, x = torchax.default_env(), jnp.ones((4, 5))
    variables = Net().init(env.prng_key, x)
    module = torchax.flax.FlaxNNModule(env, Net(), (x,))
    assert set(module.state_dict()) == {
        f"_params.params.Dense_{i}.{name}" for i in (0, 1) for name in ("kernel", "bias")
    }
    out = module(torch.ones(4, 5, device="jax"), scale=2.0)
    np.testing.assert_allclose(out.jax(), Net().apply(variables, x, scale=2.0), rtol=1e-5)
    expected = jax.grad(lambda v: Net().apply(v, x, scale=2.0).sum())(variables)
    grads = torchax.interop.jax_value_and_grad(
        lambda p, x: torch.func.functional_call(module, p, (x,), {"scale": 2.0}).sum()
    )(dict(module.named_parameters()), torch.ones(4, 5, device="jax"))[1]
    for name, g in grads.items():
        *_, layer, kind = name.split(".")
        np.testing.assert_allclose(g.cpu(), expected["params"][layer][kind], rtol=1e-5, atol=1e-6)


def test_tensors_made_and_changed() -> None:
    Tensor: Any = torchax.tensor.Tensor
    x = Tensor(jnp.arange(6.0).reshape(2, 3), torchax.default_env())
    assert type(x) is Tensor
    assert x.jax_device == jax.devices()[0]
    assert type(x.torch()) is torch.Tensor
    assert x.torch().device.type == "cpu"
    row: Any = x[0]
    assert isinstance(x[0], torchax.view.View)
    row.apply_jax_(jnp.add, 10)
    assert x.tolist() == [[10.0, 11.0, 12.0], [3.0, 4.0, 5.0]]
    with pytest.raises(ValueError, match="apply_jax makes"):
        row.apply_jax_(jnp.sum)
    x.apply_jax_(lambda a: a.sum(0).astype(jnp.int32))
    assert (tuple(x.shape), x.dtype, x.tolist()) == ((3,), torch.int32, [13, 15, 17])
    assert Tensor(jnp.ones(2), requires_grad=True).requires_grad
    w = torch.ones(2, device="jax", requires_grad=True)
    y: Any = w.exp()
    y.apply_jax_(jnp.multiply, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# One warning says that 64-bit values are switched off, as in torchax.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_float64_is_float32_within_the_environment() -> None:
    f32 = torch.float32
    before = torch.ones(2, dtype=torch.float64, device="jax")
    net = nn.Linear(3, 2).double()
    with torchax.default_env():
        x = torch.ones(3, device="jax", requires_grad=True)
        made = {
            "double": x.double(),
            "to": x.to(torch.float64),
            "type": x.type(torch.float64),
            "arange": torch.arange(3.0, dtype=torch.float64, device="jax"),
            "tensor": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device="jax"),
            "sum": x.sum(dtype=torch.float64),
            "moved": torch.ones(3, dtype=torch.float64).to("jax"),
            "operands": x * torch.tensor(2.0, dtype=torch.float64),
            "several": torch.split(x, 1)[0].double(),
            "module": net.to("jax").weight,
        }
        assert {name: y.dtype for name, y in made.items()} == dict.fromkeys(made, f32)
        assert torch.ones(2, dtype=torch.complex128, device="jax").dtype is torch.complex64
        assert made["double"].detach().numpy().dtype == np.float32
        (made["double"] * made["arange"]).sum().backward()
        assert x.grad is not None
        assert (x.grad.tolist(), x.grad.dtype) == ([0.0, 1.0, 2.0], f32)
        leaf = torch.ones(2, dtype=torch.float64, device="jax", requires_grad=True)
        assert (leaf.is_leaf, leaf.requires_grad, leaf.dtype) == (True, True, f32)
        # One that was there before is written to, and so are its views.
        assert before.add_(1) is before
        before[0].mul_(3)
        assert (before.tolist(), before.dtype) == ([6.0, 2.0], torch.float64)
        assert torch.ones(2, dtype=torch.float64).dtype is torch.float64  # on the CPU
    assert torchax.interop.jax_jit(lambda x: x + x.double())(x).dtype is f32
    assert x.double().dtype is torch.float64


def test_accuracy_and_performance_mode() -> None:
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision  # pyright: ignore
    try:
        torchax.enable_accuracy_mode()
        x: Any = torch.ones(2, dtype=torch.float64, device="jax")
        assert x.jax().dtype == np.float64
        torchax.enable_performance_mode()
        x = torch.arange(2, device="jax")
        assert x.jax().dtype == np.int32
    finally:
        jax.config.update("jax_enable_x64", before[0])
        jax.config.update("jax_default_matmul_precision", before[1])


def test_lists_of_static_and_other_arguments() -> None:
    given = [1, "a", 2.5, "b"]
    parts = torchax.util.partition(given, lambda x: isinstance(x, str))
    assert parts == ([None, "a", None, "b"], [1, None, 2.5, None])
    assert torchax.util.merge(*parts) == given


def test_tied_parameters_are_one_array() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(x))

    module, x = Tied(), torch.tensor([0, 6])
    weights, fn = torchax.extract_jax(module, tie_weights=True)
    assert set(weights) == {"emb.weight"}
    doubled = {"emb.weight": weights["emb.weight"] * 2}
    np.testing.assert_allclose(
        fn(doubled, (jnp.asarray([0, 6]),)), 4 * module(x).detach(), rtol=1e-5, atol=1e-6
    )


def test_a_part_with_two_names_keeps_its_parameters() -> None:
    module = nn.Sequential(linear := nn.Linear(2, 2), linear)
    x, weight = torch.ones(1, 2), linear.weight
    expected = module(x)
    weights, fn = torchax.extract_jax(module)
    np.testing.assert_allclose(
        jax.jit(fn)(weights, (jnp.ones((1, 2)),)), expected.detach(), rtol=1e-5, atol=1e-6
    )
    assert linear.weight is weight
    torch.testing.assert_close(module(x), expected)


def test_checkpoints_of_many_steps(tmp_path: Any) -> None:
    pytest.importorskip("orbax.checkpoint", reason="orbax is a test dependency")
    path = tmp_path / "run"
    state = {"model": nn.Linear(2, 2).state_dict(), "epoch": 1}
    torchax.save_checkpoint(state, path, step=1)
    torchax.save_checkpoint({**state, "epoch": 2}, path, step=10)
    torchax.save_checkpoint({**state, "epoch": 3}, path, 10)
    loaded = torchax.load_checkpoint(path)
    assert int(loaded["epoch"]) == 3
    nn.Linear(2, 2).to("jax").load_state_dict(loaded["model"])
    assert torch.equal(loaded["model"]["weight"].cpu(), state["model"]["weight"])
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint_1", "checkpoint_10"]
    with pytest.raises(FileNotFoundError):
        torchax.load_checkpoint(tmp_path / "nothing")
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"torch\.load"):
        torchax.load_checkpoint(tmp_path / "file.pt")


def test_an_unchanged_import(installed: None) -> None:
    import torch_xla2  # pyright: ignore
    import torchax as theirs  # pyright: ignore
    from torchax import amp, checkpoint, config, flax, tensor, train, util, view  # noqa: F401  # pyright: ignore
    from torchax.export import exported_program_to_jax  # noqa: F401  # pyright: ignore
    from torchax.interop import JittableModule, jax_jit  # noqa: F401  # pyright: ignore
    from torchax.mesh_util import Mesh  # noqa: F401  # pyright: ignore
    from torchax.ops.mappings import t2j_dtype  # noqa: F401  # pyright: ignore

    assert theirs is torch_xla2 is torchax


# --- exported programs ---------------------------------------------------------------------------


def test_exported_programs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(5, 4)
    expected = model(x).detach()
    rows = torch.export.Dim("rows", max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    states, fn = torchax.export.exported_program_to_jax(program)
    names, raw, _ = torchax.export.exported_program_to_jax(program, export_raw=True)
    assert len(names) == len(raw) == len(states)
    assert {"0.weight", "0.bias", "1.running_mean"} <= set(names)
    (got,) = jax.jit(fn)(states, (jnp.asarray(x.numpy()),))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    (aval,) = torchax.export.extract_avals(program)
    assert aval.dtype == np.float32
    assert not isinstance(aval.shape[0], int)
    weights, exported = torchax.export.exported_program_to_stablehlo(program)
    assert "stablehlo" in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    for n in (5, 2):
        (out,) = again.call(weights, (jnp.asarray(x[:n].numpy()),))
        np.testing.assert_allclose(out, expected[:n], rtol=1e-5, atol=1e-5)


def test_an_exported_program_of_keyword_arguments() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, *, by: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x * by}

    x, by = torch.ones(2), torch.tensor([2.0, 3.0])
    program = torch.export.export(Scaled(), (x,), {"by": by})
    states, fn = torchax.export.exported_program_to_jax(program)
    assert states == []
    (out,) = fn(states, (jnp.ones(2),), {"by": jnp.asarray([2.0, 3.0])})
    assert out.tolist() == [2.0, 3.0]
    weights, exported = torchax.export.exported_program_to_stablehlo(program)
    out = exported.call(weights, (jnp.ones(2),), {"by": jnp.asarray([2.0, 3.0])})
    assert out[0].tolist() == [2.0, 3.0]


# --- operators of one's own ----------------------------------------------------------------------


def test_registered_operators() -> None:
    registry = torchax.ops.ops_registry
    env = torchax.default_env()
    x = torch.ones(3, device="jax")
    with torch.library._scoped_library("torch2jax_test", "FRAGMENT") as library:
        library.define("plus(Tensor x, int n) -> Tensor")
        library.define("minus(Tensor x) -> Tensor")
        ops: Any = torch.ops.torch2jax_test
        registry.register_torch_dispatch_op(ops.plus.default, lambda x, n: x + n)
        assert ops.plus(x, 4).tolist() == [5.0] * 3
        registry.register_torch_dispatch_op(
            ops.minus, lambda x, env: x - len(env._definitions), False, needs_env=True
        )
        assert ops.minus(x).tolist() == [1.0 - len(env._definitions)] * 3
    registry.register_torch_function_op(F.selu, lambda x, inplace=False: jnp.sin(x))
    try:
        with env:
            np.testing.assert_allclose(F.selu(x).jax(), np.sin(np.ones(3)), rtol=1e-6)  # pyright: ignore
    finally:
        del env._ops[F.selu]


def test_mappings() -> None:
    mappings = torchax.ops.mappings
    x = torch.arange(3.0)
    array = mappings.t2j(x)
    assert array.tolist() == [0.0, 1.0, 2.0]
    x.add_(1)
    assert array.tolist() == [0.0, 1.0, 2.0]
    back = mappings.j2t(array)
    assert back.device.type == "cpu"
    assert back.add_(1).tolist() == [1.0, 2.0, 3.0]
    assert array.tolist() == [0.0, 1.0, 2.0]
    assert mappings.t2j_dtype(torch.bfloat16) == jnp.bfloat16
    assert mappings.j2t_dtype(jnp.dtype("int8")) is torch.int8
    t = torch.ones(2, device="jax")
    assert mappings.t2j(t) is t.jax()  # pyright: ignore


# --- meshes --------------------------------------------------------------------------------------

MESHES = """
import jax, numpy as np, torch
from jax.sharding import PartitionSpec as P
from torch2jax import torchax
from torch2jax.torchax.mesh_util import Mesh, SingleAxisSharder

def net(width, bias=True):
    return torch.nn.Sequential(torch.nn.Linear(6, width, bias=bias), torch.nn.Linear(width, 3))

mesh = Mesh.fsdp_mesh()
assert mesh.jax_mesh.axis_names == ("fsdp",) and mesh.jax_mesh.size == 4
torch.manual_seed(0)
model = mesh.initialize_model_sharded(net, (8,), {"bias": False})
spec = lambda x: tuple(x.jax().sharding.spec)
shards = lambda x: {s.data.shape for s in x.jax().addressable_shards}
assert spec(model[0].weight) == ("fsdp", None), spec(model[0].weight)
assert shards(model[0].weight) == {(2, 6)} and shards(model[1].weight) == {(3, 2)}
assert shards(model[1].bias) == {(3,)}  # 3 is not divisible

plain = net(8)
x = torch.randn(5, 6)
expected = plain(x)
expected.sum().backward()
moved = mesh.shard_model(plain)
assert moved is plain and shards(plain[0].weight) == {(2, 6)}
everywhere = jax.sharding.NamedSharding(moved[0].weight.jax().sharding.mesh, P())
out = plain(x.to("jax").shard_(everywhere))
np.testing.assert_allclose(out.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)

strict = SingleAxisSharder("fsdp", 4)
assert strict("w", jax.ShapeDtypeStruct((3, 8), np.float32)) == P(None, "fsdp")
assert strict("w", jax.ShapeDtypeStruct((3, 8, 5), np.float32)) == P(None, "fsdp", None)
try:
    mesh.initialize_model_sharded(net, (8,), override_sharder=strict)
except AssertionError as error:
    assert "1.bias" in str(error), error
else:
    raise SystemExit("no error")

two = Mesh(jax.make_mesh((2, 2), ("data", "model")))
try:
    two.shard_model(net(8))
except ValueError as error:
    assert "needs a sharder" in str(error)
else:
    raise SystemExit("no error")
split = Mesh(two.jax_mesh, lambda name, x: P("model", "data") if len(x.shape) == 2 and x.shape[0] == 8 else P())
model = split.shard_model(net(8))
assert shards(model[0].weight) == {(4, 3)} and shards(model[1].weight) == {(3, 8)}
print("done")
"""


def test_meshes_of_four_devices() -> None:
    import os
    import subprocess
    import sys

    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", MESHES], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout.strip() == "done", done.stderr
