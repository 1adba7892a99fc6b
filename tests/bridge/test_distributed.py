"""Training on meshes, threads on many devices, and several processes."""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from torch2jax import from_module, torch2jax

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
WIDTH, HEADS, LENGTH = 16, 4, 6

Params = dict[str, Any]


def mesh(*sizes: int) -> jax.sharding.Mesh:
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


# --- a transformer block, on one device, data-parallel, tensor-parallel --------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 64), torch.nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def data(rows: int = 8) -> tuple[jax.Array, jax.Array]:
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, LENGTH, WIDTH))
    return x, jnp.sin(3 * x.cumsum(1))


def trained(loss: Callable[..., Any], params: Params, *batch: jax.Array) -> tuple[Any, Params]:
    """Losses of some steps of gradient descent, and the weights after them."""

    def step(params: Params, _: Any) -> tuple[Params, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    params, losses = jax.jit(lambda p: jax.lax.scan(step, p, None, length=STEPS))(params)
    return losses, params


@functools.cache
def single() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    module = Block()
    apply, variables = from_module(module)
    x, y = data()

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((apply({**variables, "params": params}, x) - y) ** 2).mean()

    return module, variables, trained(loss, variables["params"], x, y)


def check(got: tuple[Any, Params]) -> None:
    losses, params = single()[2]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(got[0], losses, 1e-4)
    for name, p in params.items():
        np.testing.assert_allclose(got[1][name], p, 1e-3, 1e-5, err_msg=name)


@pytest.mark.parametrize("where", ["specs", "shard_map"])
def test_data_parallel_training(where: str) -> None:
    module, variables, _ = single()
    on = mesh(4)
    specs = {"mesh": on, "in_specs": (P(), P("data")), "out_specs": P("data")}
    if where == "specs":
        apply, _ = from_module(module, **specs)
    else:
        whole, _ = from_module(module)
        apply = jax.shard_map(whole, **specs)

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((apply({**variables, "params": params}, x) - y) ** 2).mean()

    x, y = jax.device_put(data(), NamedSharding(on, P("data")))
    params = jax.device_put(variables["params"], NamedSharding(on, P()))
    check(trained(loss, params, x, y))


def test_tensor_parallel_training() -> None:
    """Heads and hidden units over "model", rows over "data"; one psum after each half."""
    _, variables, _ = single()
    on = mesh(2, 2)

    def attend(x: Any, norm: Any, qkv: Any, out: Any) -> torch.Tensor:
        x = F.layer_norm(x, (WIDTH,), *norm)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (-1, WIDTH // HEADS)) for w, b in qkv)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), out)

    def feed(x: Any, norm: Any, up: Any, down: Any) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,), *norm), *up)), down)

    attend, feed = torch2jax(attend), torch2jax(feed)

    def local(x: jax.Array, w: Params) -> jax.Array:
        sums = attend(x, w["norm1"], w["qkv"], w["out"][0])
        x = x + jax.lax.psum(sums, "model") + w["out"][1]
        sums = feed(x, w["norm2"], w["up"], w["down"][0])
        return x + jax.lax.psum(sums, "model") + w["down"][1]

    columns, rows = (P("model"), P("model")), (P(None, "model"), P())
    specs = {
        "norm1": P(), "norm2": P(), "qkv": [columns] * 3, "out": rows, "up": columns, "down": rows
    }  # fmt: skip
    run = jax.shard_map(local, mesh=on, in_specs=(P("data"), specs), out_specs=P("data"))

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        pair = {n: (params[f"{n}.weight"], params[f"{n}.bias"]) for n in specs}
        kinds = zip(*(jnp.split(p, 3) for p in pair["qkv"]), strict=True)
        return ((run(x, {**pair, "qkv": list(kinds)}) - y) ** 2).mean()

    check(trained(loss, *jax.device_put((variables["params"], *data()), NamedSharding(on, P()))))


