"""Device "jax" beyond single operators: scan, shardings, checkpoints, exported programs, compilers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn

import torch2jax as package
from torch2jax import SignatureError, device, torch2jax

pytestmark = pytest.mark.optimized

device.enable()


# --- scan ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Parameters, statistics, and a second argument."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, *, power: int = 1) -> torch.Tensor:
        return self.dropout(self.norm(torch.tanh(self.linear(x)))) * scale**power


def layers(n: int = 3, **options: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(**options) for _ in range(n)).to("jax")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_scan_is_the_loop(checkpoint: bool) -> None:
    scanned = layers()
    looped = copy.deepcopy(scanned)
    x, scale = torch.randn(5, 4, device="jax"), torch.tensor(1.5, device="jax")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = device.scan(scanned, a, scale, checkpoint=checkpoint, power=2)
    expected: Any = b
    for layer in looped:
        expected = layer(expected, scale, power=2)
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    close(a.grad, b.grad, 1e-3)
    for p, q in zip(scanned.parameters(), looped.parameters(), strict=True):
        close(p.grad, q.grad, 1e-3)
    for p, q in zip(scanned.buffers(), looped.buffers(), strict=True):
        close(p, q)


def test_scan_holds_one_layer_and_is_compiled_once() -> None:
    stack, x, scale = layers(6).eval(), torch.ones(2, 4, device="jax"), torch.tensor(1.0).to("jax")
    calls: list[int] = []
    hook = stack[0].linear.register_forward_hook(lambda *_: calls.append(1))

    def run(a: Any) -> Any:
        return device.call_torch(lambda x: device.scan(stack, x, scale), a)

    text = jax.jit(run).lower(x.jax()).as_text()
    assert text.count("dot_general") == 1
    calls.clear()
    for _ in range(3):
        device.scan(stack, x, scale)
    assert len(calls) <= 2  # traced, and never run
    hook.remove()


def test_scan_under_jit_and_lower() -> None:
    stack, x, scale = layers().eval(), torch.randn(2, 4, device="jax"), torch.tensor(2.0).to("jax")
    expected = x
    for layer in stack:
        expected = layer(expected, scale)
    compiled = device.jit(lambda x: device.scan(stack, x, scale))
    for _ in range(3):
        close(compiled(x), expected)
    lowered = torch2jax(lambda x: device.scan(stack, x, scale), lower=True)
    close(lowered(x.jax()), expected)
    assert jax.grad(lambda a: lowered(a).sum())(x.jax()).shape == (2, 4)


def test_scan_draws_other_numbers_in_each_layer() -> None:
    ones = [nn.Sequential(nn.Dropout(0.5)).to("jax") for _ in range(2)]
    kept = device.scan(ones, torch.ones(4000, device="jax")).count_nonzero().item() / 4000
    assert abs(kept - 0.25) < 0.03  # the same mask twice would keep half


def test_scan_refuses_unequal_layers() -> None:
    x = torch.ones(2, 4, device="jax")
    with pytest.raises(SignatureError, match=r"weight is \(4, 4\).*\(5, 4\)"):
        device.scan([nn.Linear(4, 4).to("jax"), nn.Linear(4, 5).to("jax")], x)
    with pytest.raises(SignatureError, match="eval"):
        device.scan([nn.ReLU(), nn.ReLU().eval()], x)
    with pytest.raises(SignatureError, match="at least one"):
        device.scan([], x)
    with pytest.raises(SignatureError, match="must return what it takes"):
        device.scan([nn.Linear(4, 5).to("jax")] * 2, x)


# --- many devices --------------------------------------------------------------------------------


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"))


def test_mark_sharding() -> None:
    x = torch.arange(32.0, device="jax").reshape(8, 4).clone().requires_grad_()
    assert device.mark_sharding(x, P("data", "model"), mesh()) is x
    assert {s.data.shape for s in x.jax().addressable_shards} == {(2, 2)}
    x.square().sum().backward()
    close(x.grad, 2 * torch.arange(32.0).reshape(8, 4))
    device.mark_sharding(x, NamedSharding(mesh(), P(None, "model")))
    assert {s.data.shape for s in x.jax().addressable_shards} == {(8, 2)}

    @device.jit
    def transposed(x: torch.Tensor) -> torch.Tensor:
        return device.mark_sharding((x * 2).t(), P("model", "data"), mesh()) + 1

    for _ in range(2):
        y = transposed(x.detach())
    close(y, 2 * torch.arange(32.0).reshape(8, 4).t() + 1)
    assert {s.data.shape for s in y.jax().addressable_shards} == {(2, 2)}
    with pytest.raises(SignatureError, match="mesh"):
        device.mark_sharding(x, P("data"))
    with pytest.raises(SignatureError, match="cpu"):
        device.mark_sharding(torch.ones(8), P("data"), mesh())
    with pytest.raises(SignatureError, match="PartitionSpec"):
        device.mark_sharding(x, "data", mesh())  # type: ignore[arg-type]


def test_shard_map() -> None:
    def total(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (2,)
        return device.call_jax(jax.lax.psum, (x * x).sum(), "data")

    f = device.shard_map(total, mesh=mesh(), in_specs=P("data"), out_specs=P())
    x = torch.arange(8.0, device="jax", requires_grad=True)
    out = f(x)
    out.backward()
    assert out.item() == 140
    close(x.grad, 2 * torch.arange(8.0))


def big() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(512, 1024), nn.Linear(1024, 512), nn.LayerNorm(512), nn.Linear(512, 1024)
    )


def test_a_model_starts_out_sharded() -> None:
    seen: list[bool] = []

    def make() -> nn.Module:
        seen.append(isinstance(torch.empty(1024, 1024)._cell.array, Tracer))  # type: ignore[attr-defined]
        return big()

    torch.manual_seed(1)
    layout = {"1.weight": P("model", None), "3.weight": P(None, "model"), "*.bias": P("model")}
    model = device.sharded_init(make, mesh(), layout, fsdp="data")
    assert all(seen), "a large tensor was made whole"
    specs = {name: p.jax().sharding.spec for name, p in model.named_parameters()}
    assert specs["0.weight"] == P(None, "data")
    assert specs["1.weight"] == P("model", "data")
    assert specs["3.weight"] == P("data", "model")
    assert specs["3.bias"] == P("model")
    assert specs["2.weight"] == P("data")
    torch.manual_seed(1)
    alone = device.sharded_init(big, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.requires_grad
        assert isinstance(p, nn.Parameter)
        close(p, q)
    assert abs(model[0].weight.std().item() - 1) < 0.01
    ids = torch.arange(8, device="jax")
    results = []
    for one in (model, alone):
        out = one(ids)
        out.square().mean().backward()
        results.append((out, one[1].weight.grad))
    close(results[0][0], results[1][0], 1e-4)
    close(results[0][1], results[1][1], 1e-4)
    with pytest.raises(SignatureError, match="nothing"):
        device.sharded_init(big, mesh(), {"nothing": P("model")})
    with pytest.raises(SignatureError, match="cannot be split"):
        device.sharded_init(lambda: nn.Linear(3, 3), mesh(), {"weight": P("model")})


# --- checkpoints ---------------------------------------------------------------------------------


def test_weights_as_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).to("jax")
    file = tmp_path / "model.safetensors"
    device.save_checkpoint(model.state_dict(), file)
    theirs = load_file(file)
    for name, x in model.state_dict().items():
        assert theirs[name].dtype is x.dtype
        close(theirs[name], x)
    loaded = device.load_checkpoint(file)
    assert all(isinstance(x, device.Tensor) for x in loaded.values())
    assert loaded["1.num_batches_tracked"].dtype is torch.int64
    device.mark_sharding(model[0].weight, P("data", None), mesh())
    sharded = device.load_checkpoint(file, like=model.state_dict())
    assert len(sharded["0.weight"].jax().sharding.device_set) == 8
    with pytest.raises(SignatureError, match=r"'0\.weight'"):
        device.load_checkpoint(file, like={**loaded, "0.weight": torch.ones(2, device="jax")})
    with pytest.raises(SignatureError, match="dict of tensors"):
        device.save_checkpoint([1], file)


def test_sharded_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint", reason="orbax is a test dependency")
    x = device.mark_sharding(
        torch.arange(32.0, device="jax").reshape(8, 4).clone(), P("data"), mesh()
    )
    ids = torch.arange(3, device="jax")
    device.save_checkpoint({"x": x, "step": 3, "ids": ids}, tmp_path / "folder")
    back = device.load_checkpoint(tmp_path / "folder", like={"x": x, "step": 0, "ids": ids})
    close(back["x"], x)
    assert back["ids"].dtype is torch.int64
    assert back["x"].jax().sharding == x.jax().sharding
    assert int(back["step"]) == 3


# --- torch.export --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.register_buffer("places", torch.randn(64, 8), persistent=False)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.encoder(self.embed(ids) + self.places[: ids.shape[1]])
        x = torch.where(mask[..., None], x, torch.zeros_like(x))
        return {"logits": self.out(x.mean(1)), "sums": x.sum(-1)}


def inputs(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 20, (rows, columns))
    return ids, ids > 3


def arrays(ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, Any]:
    return jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray(mask.numpy())


def test_an_exported_program_is_a_jax_function() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    ids, mask = inputs(4, 6)
    state, fn = device.extract(torch.export.export(net, (ids,), {"mask": mask}))
    assert {"embed.weight", "places", "out.bias"} <= set(state)
    a, m = arrays(ids, mask)
    out = jax.jit(fn)(state, (a,), {"mask": m})
    for name, expected in net(ids, mask=mask).items():
        close(out[name], expected)
    grads = jax.grad(lambda s: fn(s, (a,), {"mask": m})["logits"].sum())(state)
    net(ids, mask=mask)["logits"].sum().backward()
    close(grads["out.weight"], net.out.weight.grad)
    close(grads["encoder.linear1.weight"], net.encoder.linear1.weight.grad, 1e-4)
    with pytest.raises(SignatureError, match="exported for arguments"):
        fn(state, (a, m))


def test_dynamic_shapes_are_symbolic_dimensions() -> None:
    pytest.importorskip("flatbuffers", reason="jax.export writes artifacts with it")
    torch.manual_seed(0)
    net = Net().eval()
    ids, mask = inputs(4, 6)
    rows, columns = torch.export.Dim("rows", max=64), torch.export.Dim("columns", max=32)
    dims = {0: rows, 1: columns}
    program = torch.export.export(
        net, (ids,), {"mask": mask}, dynamic_shapes={"ids": dims, "mask": dims}
    )
    state, _ = device.extract(program)
    exported = jax.export.deserialize(device.export(program).serialize())
    for shape in ((7, 9), (2, 32)):
        ids, mask = inputs(*shape)
        a, m = arrays(ids, mask)
        out = exported.call(state, a, mask=m)
        for name, expected in net(ids, mask=mask).items():
            close(out[name], expected)


def test_an_exported_convolution_net() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    rows = torch.export.Dim("rows", max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: rows},))
    exported = device.export(program)
    assert "stablehlo.convolution" in exported.mlir_module()
    x = torch.randn(5, 3, 8, 8)
    close(exported.call(device.extract(program)[0], jnp.asarray(x.numpy())), net(x))


# --- torch.compile -------------------------------------------------------------------------------


def test_the_entry_point_of_the_distribution(tmp_path: Path) -> None:
    """PyTorch finds the backend by the metadata that an installed wheel has."""
    if package.__name__ != "torch2jax":
        pytest.skip(
            "under another name tests/extension/test_alias.py looks at the installed metadata"
        )
    root = Path(__file__).resolve().parents[2]
    with open(root / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    group = "torch_dynamo_backends"
    info = tmp_path / "torch2jax_ffi-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = [f"{k} = {v}" for k, v in project["entry-points"][group].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    program = """
