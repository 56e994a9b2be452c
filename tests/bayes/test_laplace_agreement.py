"""Our Laplace evidence is that of laplace-torch, an implementation of others."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spamprune.bayes.curvature.exact import exact
from spamprune.bayes.curvature.kron import kron
from spamprune.bayes.evidence import log_evidence
from spamprune.bayes.parameters import named_parameters

laplace = pytest.importorskip("laplace")
backends = pytest.importorskip("laplace.curvature")

NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
        ),
        (4,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 6, 6),
    ),
}


def setting(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(11, *shape, dtype=torch.float64)
    loader = DataLoader(TensorDataset(inputs, torch.randint(0, 3, (11,))), batch_size=4)
    return model, loader


def theirs(model, loader, structure, backend, precision, temperature):
    fitted = laplace.Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure=structure,
        backend=backend,
        prior_precision=precision,
        temperature=temperature,
    )
    fitted.fit(loader)
    return fitted


def precisions(model, structure):
    """Return δ by name, and as laplace-torch takes it: one, one per tensor or one per parameter."""
    parameters = named_parameters(model)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 3 + 0.1

    if structure == "scalar":
        one = draw(1)
        return {n: one.expand(p.shape) for n, p in parameters.items()}, one
    if structure == "layerwise":
        each = draw(len(parameters))
        pairs = zip(each, parameters.items(), strict=True)
        return {n: delta.expand(p.shape) for delta, (n, p) in pairs}, each
    delta = {n: draw(*p.shape) for n, p in parameters.items()}
    return delta, torch.cat([d.flatten() for d in delta.values()])


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("prior", ["scalar", "layerwise", "parameterwise"])
@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_diagonal_evidence(name, labels, prior, temperature):
    model, loader = setting(name)
    delta, vector = precisions(model, prior)
    backend = {"ef": backends.CurvlinopsEF, "ggn": backends.CurvlinopsGGN}[labels]
    fitted = theirs(model, loader, "diag", backend, vector, temperature)
    curvature = exact(model, loader, n_data=11, labels=labels)
    torch.testing.assert_close(torch.cat([h.flatten() for h in curvature.diag.values()]), fitted.H)
    got = log_evidence(named_parameters(model), curvature, delta, temperature)
    assert got == pytest.approx(fitted.log_marginal_likelihood().item(), rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_kronecker_factors_and_evidence(name, labels, prior, temperature):
    model, loader = setting(name)
    delta, vector = precisions(model, prior)
    backend = {"ef": backends.CurvlinopsEF, "ggn": backends.CurvlinopsGGN}[labels]
    fitted = theirs(model, loader, "kron", backend, vector, temperature)
    curvature = kron(model, loader, n_data=11, labels=labels)
    for key, factors in zip(named_parameters(model), fitted.H_facs.kfacs, strict=True):
        block = curvature.kron[key]  # of a weight G and A, a mean over data; of a bias G
        mine = [f[0] for f in (block.outputs, block.inputs) if f is not None]
        torch.testing.assert_close(mine, list(factors))
    got = log_evidence(named_parameters(model), curvature, delta, temperature)
    assert got == pytest.approx(fitted.log_marginal_likelihood().item(), rel=1e-10)
