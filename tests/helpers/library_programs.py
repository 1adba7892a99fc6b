"""Small programs of other people's libraries, by the kinds of fault that they once showed.

Weights are random and sizes tiny. `tests/bridge/test_libraries.py`, `tests/lower/test_libraries.py`
and `tests/device/test_libraries.py` compare values, buffers and all gradients with PyTorch's.

The file is one table with what it needs, so it is longer than others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr
import e3nn.math
import geomloss
import gpytorch
import jax
import jax.numpy as jnp
import normflows
import numpy as np
import opacus.validators
import opt_einsum
import pytorch_tcn
import snntorch
import soft_moe_pytorch
import tensorly
import torch
import torch_geometric.nn as geometric
import torchcde
import torchrecurrent
import torchsde
import transformers
import x_transformers
import zuko
from e3nn import nn as e3nn_layers
from e3nn import o3
from minGRU_pytorch import minGRU
from mtst.Models.full_model import MTST_full
from torch import nn
from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention
from torch_geometric.nn.attention import QFormer
from torchcrf import CRF
from transformers.models.encodec import modeling_encodec as encodec
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from vector_quantize_pytorch import FSQ, ResidualVQ, VectorQuantize
from x_transformers.next_latent_wrapper import RolloutGRU

tensorly.set_backend("pytorch")


class Program(NamedTuple):
    """``make()`` is the module; ``steps`` training steps move its buffers."""

    make: Callable[[], nn.Module]
    args: tuple[torch.Tensor, ...]
    ways: str = "bridge lower device"
    steps: int = 0
    draws: bool = False
    """Whether it needs a key, which the result does not depend on."""


class Uses(nn.Module):
    """A program of a user, who has modules of a library."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.run(self, *args)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- integers as indices -------------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
GRAPHS = torch.tensor([0, 0, 0, 1, 1, 1])
TOKENS = torch.tensor([[5, 3, 8, 1, 9, 4], [2, 7, 7, 6, 0, 0]])


def crf(self: Any, scores: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor) -> Any:
    return self.crf(scores, tags, mask=mask.bool())


def language_model() -> nn.Module:
    layers = x_transformers.Decoder(
        dim=16, depth=1, heads=2, attn_dim_head=8, rel_pos_bias=True, ff_glu=True
    )
    return x_transformers.TransformerWrapper(num_tokens=12, max_seq_len=8, attn_layers=layers)


def pooled(self: Any, x: torch.Tensor, edges: torch.Tensor, graphs: torch.Tensor) -> Any:
    h = self.convolution(x, edges)
    return self.pool(h, graphs, dim_size=2), geometric.global_max_pool(h, graphs, size=2)


def triples(self: Any, head: torch.Tensor, relation: torch.Tensor, tail: torch.Tensor) -> Any:
    return self.distances(head, relation, tail), self.products(head, relation, tail)


def adjacency(self: Any, x: torch.Tensor, weights: torch.Tensor) -> Any:
    return self.convolution(x, torch.sparse_coo_tensor(EDGES, weights, (6, 6)))


def sparse_language_model() -> nn.Module:
    """Embeddings of a user's own, whose gradients are sparse."""
    embedding = x_transformers.x_transformers.TokenEmbedding(16, 12)
    embedding.emb.sparse = True
    layers = x_transformers.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    return x_transformers.TransformerWrapper(
        num_tokens=12, max_seq_len=8, attn_layers=layers, token_emb=embedding
    )


def by_frequency(module: nn.Module) -> nn.Module:
    """Gradients of rows are divided by how often an index names them."""
    for m in module.modules():
        if isinstance(m, nn.Embedding):
            m.scale_grad_by_freq = True
    return module


def bert() -> nn.Module:
    """Its dropouts draw nothing until their probability is 1."""
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return Uses(squashed, net=transformers.BertModel(config))


def squashed(self: Any, x: torch.Tensor) -> Any:
    """The squares behind a norm have a constant sum."""
    return hidden(self, x).tanh()


