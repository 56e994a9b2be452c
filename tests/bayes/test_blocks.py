import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spamprune.bayes.curvature.blocks import Diagonal, Kronecker
from tests.bayes.reference import kronecker


def semidefinite(groups, n, rank, generator):
    rows = torch.randn(groups, n, rank, generator=generator, dtype=torch.float64)
    return rows @ rows.mT


def kron(shape=(6, 2, 2, 2), groups=2, seed=0):
    """A block of full rank, with a prior precision of great range."""
    generator = torch.Generator().manual_seed(seed)
    out, inp = shape[0] // groups, torch.Size(shape[1:]).numel()
    inputs = semidefinite(groups, inp, inp, generator) if len(shape) > 1 else None
    block = Kronecker(semidefinite(groups, out, out, generator), inputs, shape)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()
    return block, delta


def groups_of(block, delta):
    """Return each group as a block of its own, with its δ."""
    pairs = []
    for g, rows in enumerate(delta.split(block.outputs.shape[-1])):
        inputs = None if block.inputs is None else block.inputs[g : g + 1]
        pairs.append((Kronecker(block.outputs[g : g + 1], inputs, tuple(rows.shape)), rows))
    return pairs


def dense_log_det(block, delta, temperature):
    return sum(kronecker(b, d, temperature).logdet() for b, d in groups_of(block, delta))


SHAPES = [((5,), 1), ((4, 3), 1), ((6, 2, 2, 2), 2), ((4, 1, 3), 4), ((8,), 2)]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kronecker_against_the_dense_proposition(shape, groups, temperature):
    block, delta = kron(shape, groups)
    dense = [kronecker(b, d, temperature) for b, d in groups_of(block, delta)]
    diag = torch.cat([p.diagonal() for p in dense]).reshape(shape)
    torch.testing.assert_close(block.precision(delta, temperature), diag)
    torch.testing.assert_close(
        block.log_det(delta, temperature), sum(p.logdet() for p in dense), rtol=1e-10, atol=1e-10
    )
    log_delta = delta.log().requires_grad_()
    (gradient,) = torch.autograd.grad(dense_log_det(block, log_delta.exp(), temperature), log_delta)
    torch.testing.assert_close(block.log_det_gradient(delta, temperature), gradient)


def test_autocast_leaves_the_products_as_they_are():
    block, delta = kron((6, 2, 2, 2), 2)
    block = Kronecker(block.outputs.float(), block.inputs.float(), block.shape)
    found = block.precision(delta, 1.0), block.log_det_gradient(delta, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = block.precision(delta, 1.0), block.log_det_gradient(delta, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_one_precision_gives_the_exact_determinant(temperature):
    block, _ = kron((4, 3), 1)
    exact = torch.kron(block.outputs[0], block.inputs[0]) / temperature + 0.7 * torch.eye(12)
    delta = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(block.log_det(delta, temperature), exact.logdet())
    torch.testing.assert_close(block.precision(delta, temperature), exact.diagonal().reshape(4, 3))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from(SHAPES),
    temperature=st.floats(0.1, 10),
)
def test_the_trace_is_kept_and_the_determinant_never_too_small(seed, shape, temperature):
    block, delta = kron(*shape, seed=seed)
    true = block.diag / temperature + delta
    torch.testing.assert_close(block.precision(delta, temperature).sum(), true.sum())
    exact = 0.0
    for part, rows in groups_of(block, delta):
        inputs = torch.eye(1, dtype=torch.float64) if part.inputs is None else part.inputs[0]
        exact += (
            (torch.kron(part.outputs[0], inputs) / temperature)
            .add(torch.diag(rows.flatten()))
            .logdet()
        )
    assert block.log_det(delta, temperature) >= exact - 1e-8


def test_the_diagonal_is_that_of_the_product():
    block, _ = kron((6, 2, 2), 2)
    expected = [
        torch.kron(g, a).diagonal() for g, a in zip(block.outputs, block.inputs, strict=True)
    ]
    torch.testing.assert_close(block.diag, torch.cat(expected).reshape(6, 2, 2))
    bias, _ = kron((6,), 2)
    torch.testing.assert_close(bias.diag, bias.outputs.diagonal(dim1=-2, dim2=-1).flatten())


def test_eigenvalues_below_zero_count_as_zero():
    block = Kronecker(torch.diag(torch.tensor([-5.0, 2.0]))[None], None, (2,))
    delta = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(block.precision(delta, 1.0), torch.tensor([1.0, 3.0]))
    assert block.log_det(delta, 1.0).isfinite()


def test_single_precision_factors_of_low_rank_are_accurate():
    """A rank-1 factor, such as one sample gives, with curvature far above the prior."""
    generator = torch.Generator().manual_seed(0)
    outputs = semidefinite(1, 20, 1, generator).mul(1e6).float()
    inputs = semidefinite(1, 30, 1, generator).float()
    block = Kronecker(outputs, inputs, (20, 30))
    delta = torch.full((20, 30), 1e-3)
    assert block.precision(delta, 1.0).dtype == torch.float32
    # one eigenvalue of each factor is not zero, up to the rounding of float32 inputs
    trace = torch.trace(outputs[0]).double() * torch.trace(inputs[0]).double()
    torch.testing.assert_close(block.precision(delta, 1.0).double().sum(), trace, rtol=1e-4, atol=0)
    assert (block.log_det_gradient(delta, 1.0) <= 1 + 1e-5).all()
    assert block.log_det_gradient(delta, 1.0).min() > 0


def test_decompositions_are_made_once(monkeypatch):
    block, delta = kron((4, 3), 1)
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(1) or eigh(m))
    for temperature in (1.0, 2.0):
        block.precision(delta, temperature)
        block.log_det(delta, temperature)
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (1, 50), (2, 3, 2, 2)])
@pytest.mark.parametrize("elements", [1, 4, 1000])
def test_parts_of_a_diagonal_cover_it_once(shape, elements):
    h = torch.rand(shape)
    seen = torch.zeros(shape)
    for rows, part in Diagonal(h).parts(elements):
        assert torch.equal(part.h, h[rows])
        assert part.h.numel() <= elements or part.h.shape[0] == 1
        seen[rows] += 1
    assert (seen == 1).all()


def test_a_diagonal_block_is_element_by_element():
    h, delta = torch.tensor([0.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 3.0])
    block = Diagonal(h)
    precision = torch.tensor([1.0, 3.0, 6.0])
    torch.testing.assert_close(block.precision(delta, 2.0), precision)
    torch.testing.assert_close(block.log_det(delta, 2.0), precision.double().log().sum())
    torch.testing.assert_close(block.log_det_gradient(delta, 2.0), delta / precision)
