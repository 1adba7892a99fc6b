"""Device "jax" in a training program: tied weights, gradient scaling, generators, checkpointing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch2jax import Torch2JaxError, Torch2JaxWarning, device, from_module, torch2jax

pytestmark = pytest.mark.optimized

device.enable()


# --- tied weights --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.rnn, self.again = nn.GRU(3, 3), nn.GRU(3, 3)
        self.head.weight = self.emb.weight
        for name, p in self.rnn.named_parameters():
            setattr(self.again, name, p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.rnn(self.emb(x))[0])[0])

    def is_tied(self) -> bool:
        return (
            self.head.weight is self.emb.weight
            and self.again.weight_ih_l0 is self.rnn.weight_ih_l0
            and self.again._flat_weights[0] is self.rnn.weight_ih_l0
            and len(list(self.parameters())) == 5
        )


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    module, x = Tied(), torch.arange(6).reshape(2, 3)
    expected = module(x)
    expected.sum().backward()
    assert module.emb.weight.grad is not None
    gradient = module.emb.weight.grad.clone()
    module.to("jax")
    assert module.is_tied()
    close(module.emb.weight.grad, gradient)
    module.zero_grad()
    out = module(x.to("jax"))
    out.sum().backward()
    close(out, expected)
    close(module.emb.weight.grad, gradient)

    copied = copy.deepcopy(module)
    assert copied.is_tied()
    assert copied.emb.weight is not module.emb.weight
    module.load_state_dict(Tied().state_dict())
    assert module.is_tied()
    assert module.to(torch.bfloat16).is_tied()
    assert module.cpu().is_tied()
    assert type(module.head.weight) is nn.Parameter
    assert module.emb.weight.grad is not None
    assert module.emb.weight.grad.dtype is torch.bfloat16
    assert Tied().to_empty(device="jax").is_tied()


def test_modules_of_other_devices_are_converted_as_before() -> None:
    module = Tied()
    before = list(module.parameters())
    module.double()
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    assert {p.dtype for p in before} == {torch.float64}


def test_a_model_with_tied_weights_trains_as_on_the_cpu() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    there = transformers.GPT2LMHeadModel(config)
    here = copy.deepcopy(there).to("jax")
    assert here.lm_head.weight is here.transformer.wte.weight
    ids = torch.arange(10).reshape(2, 5) % 12
    losses = []
    for model, x in ((there, ids), (here, ids.to("jax"))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert here.lm_head.weight is here.transformer.wte.weight
    for (name, p), q in zip(there.named_parameters(), here.parameters(), strict=True):
        np.testing.assert_allclose(
            q.detach().cpu().numpy(), p.detach().numpy(), 2e-3, 2e-4, err_msg=name
        )


# --- torch.amp.GradScaler ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_of_the_scaler(dtype: torch.dtype) -> None:
    for values in ([2.0, 4.0], [2.0, float("inf")], [float("nan"), 1.0], []):
        found = []
        for where in ("cpu", "jax"):
            grads = [torch.tensor(values, dtype=dtype, device=where).view(-1, 1) for _ in range(2)]
            inf = torch.zeros((), device=where)
            torch._amp_foreach_non_finite_check_and_unscale_(
                grads, inf, torch.tensor(0.125, device=where)
            )
            found.append([inf.cpu(), *[g.cpu() for g in grads]])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, equal_nan=True)


@pytest.mark.parametrize(
    ("scale", "tracker", "inf"),
    [(4.0, 0, 0.0), (4.0, 1, 0.0), (4.0, 1, 1.0), (3e38, 1, 0.0)],
)
def test_the_update_of_the_scale(scale: float, tracker: int, inf: float) -> None:
    found = []
    for where in ("cpu", "jax"):
        s = torch.tensor(scale, device=where)
        t = torch.tensor(tracker, dtype=torch.int32, device=where)
        out = torch._amp_update_scale_(s, t, torch.tensor(inf, device=where), 2.0, 0.5, 2)
        assert out is s
        found.append((s.item(), t.item(), t.dtype))
    assert found[0] == found[1]


def test_grad_scaler() -> None:
    torch.manual_seed(0)
    there = nn.Linear(3, 2)
    here = copy.deepcopy(there).to("jax")
    x = torch.randn(4, 3)
    for where, model in (("cpu", there), ("jax", here)):
        scaler = torch.amp.GradScaler(where, init_scale=1024.0, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scales = []
        for step in range(5):
            optimizer.zero_grad()
            loss = model(x.to(where)).square().mean()
            if step == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
        again = torch.amp.GradScaler(where)
        again.load_state_dict(scaler.state_dict())
        assert again.get_scale() == 2048.0
    close(here.weight, there.weight)
    with pytest.warns(Torch2JaxWarning, match="float64"):  # again
        torch.ones((), device="jax").double()


# --- generators ----------------------------------------------------------------------------------


def test_generators() -> None:
    g = torch.Generator(device="jax")
    assert g.device == torch.device("jax", 0)
    assert isinstance(g, torch.Generator)
    assert isinstance(torch.Generator(), torch.Generator)
    assert type(torch.Generator(device="cpu")) is torch._C.Generator  # pyright: ignore
    assert torch.Generator().device == torch.device("cpu")
    assert g.manual_seed(3) is g
    assert g.initial_seed() == 3
    before = torch.get_rng_state()
    a = torch.randn(4, device="jax", generator=g)
    state = g.get_state()
    b = torch.randn(4, device="jax", generator=g)
    assert not torch.equal(a, b)
    g.set_state(state)
    assert torch.equal(torch.randn(4, device="jax", generator=g), b)
    g.manual_seed(3)
    assert torch.equal(torch.randn(4, device="jax", generator=g), a)
    assert torch.equal(torch.get_rng_state(), before)
    other = g.clone_state()
    loaded = pickle.loads(pickle.dumps(g))
    following = torch.rand(3, device="jax", generator=g)
    for one in (other, loaded, copy.deepcopy(loaded)):
        assert one.device.type == "jax"
    assert torch.equal(torch.rand(3, device="jax", generator=other), following)
    assert torch.equal(torch.rand(3, device="jax", generator=loaded), following)
    for draw in (
        lambda g: torch.randperm(5, device="jax", generator=g),
        lambda g: torch.randint(9, (5,), device="jax", generator=g),
        lambda g: torch.ones(5, device="jax").bernoulli_(0.5, generator=g),
        lambda g: torch.empty(5, device="jax").normal_(generator=g),
        lambda g: torch.multinomial(torch.ones(6, device="jax"), 3, generator=g),
    ):
        assert torch.equal(draw(g.manual_seed(1)), draw(g.manual_seed(1)))
    with pytest.raises(RuntimeError, match="jax:1"):
        torch.Generator(device="jax:1")


# --- torch.utils.checkpoint ----------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_reentrant = use_reentrant

    def part(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.tanh(self.second(x)) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return checkpoint(self.part, x, 2.0, use_reentrant=self.use_reentrant).sum()  # pyright: ignore


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_in_a_program_of_jax(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    module, x = Blocks(use_reentrant), torch.randn(4, 3)
    apply, variables = from_module(module, lower=True)
    value, grads = jax.jit(
        jax.value_and_grad(
            lambda params, x: apply({**variables, "params": params}, x), argnums=(0, 1)
        )
    )(variables["params"], jnp.asarray(x.numpy()))
    x.requires_grad_()
    expected = module(x)
    expected.backward()
    close(value, expected)
    close(grads[1], x.grad)
    for name, p in module.named_parameters():
        close(grads[0][name], p.grad)


def test_a_checkpoint_of_a_function() -> None:
    f = torch2jax(lambda x: checkpoint(torch.sin, x, use_reentrant=True) * 2, lower=True)
    x = jnp.arange(3.0)
    close(jax.grad(lambda x: f(x).sum())(x), 2 * jnp.cos(x))
    close(jax.hessian(lambda x: f(x).sum())(x), jnp.diag(-2 * jnp.sin(x)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_on_the_device(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    there, x = Blocks(use_reentrant), torch.randn(4, 3)
    here = copy.deepcopy(there).to("jax")
    there(x.requires_grad_()).backward()
    y: Any = x.detach().to("jax").requires_grad_()
    here(y).backward()
    close(y.grad, x.grad)
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        close(q.grad, p.grad)


# --- lengths on the CPU --------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.lstm = nn.LSTM(4, 3, batch_first=batch_first, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([2, 5, 3], device="cpu")
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, self.batch_first, False)
        out, (h, c) = self.lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, self.batch_first)
        return padded.square().sum() + h.sum() + c.sum()


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences(batch_first: bool) -> None:
    torch.manual_seed(0)
    there, x = Packed(batch_first), torch.randn(*((3, 5) if batch_first else (5, 3)), 4)
    here = copy.deepcopy(there).to("jax")
    y: Any = x.to("jax").requires_grad_()
    expected = there(x.requires_grad_())
    expected.backward()
    out = here(y)
    out.backward()
    close(out, expected)
    close(y.grad, x.grad)
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        close(q.grad, p.grad)
    apply, variables = from_module(there, lower=True)
    close(jax.jit(apply)(variables, jnp.asarray(x.detach().numpy())), expected)


def test_a_lazy_module_is_moved_after_its_first_call() -> None:
    module, x = nn.LazyLinear(2), torch.ones(1, 3)
    with pytest.raises(Torch2JaxError, match="call the module once"):
        module.to("jax")
    expected = module(x)
    close(module.to("jax")(x.to("jax")), expected)


@pytest.mark.parametrize("lengths_on", ["jax", "cpu"])
def test_ctc_loss(lengths_on: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(12, 2, 5).log_softmax(-1)
    found = []
    for where in ("cpu", "jax"):
        x: Any = scores.clone().to(where).requires_grad_()
        targets = torch.tensor([[1, 2, 3], [2, 2, 4]], device=where)
        place = where if where == "cpu" else lengths_on
        steps, sizes = (torch.tensor(n, device=place) for n in ([12, 10], [3, 2]))
        loss = nn.functional.ctc_loss(x, targets, steps, sizes)
        loss.backward()
        found.append((loss, x.grad))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