def interpolation() -> nn.Module:
    kernel = gpytorch.kernels.GridInterpolationKernel(
        gpytorch.kernels.RBFKernel(), grid_size=8, grid_bounds=((0.0, 1.0),)
    )
    return Uses(interpolated, kernel=kernel)


def interpolated(self: Any, points: torch.Tensor, y: torch.Tensor) -> Any:
    """Points between a grid's are products with sparse matrices, which have the weights."""
    return self.kernel(points.sigmoid()).evaluate_kernel() @ y


# --- explanations --------------------------------------------------------------------------------


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def integrated(self: Any, x: torch.Tensor) -> Any:
    return captum.attr.IntegratedGradients(self.net).attribute(x, target=1, n_steps=3)


def saliency(self: Any, x: torch.Tensor) -> Any:
    """Its gradient has no graph, so it is a constant to the gradient of the whole."""
    return self.net(x), captum.attr.Saliency(self.net).attribute(x, target=1)


def activations(self: Any, x: torch.Tensor) -> Any:
    return captum.attr.LayerGradCam(self.net, self.net[0]).attribute(x, target=1)


def likelihood(self: Any, x: torch.Tensor) -> Any:
    return self.flow().log_prob(x)


# --- state ---------------------------------------------------------------------------------------


def quantizer(kind: Any, **options: Any) -> nn.Module:
    # Codes that nobody uses would be replaced by random ones.
    return kind(dim=8, codebook_size=6, decay=0.8, threshold_ema_dead_code=0, **options)


def spikes() -> nn.Module:
    leaky = snntorch.Leaky(beta=0.9, learn_beta=True, init_hidden=True)
    return Uses(spiking, first=nn.Linear(3, 4), leaky=leaky, lstm=snntorch.SLSTM(4, 3))


def spiking(self: Any, x: torch.Tensor) -> Any:
    """The membranes' potentials stand in attributes and buffers from one step to the next."""
    self.leaky.reset_mem()
    synapse, memory = self.lstm.init_slstm()
    found = []
    for step in x:
        self.leaky(self.first(step))
        _, synapse, memory = self.lstm(self.leaky.mem, synapse, memory)
        found.append(memory)
    return torch.stack(found)


# --- caches outside of modules --------------------------------------------------------------------


def transformer(kind: Any, config: Any) -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    net = kind(config(**sizes, num_hidden_layers=1, num_attention_heads=2))
    return Uses(hidden, net=net)


def hidden(self: Any, x: torch.Tensor) -> Any:
    return self.net(x).last_hidden_state


def coupled(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    symbols = o3.wigner_3j(1, 1, 2, dtype=x.dtype, device=x.device)
    return torch.einsum("ai,aj,ijk->ak", x, y, symbols)


# --- PyTorch's layers of transformers --------------------------------------------------------------


def forecaster() -> nn.Module:
    net = MTST_full(
        3, embed_dim=8, heads=2, dropout=0.0, n_layers=1, output_len=2, max_len=16,
        positional_encoding="absolute",
    )  # fmt: skip
    return Uses(forecast, net=net)


def forecast(self: Any, x: torch.Tensor) -> Any:
    return self.net(x, 1, 2, 3)


def private() -> nn.Module:
    """Opacus puts its own attention into PyTorch's layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Uses(masked, encoder=opacus.validators.ModuleValidator.fix(encoder))


def masked(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return self.encoder(x, mask=mask.bool())


def pooled_by_attention() -> nn.Module:
    """PyTorch's attention, whose mask a model of transformers makes of that of its patches."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.Siglip2VisionConfig(**sizes, num_hidden_layers=1)
    return siglip2.Siglip2MultiheadAttentionPoolingHead(config)


def pooled_sets(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return self.pool(x, mask.bool())


# --- modules that ask for values -----------------------------------------------------------------


def flow() -> nn.Module:
    """The spline of each number is chosen by a mask that is an index."""
    spline = normflows.flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=3)
    base = normflows.distributions.DiagGaussian(4, trainable=True)
    return Uses(flow_likelihood, flow=normflows.NormalizingFlow(base, [spline]))


def flow_likelihood(self: Any, x: torch.Tensor) -> Any:
    return self.flow.log_prob(x)


def transport() -> nn.Module:
    """As many steps as the diameter of the points says."""
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5, backend="tensorized")
    return Uses(transported, linear=nn.Linear(3, 3), loss=loss)