import torch
assert "torch2jax" in torch._dynamo.list_backends()
f = torch.compile(lambda x: torch.sin(x) * 2, backend="torch2jax")
x = torch.ones(3, requires_grad=True)
f(x).sum().backward()
torch.testing.assert_close(x.grad, 2 * torch.cos(torch.ones(3)))
import sys
print("jax" in sys.modules)
"""
    folders = [str(tmp_path), str(Path(package.__file__).parent.parent)]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


def test_torch_compile_of_tensors_on_the_device_is_an_error_that_names_jit() -> None:
    model, x = nn.Linear(3, 2).to("jax"), torch.ones(4, 3, device="jax")
    for run in (lambda: torch.compile(model)(x), lambda: torch.compile(lambda x: x + 1)(x)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"device\.jit"):
            run()
    assert not hasattr(x, "__tensor_flatten__")
    close(model(x), nn.functional.linear(x, model.weight, model.bias))


def test_torch_compile_of_a_function_that_makes_tensors_on_the_device() -> None:
    from torch2jax._lower.torch_compile import backend

    torch._dynamo.reset()
    out = torch.compile(lambda: torch.ones(3, device="jax") * 2, backend=backend)()
    assert isinstance(out, device.Tensor)
    assert out.tolist() == [2.0, 2.0, 2.0]


# --- nothing global is left ----------------------------------------------------------------------


class Through(torch.autograd.Function):
    """Rounds, with the derivative of three times its argument."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g * 3


early = Through.apply


def test_autograd_functions_keep_their_derivative_and_torch_its_apply() -> None:
    base = torch.autograd.function._SingleLevelFunction
    before = torch.autograd.Function.__dict__["apply"]
    for fn in (early, Through.apply, lambda x: Through.apply(x)):
        lowered = torch2jax(fn, lower=True)
        np.testing.assert_array_equal(
            jax.grad(lambda a, f=lowered: f(a).sum())(jnp.full(3, 0.3)), np.full(3, 3.0)
        )
        assert torch.autograd.Function.__dict__["apply"] is before
        assert "apply" not in vars(base)

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("in fn")

    with pytest.raises(ValueError, match="in fn"):
        torch2jax(fails, lower=True)(jnp.ones(3))
    assert "apply" not in vars(base)
