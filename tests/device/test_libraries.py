"""Programs of other people's libraries on device "jax": values and all gradients are PyTorch's.

A training step is compiled with its backward pass. It meets a module's state as it was left, and
what the module's switches, hooks and numbers are at each call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import library_derivatives as derivatives
import library_programs as programs
import numpy as np
import pytest
import torch
import torch_geometric.nn as geometric
import transformers
from torch import nn

from torch2jax import device

# They deprecate what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # captum, of an argument that requires no gradient
    "ignore:Input Tensor 0 did not already require gradients",
)

device.enable()


PROGRAMS = programs.PROGRAMS | derivatives.PROGRAMS


@pytest.mark.parametrize("name", programs.named("device", PROGRAMS))
def test_program(name: str) -> None:
    program = PROGRAMS[name]
    module = programs.made(program)
    want = programs.expected(module, program)
    module = module.to("jax")

    def step(*args: torch.Tensor) -> Any:
        args = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in args)
        out = module(*args)
        programs.score(out).backward()
        return programs.leaves(out), [x.grad for x in args if x.requires_grad]

    compiled = device.jit(step)
    out: Any = None
    by_input: Any = None
    for _ in range(program.steps or 2):  # the first call runs step by step
        module.zero_grad()
        out, by_input = compiled(*(x.to("jax") for x in program.args))
    for k, (y, x) in enumerate(zip(out, programs.leaves(want.out), strict=True)):
        programs.close(y.detach().cpu(), x, f"result {k}")
    for k, (g, x) in enumerate(zip(by_input, want.inputs, strict=True)):
        assert (g is None) == (x is None), k
        if x is not None:
            programs.close(g.cpu(), x, f"input {k}")
    ours = dict(module.named_parameters())
    for key, x in want.parameters.items():
        g = ours[key].grad
        programs.close(
            np.zeros(()) if g is None else g.cpu(), np.zeros(()) if x is None else x, key
        )
    for key, b in module.named_buffers():
        if key in want.buffers:
            programs.close(b.detach().cpu(), want.buffers[key], key)


# --- what changes between two calls --------------------------------------------------------------


CHANGING: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "geometric": (
        lambda: geometric.GIN(4, 8, 2, 3, norm="BatchNorm", dropout=0.0),
        programs.NODES,
    ),
    "pytorch-tcn": (
        lambda: programs.pytorch_tcn.TCN(
            3, [4, 4], kernel_size=3, use_norm="batch_norm", dropout=0.0
        ),
        (programs.randn(2, 3, 12),),
    ),
    "transformers": (programs.bert, (programs.TOKENS,)),
    "e3nn": (lambda: programs.e3nn_layers.BatchNorm("2x0e + 1x1o"), (programs.randn(6, 5),)),
    "vector quantization": (
        lambda: programs.quantizer(programs.VectorQuantize), (programs.randn(2, 5, 8),)
    ),
}  # fmt: skip


def last_layer(module: nn.Module) -> nn.Module:
    own = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return own[-1] if own else module


def tripled(module: nn.Module) -> Any:
    return module.register_forward_hook(
        lambda m, i, out: (
            tuple(o * 3 if o.is_floating_point() else o for o in out)
            if isinstance(out, tuple)
            else out * 3
        )
    )


def forgets(module: nn.Module, p: float) -> None:
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = p


@pytest.mark.parametrize("name", CHANGING)
def test_a_module_that_changes_between_two_calls(name: str) -> None:
    make, args = CHANGING[name]
    torch.manual_seed(0)
    there = make().train()
    here = copy.deepcopy(there).to("jax")
    handles: list[Any] = []

    def removed(_: nn.Module) -> None:
        handles.pop().remove()

    changes: dict[str, Callable[[nn.Module], Any]] = {
        "training": lambda m: m.train(),
        "eval after training": lambda m: m.eval(),
        "training again": lambda m: m.train(),
        # A norm of what is 0 everywhere makes rounding large.
        "everything is dropped": lambda m: forgets(m, 0.0 if name == "geometric" else 1.0),
        "nothing is dropped": lambda m: forgets(m, 0.0),
        "a hook": lambda m: handles.append(tripled(last_layer(m))),
        "eval with the hook": lambda m: m.eval(),
        "without the hook": removed,
        "a frozen parameter": lambda m: next(m.parameters(), there.dummy).requires_grad_(False),
        "training at last": lambda m: m.train(),
    }
    there.dummy = torch.zeros(1)

    def step(module: nn.Module) -> Callable[..., Any]:
        def run(*args: torch.Tensor) -> Any:
            out = module(*args)
            score = programs.score(out)
            if score.requires_grad:
                score.backward()
            return [x.detach() for x in programs.leaves(out)]

        return run

    compiled, plain = device.jit(step(here)), step(there)
    before: Any = None
    for change, apply in changes.items():
        apply(here)
        apply(there)
        for call in range(2):
            where = f"{change}, call {call}"
            for module in (here, there):
                module.zero_grad()
            found, want = compiled(*(x.to("jax") for x in args)), plain(*args)
            for k, (y, x) in enumerate(zip(found, want, strict=True)):
                programs.close(y.cpu(), x, f"{where}: result {k}")
            theirs = dict(there.named_parameters())
            # Behind a norm the gradients of biases are rounding.
            largest = max(
                (float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None),
                default=0.0,
            )
            for key, p in here.named_parameters():
                g, x = p.grad, theirs[key].grad
                assert (g is None) == (x is None), f"{where}: {key}"
                if x is not None:
                    np.testing.assert_allclose(
                        g.cpu(), x, 1e-3, 1e-4 * max(largest, 1.0), err_msg=f"{where}: {key}"
                    )
            for (key, b), x in zip(here.named_buffers(), there.buffers(), strict=True):
                if b.is_floating_point():
                    programs.close(b.detach().cpu(), x, f"{where}: {key}")
        if change == "eval after training":
            differs = any(not torch.allclose(a, b) for a, b in zip(before, want, strict=True))
            assert differs or not name.startswith(("geometric", "pytorch", "e3nn"))
        before = want


# --- state of a stream, and numbers in buffers ----------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, device.jit], ids=["eager", "jit"])
def test_a_stream_goes_on_from_one_call_to_the_next(wrap: Any) -> None:
    """pytorch-tcn keeps the end of each block for the next one."""
    torch.manual_seed(0)
    there = programs.pytorch_tcn.TCN(3, [4, 4], kernel_size=3, use_norm="weight_norm", dropout=0.0)
    here = copy.deepcopy(there.eval()).to("jax")
    step = wrap(lambda block: here.inference(block))
    for _ in range(2):
        for net in (there, here):
            net.reset_buffers()
        for block in programs.randn(5, 1, 3, 2):
            with torch.no_grad():
                programs.close(step(block.to("jax")).cpu(), there.inference(block), "block")


def sound() -> tuple[nn.Module, torch.Tensor]:
    """Encodec computes paddings from buffers, and asks for their values."""
    config = transformers.EncodecConfig(
        hidden_size=8, num_filters=4, num_residual_layers=1, upsampling_ratios=[2, 2],
        num_lstm_layers=1, codebook_size=8, codebook_dim=8, audio_channels=1,
    )  # fmt: skip
    return transformers.EncodecModel(config).eval().encoder, programs.randn(1, 1, 32)


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_what_is_computed_from_integers_in_buffers_has_values(place: str) -> None:
    torch.manual_seed(0)
    there, x = sound()
    here = copy.deepcopy(there).to("jax")
    for m in here.modules() if place == "cpu" else ():
        for name, buffer in m.named_buffers(recurse=False):
            if buffer.dtype is torch.int64:
                setattr(m, name, buffer.cpu())
    want = there(x)
    programs.score(want).backward()

    def step(x: torch.Tensor) -> torch.Tensor:
        out = here(x)
        programs.score(out).backward()
        return out.detach()

    compiled = device.jit(step)
    for _ in range(2):
        here.zero_grad()
        programs.close(compiled(x.to("jax")).cpu(), want, "result")
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        if q.grad is not None:
            programs.close(p.grad.cpu(), q.grad, name)