def transported(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    return self.loss(self.linear(x), y)


# --- recurrent layers ----------------------------------------------------------------------------


def rolled_out(self: Any, embeddings: torch.Tensor, latent: torch.Tensor) -> Any:
    return self.rollout(embeddings, latent)


def jumps(self: Any, *layers: torch.Tensor) -> Any:
    return self.jump(list(layers))


# --- equations with time -------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z).tanh().view(*z.shape[:-1], 4, 2)


def controlled(adjoint: bool) -> nn.Module:
    def run(self: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        coefficients = torchcde.natural_cubic_coeffs(x)
        path = torchcde.CubicSpline(coefficients)
        own = {}
        if adjoint:
            own["adjoint_params"] = (*self.field.parameters(), coefficients)
        return torchcde.cdeint(
            X=path, func=self.field, z0=z, t=path.interval, adjoint=adjoint, method="rk4",
            options={"step_size": 1.0}, **own,
        )  # fmt: skip

    return Uses(run, field=Field())


# --- products ------------------------------------------------------------------------------------


def contraction(self: Any, *factors: torch.Tensor) -> Any:
    return opt_einsum.contract("ij,jk,kl->il", *factors)


def tensor_of_factors(self: Any, core: torch.Tensor, *factors: torch.Tensor) -> Any:
    whole = tensorly.cp_to_tensor((None, list(factors)))
    return whole, tensorly.tucker_to_tensor((core, list(factors)))


# --- generators of their own ----------------------------------------------------------------------


class Noisy(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.diffusion = nn.Linear(3, 3), nn.Linear(3, 3)

    def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.drift(y)

    def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.diffusion(y))


def solved() -> tuple[nn.Module, torch.Tensor]:
    """torchsde: noise by intervals of time, from seeds that are drawn themselves."""

    def run(self: Any, y: torch.Tensor) -> torch.Tensor:
        noise = torchsde.BrownianInterval(0.0, 1.0, size=tuple(y.shape), dtype=y.dtype, entropy=1)
        times = torch.linspace(0, 1, 3)
        return torchsde.sdeint(self.equation, y, times, bm=noise, method="euler", dt=0.25)

    return Uses(run, equation=Noisy()), randn(2, 3)


def normalized() -> tuple[nn.Module, torch.Tensor]:
    """e3nn: the moments of an activation, by a million random numbers."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x) / e3nn.math.moment(self.activation, 2, dtype=x.dtype).sqrt()

    return Uses(run, activation=nn.PReLU()), randn(2, 3)


def spoken() -> tuple[nn.Module, torch.Tensor]:
    """transformers: a vocoder makes a voice of noise."""

    def run(self: Any, spectrogram: torch.Tensor) -> torch.Tensor:
        return self.net(spectrogram, generator=torch.Generator().manual_seed(3)).waveforms

    config = transformers.UnivNetConfig(
        model_in_channels=2, model_hidden_channels=2, num_mel_bins=3, resblock_kernel_sizes=[3],
        resblock_stride_sizes=[2], resblock_dilation_sizes=[[1]], kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=2,
    )  # fmt: skip
    return Uses(run, net=transformers.UnivNetModel(config)), randn(1, 4, 3)


WITH_GENERATORS = [solved, normalized, spoken]
NODES = (randn(6, 4), EDGES)
STEPS = (randn(4, 2, 3),)
PROGRAMS: dict[str, Program] = {
    "geometric, attention": Program(lambda: geometric.GAT(4, 8, 2, 3, add_self_loops=False), NODES),
    "geometric, batch norm": Program(
        lambda: geometric.GIN(4, 8, 2, 3, norm="BatchNorm"), NODES, steps=2
    ),
    "geometric, self loops": Program(
        lambda: geometric.GCN(4, 8, 2, 3), NODES, "bridge lower"  # they are told by their values
    ),
    "geometric, LSTM": Program(
        lambda: Uses(
            pooled, convolution=geometric.GatedGraphConv(4, 2), pool=geometric.Set2Set(4, 2)
        ),
        (*NODES, GRAPHS),
    ),
    "geometric, sparse embeddings": Program(
        lambda: Uses(
            triples,
            distances=geometric.TransE(6, 3, 4, sparse=True),
            products=geometric.DistMult(6, 3, 4, sparse=True),
        ),
        (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), torch.tensor([3, 4, 5])),
    ),
    "geometric, sparse adjacency": Program(
        lambda: Uses(adjacency, convolution=geometric.GraphConv(4, 2)),
        (randn(6, 4), randn(8)),
        "bridge",
    ),
    "gpytorch, sparse interpolation": Program(
        interpolation, (randn(5, 1), randn(5, 2)), "bridge"
    ),
    "x-transformers, sparse embeddings": Program(sparse_language_model, (TOKENS,)),
    "x-transformers, gradients by frequency": Program(
        lambda: by_frequency(language_model()), (TOKENS,)
    ),
    "transformers, gradients by frequency": Program(lambda: by_frequency(bert()), (TOKENS,)),
    "geometric, gradients by frequency": Program(
        lambda: by_frequency(
            Uses(
                triples, distances=geometric.TransE(6, 3, 4), products=geometric.DistMult(6, 3, 4)
            )
        ),
        (torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), torch.tensor([3, 0, 5])),
    ),
    "geometric, a cache": Program(
        lambda: geometric.GCNConv(4, 2, cached=True, add_self_loops=False), NODES
    ),
    "transformers, DINOv3": Program(
        lambda: transformer(transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig),
        (randn(1, 3, 8, 8),),
    ),
    "transformers, BEiT": Program(
        lambda: transformer(transformers.BeitModel, transformers.BeitConfig),
        (randn(1, 3, 8, 8),),
    ),
    "e3nn, coupling": Program(lambda: Uses(coupled), (randn(4, 3), randn(4, 3))),
    "mtst": Program(forecaster, (randn(2, 8, 3),)),
    "opacus": Program(private, (randn(5, 2, 8), (torch.ones(5, 5).tril(-2) > 0).long())),
    "geometric, encoder layers": Program(lambda: QFormer(8, 8, 6, 2, 1, 0.0), (randn(2, 5, 8),)),
    "geometric, multi-head attention": Program(
        lambda: geometric.GPSConv(4, geometric.GINConv(nn.Linear(4, 4)), heads=2), NODES,
        "bridge lower",
    ),
    "geometric, masked attention": Program(
        lambda: Uses(pooled_sets, pool=PoolingByMultiheadAttention(8, 1, 2, False)),
        (randn(2, 4, 8), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])),
    ),
    "transformers, masked attention": Program(
        pooled_by_attention, (randn(2, 4, 8), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    ),
    "transformers, LSTM": Program(
        lambda: encodec.EncodecLSTM(transformers.EncodecConfig(num_lstm_layers=1), 4),
        (randn(1, 4, 8),),
    ),
    "x-transformers, GRU": Program(
        lambda: Uses(rolled_out, rollout=RolloutGRU(8)), (randn(5, 2, 3, 8), randn(2, 3, 8))
    ),
    "geometric, layers of LSTM": Program(
        lambda: Uses(jumps, jump=geometric.JumpingKnowledge("lstm", 4, 2)),
        (randn(3, 4), randn(5, 4)[:3], randn(6, 4)[:3]),
        "bridge lower",
    ),
    "normflows": Program(flow, (randn(6, 4),), "bridge lower"),
    "geomloss": Program(transport, (randn(4, 3), randn(5, 3)), "bridge lower"),
    "e3nn, batch norm": Program(
        lambda: e3nn_layers.BatchNorm("2x0e + 1x1o"), (randn(6, 5),), steps=2
    ),
    "e3nn, gate": Program(
        lambda: e3nn_layers.Gate("2x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o"),
        (randn(3, 10),),
    ),
    "crf": Program(
        lambda: Uses(crf, crf=CRF(3, batch_first=True)),
        (
            randn(2, 4, 3),
            torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]]),
            torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        ),
        "bridge lower",  # it looks whether the mask begins with ones
    ),
    "x-transformers": Program(language_model, (TOKENS,)),
    "vector quantization": Program(  # it asks a buffer whether codes exist yet
        lambda: quantizer(VectorQuantize), (randn(2, 5, 8),), "bridge device", 3
    ),
    "vector quantization, k-means": Program(  # as many codes as vectors, whatever is drawn
        lambda: VectorQuantize(dim=8, codebook_size=6, kmeans_init=True, kmeans_iters=2),
        (randn(2, 3, 8),),
        "bridge lower",
        1,
        True,
    ),
    "vector quantization, residual": Program(
        lambda: quantizer(ResidualVQ, num_quantizers=2), (randn(2, 5, 8),), "bridge", 2
    ),
    "vector quantization, finite": Program(lambda: FSQ([5, 5, 3]), (randn(2, 5, 3),)),
    "snntorch": Program(spikes, STEPS),
    "pytorch-tcn": Program(
        lambda: pytorch_tcn.TCN(3, [4, 4], kernel_size=3, use_norm="weight_norm", dropout=0.0),
        (randn(2, 3, 12),),
    ),
    "captum, a path of gradients": Program(
        lambda: Uses(integrated, net=classifier()), (randn(2, 3),)
    ),
    "captum, saliency": Program(
        lambda: Uses(saliency, net=classifier()), (randn(2, 3),)
    ),
    "captum, hooks": Program(
        lambda: Uses(activations, net=classifier()), (randn(2, 3),)
    ),
    "zuko, splines": Program(
        lambda: Uses(likelihood, flow=zuko.flows.NSF(3, transforms=1, hidden_features=[8])),
        (randn(4, 3),),
    ),
    "zuko, neural": Program(
        lambda: Uses(likelihood, flow=zuko.flows.NAF(3, transforms=1, hidden_features=[8])),
        (randn(4, 3),),
    ),
    "zuko, integrals": Program(
        lambda: Uses(likelihood, flow=zuko.flows.UNAF(3, transforms=1, hidden_features=[4])),
        (randn(4, 3),),
    ),
    "torchcde": Program(lambda: controlled(False), (randn(3, 5, 2), randn(3, 4)), "bridge lower"),
    "torchcde, adjoint": Program(
        lambda: controlled(True), (randn(3, 5, 2), randn(3, 4)), "bridge lower"
    ),
    "minGRU": Program(lambda: minGRU(8), (randn(2, 6, 8),)),
    "torchrecurrent, MGU": Program(lambda: torchrecurrent.MGU(3, 4), STEPS),
    "torchrecurrent, IndRNN": Program(lambda: torchrecurrent.IndRNN(3, 4), STEPS, "bridge lower"),
    "soft mixture of experts": Program(
        lambda: soft_moe_pytorch.SoftMoE(dim=8, seq_len=6, num_experts=3), (randn(2, 6, 8),)
    ),
    "opt_einsum": Program(lambda: Uses(contraction), (randn(3, 4), randn(4, 5), randn(5, 2))),
    "tensorly": Program(
        lambda: Uses(tensor_of_factors), (randn(2, 2, 2), randn(3, 2), randn(4, 2), randn(5, 2))
    ),
}  # fmt: skip


def named(way: str, table: dict[str, Program]) -> list[str]:
    return [name for name, program in table.items() if way in program.ways.split()]


# --- results, of PyTorch or JAX ------------------------------------------------------------------


def leaves(out: Any) -> list[Any]:
    """The inexact leaves of a result, in one order."""
    if out is None:
        return []
    if isinstance(out, dict):
        return [y for k in sorted(out) for y in leaves(out[k])]
    if isinstance(out, list | tuple):
        return [y for o in out for y in leaves(o)]
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    return [out] if jnp.issubdtype(out.dtype, jnp.floating) else []


def score(out: Any) -> Any:
    return sum((((1 + 0.3 * k) * y * y + y).sum() for k, y in enumerate(leaves(out))), 0.0)


def close(actual: Any, expected: Any, where: str) -> None:
    """Rounding is measured beside the largest value, as sums have other orders."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().to_dense().cpu().numpy()
    scale = max(float(np.abs(expected).max(initial=0)), 1e-2)
    np.testing.assert_allclose(actual, expected, 0, 1e-3 * scale, err_msg=where)


class Expected(NamedTuple):
    """What PyTorch gives, after the last step."""

    out: Any
    parameters: dict[str, Any]
    """Their gradients; None where there is none."""
    inputs: list[Any]
    """Gradients of the arguments that have any."""
    buffers: dict[str, torch.Tensor]


def expected(module: nn.Module, program: Program) -> Expected:
    """Run a copy in PyTorch."""
    module = copy.deepcopy(module)
    args = [x.clone().requires_grad_(x.is_floating_point()) for x in program.args]
    out: Any = None
    for _ in range(max(program.steps, 1)):
        for x in (*args, *module.parameters()):
            x.grad = None
        out = module(*args)
        score(out).backward()
    return Expected(
        out,
        {k: p.grad for k, p in module.named_parameters() if p.requires_grad},
        [x.grad for x in args if x.requires_grad],
        {k: b for k, b in module.named_buffers() if b.is_floating_point()},
    )


def made(program: Program) -> nn.Module:
    torch.manual_seed(0)
    return program.make().train(program.steps > 0)


def zeros_of(x: Any) -> np.ndarray:
    return np.zeros(x.shape, np.float32)


def check(apply: Any, variables: Any, program: Program, want: Expected) -> None:
    """Eager calls, then a compiled step as often as PyTorch made one."""
    arrays = [jnp.asarray(x.numpy()) for x in program.args]
    where = [i for i, x in enumerate(program.args) if x.is_floating_point()]
    train = program.steps > 0

    def loss(params: Any, chosen: Any, buffers: Any) -> Any:
        args = list(arrays)
        for i, x in zip(where, chosen, strict=True):
            args[i] = x
        given = {**variables, "params": params, "buffers": buffers}
        key = {"rng": jax.random.key(0)} if program.draws else {}
        result = apply(given, *args, train=train, **key)
        out, buffers = result if train else (result, buffers)
        return score(out), (out, buffers)

    chosen = [arrays[i] for i in where]
    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    buffers = variables["buffers"]
    for _ in range(max(program.steps, 1)):
        eager, _ = loss(variables["params"], chosen, buffers)
        (grads, by_input), (out, buffers) = step(variables["params"], chosen, buffers)
    close(eager, score(want.out), "eager")
    for k, (y, x) in enumerate(zip(leaves(out), leaves(want.out), strict=True)):
        close(y, x, f"result {k}")
    assert set(grads) <= set(want.parameters)  # tied ones are one leaf
    for name, g in grads.items():
        close(g, zeros_of(g) if want.parameters[name] is None else want.parameters[name], name)
    for k, (g, x) in enumerate(zip(by_input, want.inputs, strict=True)):
        close(g, zeros_of(g) if x is None else x, f"input {k}")
    for name, b in buffers.items():
        if name in want.buffers:
            x = want.buffers[name]
            # What is drawn decides the order.
            b, x = (jnp.sort(b, None), x.flatten().sort().values) if program.draws else (b, x)
            close(b, x, name)
