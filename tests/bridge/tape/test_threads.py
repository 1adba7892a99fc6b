"""Threads that share a function or a module, and its tape."""

from __future__ import annotations

import threading
from typing import Any

import jax
import pytest
from tape_functions import close, run_python, through_scan

from torch2jax import tape_info, torch2jax


def test_threads_share_a_function(x):
    f = torch2jax(lambda x: (x.sin() * x).exp())
    step = jax.jit(jax.value_and_grad(through_scan(f, 3)))
    expected = [step(x * k) for k in range(8)]
    wrong: list[Any] = []

    def work(k: int) -> None:
        try:
            for n in range(50):
                close(step(x * ((k + n) % 8)), expected[(k + n) % 8], 0)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong[0]
    assert tape_info().entries == tape_info().bytes == 0


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_two_threads_and_two_devices_share_a_module(checkpointed):
    out = run_python(
        f"""
        import threading
        import jax, jax.numpy as jnp, numpy as np, torch
        from torch import nn
        from torch.utils.checkpoint import checkpoint
        from PACKAGE import from_module, tape_info

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
            def inner(self, x):
                return self.down(self.up(self.norm(x)).tanh())
            def forward(self, x):
                if {checkpointed}:
                    return x + checkpoint(self.inner, x, use_reentrant=False)
                return x + self.inner(x)

        torch.manual_seed(0)
        apply, variables = from_module(nn.Sequential(Block(), Block()))
        devices = jax.devices()
        assert len(devices) == 2
        x = jnp.linspace(-1, 1, 32).reshape(4, 8)

        def loss(params, x):
            return (apply({{**variables, "params": params}}, x) ** 2).sum()
        step = jax.jit(jax.value_and_grad(loss))
        scaled = [jax.tree.map(lambda p: p * (1 + k / 4), variables["params"]) for k in range(4)]
        expected = [jax.device_get(step(p, x)) for p in scaled]
        wrong = []

        def work(device):
            own = jax.device_put((scaled, x), device)
            for n in range(200):
                out = jax.device_get(step(own[0][n % 4], own[1]))
                for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected[n % 4])):
                    if not np.array_equal(a, b):
                        wrong.append(np.abs(a - b).max())
        threads = [threading.Thread(target=work, args=(d,)) for d in devices]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong, (len(wrong), max(wrong))

        # And one program on both devices at once.
        spread = jax.pmap(jax.grad(loss), in_axes=(None, 0))
        for _ in range(20):
            out = spread(scaled[1], jnp.stack([x, 2 * x]))
            for k in (1, 2):
                want = step(scaled[1], k * x)[1]
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a[k - 1], b, 1e-5, 1e-5),
                             out, want)
        print(tape_info().entries, tape_info().misses)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert out.split()[:2] == ["0", "0"]


def test_one_call_does_not_decide_for_another() -> None:
    """A call that holds a view of its operand keeps no graph, whatever another call finds.

    The other call has begun when nothing was known of the function, and ends while this one
    decides. A process of its own: what is counted are references to the other call's operand.
    """
    run_python(
        """
        import threading
        import torch
        from PACKAGE._bridge.torch_side.derivatives import UserProgram
        from PACKAGE._bridge.torch_side.tape import kept_graph, programs

        views, found = [], []
        begun, go_on = threading.Event(), threading.Event()

        def fn(x):
            if threading.current_thread() is other:
                begun.set()
                assert go_on.wait(60)
            else:
                views.append(x.detach().view(-1))
            return (x.sin(),)

        policy = kept_graph.GraphPolicy("fn", (0,), seeded=False)
        keep = programs.KeepGraph(UserProgram(fn, None, True, ()), policy)
        other = threading.Thread(target=lambda: found.append(keep.forward((torch.ones(3),))[1]))
        empty = programs.empty

        def empty_after_other(dtype, device):
            if threading.current_thread() is not other and other.is_alive():
                go_on.set()
                other.join(60)
            return empty(dtype, device)

        programs.empty = empty_after_other
        other.start()
        assert begun.wait(60)
        (out,), graph = keep.forward((torch.ones(3),))
        assert not other.is_alive()  # it ended before this call had decided
        assert torch.equal(out, torch.ones(3).sin())
        assert len(views) == 1
        assert graph is None
        assert found[0] is not None
        again = keep.forward((torch.ones(3),))[1]
        assert again is not None
        assert again.owned  # what was learnt is not forgotten
        """
    )