def test_statistics_of_batch_norm() -> None:
    """Each shard normalises by its own rows; a mean over the mesh joins the running statistics."""
    torch.manual_seed(0)
    apply, variables = from_module(torch.nn.BatchNorm1d(3, momentum=0.5))
    on = mesh(4)
    x = jax.random.normal(jax.random.key(1), (8, 3))

    def local(variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, buffers = apply(variables, x, train=True)
        # Integers (the number of batches) are equal everywhere; a mean makes them floats.
        joined = jax.tree.map(lambda b: jax.lax.pmean(b, "data").astype(b.dtype), buffers)
        return y, joined

    run = jax.shard_map(local, mesh=on, in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    y, buffers = jax.jit(run)(variables, x)
    shards = [apply(variables, rows, train=True) for rows in jnp.split(x, 4)]
    np.testing.assert_allclose(y, jnp.concatenate([y for y, _ in shards]), 1e-5, 1e-6)
    for name, b in buffers.items():
        mean = np.mean([np.asarray(s[name]) for _, s in shards], 0)
        np.testing.assert_allclose(b, mean, 1e-5, 1e-6, err_msg=name)


# --- threads -------------------------------------------------------------------------------------


def python(script: str, *arguments: str, timeout: float, **environment: str) -> str:
    """Run a script; a hang fails with the stacks of all threads."""
    head = f"import faulthandler; faulthandler.dump_traceback_later({timeout}, exit=True)\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout + 30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stress_on_eight_devices() -> None:
    """2,000 calls from eight threads and from programs over all devices, one module for all."""
    python(
        """
        import threading
        import jax, jax.numpy as jnp, numpy as np, torch
        from jax.sharding import AxisType, PartitionSpec as P
        from torch2jax import from_module, tape_info, torch2jax

        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        apply, variables = from_module(module)
        hvp_of = torch2jax(lambda x: torch.sin(x) * x)
        loss = lambda v, x: (apply(v, x) ** 2).sum()
        value = jax.jit(jax.value_and_grad(loss))
        push = jax.jit(lambda x: jax.jvp(hvp_of, (x,), (x,)))
        two = jax.jit(lambda v, x: apply(v, x).sum() + apply(v, 2 * x).sum())  # run side by side
        xs = [jnp.linspace(0.0, k + 1.0, 32).reshape(4, 8) for k in range(4)]
        expected = [jax.device_get((value(variables, x), push(x), two(variables, x))) for x in xs]
        wrong, devices = [], jax.devices()
        assert len(devices) == 8

        def same(a, b):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-5), a, b)

        def work(device):
            try:
                own, inputs = jax.device_put((variables, xs), device)
                for n in range(80):
                    k = n % 4
                    same((value(own, inputs[k]), push(inputs[k]), two(own, inputs[k])), expected[k])
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(d,)) for d in devices]
        [t.start() for t in threads]
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        spread = jax.jit(jax.shard_map(
            lambda v, x: jax.lax.psum(loss(v, x), "d"), mesh=mesh, in_specs=(P(), P("d")),
            out_specs=P()))
        grads = jax.jit(jax.grad(spread))
        x = jnp.concatenate([xs[k % 4] for k in range(8)])
        for _ in range(20):
            same(grads(variables, x), jax.tree.map(lambda *g: sum(g) * 2,
                                                   *(e[0][1] for e in expected)))
        [t.join() for t in threads]
        assert not wrong, wrong[0]
        assert tape_info().entries == 0, tape_info()
        """,
        timeout=240,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )


def test_calling_jax_on_one_of_several_devices_is_an_error() -> None:
    """There it would deadlock: the devices wait for each other in psum."""
    out = python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from torch2jax import j2t, t2j, torch2jax

        inner = jax.jit(jnp.sin)
        f = torch2jax(lambda x: j2t(inner(t2j(x.clone()))).clone(),
                      output_shapes=jax.ShapeDtypeStruct((4,), jnp.float32))
        print(f(jnp.ones(4)))
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        spread = jax.jit(jax.shard_map(lambda x: jax.lax.psum(f(x), "d"), mesh=mesh,
                                       in_specs=P("d"), out_specs=P()))
        try:
            jax.block_until_ready(spread(jnp.ones(32)))
        except Exception as error:
            assert "runs on several devices at once" in str(error), error
            print("refused")
        import os; os._exit(0)  # the others wait for the failed one
        """,
        timeout=120,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        PYTHONUNBUFFERED="1",
    )
    assert "refused" in out


# --- processes -----------------------------------------------------------------------------------


def start(count: int, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(script),
                address,
                str(count),
                str(i),
                *arguments,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


TRAINING = """
import hashlib, os, sys
import jax, numpy as np, torch
import train_digits as digits
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dies = len(sys.argv) > 4 and index == count - 1
jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=10)
torch.manual_seed(0)
data, model = digits.load(0), digits.make_model()
axes = (jax.sharding.AxisType.Auto,)
trainer = digits.Trainer(model, jax.make_mesh((jax.device_count(),), ("batch",), axis_types=axes))
rng, losses = np.random.default_rng(0), []
for n, batch in enumerate(digits.batches(data, rng)):
    losses.append(float(trainer.step(*batch)))
    if dies and n == 3:
        os._exit(7)
text = trainer._step.lower(trainer.params, trainer.state, *trainer.shared(*batch)).as_text()
print("RESULT", losses[-1], hashlib.sha256(text.encode()).hexdigest(), flush=True)
"""


@functools.cache
def one_process() -> float:
    [alone] = start(1, TRAINING)
    out, err = alone.communicate(timeout=180)
    assert alone.returncode == 0, err
    return float(re.findall(r"^RESULT (\S+)", out, re.MULTILINE)[0])


def needs_the_demo() -> None:
    for library in ("sklearn", "optax", "rich", "matplotlib"):
        pytest.importorskip(
            library, reason="the extra `demo` is not installed", exc_type=ImportError
        )


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_processes(count: int) -> None:
    needs_the_demo()
    results = []
    for process in start(count, TRAINING):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        results.append(re.findall(r"^RESULT (\S+) (\S+)", out, re.MULTILINE)[0])
    losses, programs = zip(*results, strict=True)
    np.testing.assert_allclose([float(x) for x in losses], one_process(), 1e-4)
    assert len(set(programs)) == 1, "the processes compile different programs"


def test_the_others_learn_that_a_process_has_died() -> None:
    needs_the_demo()
    *others, dying = start(2, TRAINING, "dies")
    dying.communicate(timeout=180)
    assert dying.returncode == 7
    for process in others:
        out, _ = process.communicate(timeout=90)  # the time-out is 10 s
        assert process.returncode != 0
        assert "RESULT" not in out


def test_the_example_on_processes(tmp_path: Path) -> None:
    needs_the_demo()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/train_digits.py"), "--smoke", "--distributed", "2"],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, 2 devices" in done.stdout
    assert "Test accuracy" in done.stdout
