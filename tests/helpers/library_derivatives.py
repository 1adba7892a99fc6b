"""Small programs of other people's libraries that differentiate, or have derivatives of their own.

Forces and equations are gradients inside of a function, which JAX differentiates again. Inner loops
take theirs by parameters. ``autograd.Function``s make tensors, or write to what they hold. The
tests of `library_programs` run both tables.
"""

from __future__ import annotations

import warnings
from typing import Any

import entmax
import torch
import torch_geometric.nn as geometric
import torchpme
from e3nn import nn as e3nn_layers
from e3nn import o3
from library_programs import EDGES, GRAPHS, Program, Uses, randn
from mambapy.mamba import MambaBlock, MambaConfig
from siren_pytorch import SirenNet
from tad_mctc.storch import linalg
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # distutils, and backslashes
    import higher
    import hippynn
    from hippynn import graphs
    from hippynn.graphs import inputs, networks, physics, targets

    hippynn.custom_kernels.set_custom_kernels("_pytorch_raw")  # others are of torch.compile

# --- forces --------------------------------------------------------------------------------------


def potential() -> nn.Module:
    return Uses(
        forces,
        product=o3.FullyConnectedTensorProduct("3x0e", "0e + 1o", "4x0e + 2x1o"),
        linear=o3.Linear("4x0e + 2x1o", "1x0e"),
        radial=e3nn_layers.FullyConnectedNet([1, 8, 3], torch.tanh),
    )


def forces(self: Any, places: torch.Tensor, edges: torch.Tensor) -> Any:
    """The energy and its derivative; a loss of forces takes a second one."""
    with torch.enable_grad():
        places = places.detach().requires_grad_()
        way = places[edges[0]] - places[edges[1]]
        harmonics = o3.spherical_harmonics([0, 1], way, True, "component")
        messages = self.product(self.radial(way.norm(dim=-1, keepdim=True)), harmonics)
        nodes = messages.new_zeros(len(places), messages.shape[1]).index_add(0, edges[1], messages)
        energy = self.linear(nodes).sum()
        (slope,) = torch.autograd.grad(energy, places, create_graph=True)
    return energy, slope


def molecule() -> nn.Module:
    def graph(places: torch.Tensor, graphs: torch.Tensor) -> Any:
        edges = EDGES.to(places.device)
        return edges, (places[edges[0]] - places[edges[1]]).norm(dim=-1)

    net = geometric.SchNet(8, 8, 1, 6, cutoff=5.0, interaction_graph=graph)
    return Uses(molecular_forces, net=net)


def molecular_forces(self: Any, places: torch.Tensor, atoms: torch.Tensor) -> Any:
    """PyTorch Geometric's own idiom: nothing switches gradients on."""
    places = places.detach().requires_grad_()
    energy = self.net(atoms, places, GRAPHS.to(places.device))
    (slope,) = torch.autograd.grad(energy.sum(), places, create_graph=True)
    return energy, -slope


PAIRS = torch.combinations(torch.arange(4))


def charges() -> nn.Module:
    return Uses(electric_forces, potential=torchpme.Calculator(torchpme.CoulombPotential()).float())


def electric_forces(self: Any, places: torch.Tensor, charges: torch.Tensor) -> Any:
    places = places.detach().requires_grad_()
    pairs = PAIRS.to(places.device)
    distances = (places[pairs[:, 0]] - places[pairs[:, 1]]).norm(dim=-1)
    cell = torch.zeros(3, 3, device=places.device)  # not periodic
    energy = (self.potential(charges, cell, places, pairs, distances) * charges).sum()
    (slope,) = torch.autograd.grad(energy, places, create_graph=True)
    return energy, -slope


def graph_of_forces() -> nn.Module:
    """hippynn's own node for forces is a gradient by an argument, which only PyTorch's users mark."""
    kinds, places = inputs.SpeciesNode(db_name="Z"), inputs.PositionsNode(db_name="R")
    sizes = {
        "possible_species": [0, 1, 6], "n_features": 4, "n_sensitivities": 5, "dist_soft_min": 0.7,
        "dist_soft_max": 2.5, "dist_hard_max": 3.5, "n_interaction_layers": 1, "n_atom_layers": 1,
    }  # fmt: skip
    net = networks.Hipnn("net", (kinds, places), module_kwargs=sizes)
    energy = targets.HEnergyNode("energy", net)
    force = physics.GradientNode("force", (energy, places), sign=-1)
    return Uses(of_graph, net=graphs.GraphModule([kinds, places], [energy.mol_energy, force]))


def of_graph(self: Any, places: torch.Tensor, atoms: torch.Tensor) -> Any:
    return self.net(atoms, places)


# --- equations and inner loops --------------------------------------------------------------------


def poisson(self: Any, points: torch.Tensor) -> Any:
    """A physics-informed network: the slope of a field, and its Laplacian."""
    points = points.detach().requires_grad_()
    field = self.field(points)
    (slope,) = torch.autograd.grad(field.sum(), points, create_graph=True)
    curvatures = [
        torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)[0][:, i]
        for i in range(points.shape[1])
    ]
    return field, slope, torch.stack(curvatures).sum(0)


def penalty(self: Any, points: torch.Tensor) -> Any:
    """A gradient penalty of a critic, between real points and others."""
    points = points.detach().requires_grad_()
    (slope,) = torch.autograd.grad(self.critic(points).sum(), points, create_graph=True)
    return (slope.norm(dim=1) - 1) ** 2


def adapted(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    """Two steps of training inside, as in meta-learning."""
    optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(self.net, optimizer, copy_initial_weights=False) as (net, steps):
        for _ in range(2):
            steps.step(((net(x) - y) ** 2).mean())
        return net(x)


# --- Functions of their own -----------------------------------------------------------------------


def sparse_attention(self: Any, x: torch.Tensor) -> Any:
    """Their Functions count with ``torch.arange`` and make numbers with ``torch.tensor``."""
    y = self.linear(x)
    alpha = 1 + self.alpha.weight.sigmoid()
    return (
        entmax.sparsemax(y, dim=-1),
        entmax.entmax15(y, dim=-1),
        entmax.sparsemax(y, dim=-1, k=2),  # which asks whether two were enough
        entmax.entmax_bisect(y, 1.3, n_iter=8),
        entmax.entmax_bisect(y, alpha[0], n_iter=8),
        entmax.budget_bisect(y, 2, n_iter=8),
    )


def eigenvalues(self: Any, x: torch.Tensor) -> Any:
    """The backward pass makes a tensor of a number, and broadens what is degenerate."""
    a = self.linear(x)
    values, vectors = linalg.eighb(a + a.mT, broadening_method="lorn", factor=1e-6)
    return values, vectors * vectors


MOLECULES = (randn(2, 4, 3), torch.tensor([[1, 6, 1, 0], [6, 1, 1, 1]]))
PROGRAMS: dict[str, Program] = {
    "geometric, forces": Program(molecule, (randn(6, 3), torch.tensor([1, 6, 1, 1, 6, 1]))),
    "e3nn, forces": Program(potential, (randn(4, 3), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))),
    "torch-pme, forces": Program(charges, (randn(4, 3), randn(4, 1))),
    "hippynn, forces": Program(graph_of_forces, MOLECULES),
    "siren, an equation": Program(
        lambda: Uses(poisson, field=SirenNet(2, 8, 1, 2, w0_initial=3.0)), (randn(4, 2),)
    ),
    "siren, a gradient penalty": Program(
        lambda: Uses(penalty, critic=SirenNet(3, 8, 1, 1, w0_initial=3.0)), (randn(4, 3),)
    ),
    "higher, an inner loop": Program(
        lambda: Uses(adapted, net=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))),
        (randn(4, 3), randn(4, 1)),
    ),
    "entmax": Program(
        lambda: Uses(sparse_attention, linear=nn.Linear(5, 5), alpha=nn.Embedding(1, 1)),
        (randn(3, 5),),
    ),
    "tad-mctc, eigenvalues": Program(
        lambda: Uses(eigenvalues, linear=nn.Linear(4, 4)), (randn(2, 4, 4),)
    ),
    "mambapy, a scan in place": Program(
        lambda: MambaBlock(MambaConfig(d_model=4, n_layers=1, d_state=2)), (randn(1, 6, 4),)
    ),
}  # fmt: skip
