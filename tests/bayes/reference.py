"""Slow, obvious references."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacrev, vmap


def per_sample_gradients(model, inputs, targets, loss_of=F.cross_entropy):
    """Return for each parameter the gradient of each sample's loss, shape (B, *shape).

    ``loss_of`` takes outputs and targets of one sample, with a batch dimension of 1.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def loss(parameters, x, y):
        outputs = functional_call(model, parameters | rest, (x[None],))
        return loss_of(outputs, y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)


def squared(model, inputs, targets, loss_of=F.cross_entropy):
    """Return the exact empirical Fisher's diagonal, summed over the samples."""
    gradients = per_sample_gradients(model, inputs, targets, loss_of)
    return {n: g.square().sum(0) for n, g in gradients.items()}


def gauss_newton(model, inputs):
    """Return the exact Gauss-Newton diagonal: squared gradients averaged over the labels."""
    with torch.no_grad():
        probabilities = model(inputs).softmax(-1)
    total = {}
    for label in range(probabilities.shape[1]):
        targets = torch.full((len(inputs),), label)
        for name, g in per_sample_gradients(model, inputs, targets).items():
            weight = probabilities[:, label].reshape(-1, *[1] * (g.dim() - 1))
            total[name] = total.get(name, 0) + (weight * g.square()).sum(0)
    return total


def kronecker(block, delta, temperature):
    """Return P of Proposition 1 for one group, dense and differentiable in δ, from Q itself."""
    outputs, inputs = block.outputs[0].double(), torch.eye(1, dtype=torch.float64)
    if block.inputs is not None:
        inputs = block.inputs[0].double()
    (values_g, vectors_g), (values_a, vectors_a) = (torch.linalg.eigh(f) for f in (outputs, inputs))
    vectors = torch.kron(vectors_g, vectors_a)
    rotated = (vectors.mT @ torch.diag(delta.flatten()) @ vectors).diagonal()
    middle = torch.kron(values_g.clamp(min=0), values_a.clamp(min=0)) / temperature + rotated
    return vectors @ torch.diag(middle) @ vectors.mT


def gauss_newton_by_hessians(model, inputs, targets, loss_of):
    """Return the diagonal of ``Σ_b J_bᵀ H_b J_b``, H_b the Hessian of a loss in its outputs."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for x, y in zip(inputs, targets, strict=True):

        def outputs_of(parameters, x=x):
            return functional_call(model, parameters | rest, (x[None],))

        outputs = outputs_of(parameters).detach()
        size = outputs.numel()
        curvature = hessian(lambda o, y=y: loss_of(o, y[None]))(outputs).reshape(size, size)
        for name, jacobian in jacrev(outputs_of)(parameters).items():
            rows = jacobian.reshape(size, -1)
            diagonal = torch.einsum("ip,ij,jp->p", rows, curvature, rows)
            total[name] += diagonal.view_as(total[name])
    return total


def log_evidence(parameters, curvature, log_precision, temperature):
    """Return the log evidence in float64, differentiable in log δ, with dense P."""
    total = -curvature.loss / temperature
    for name, diag in curvature.diag.items():
        log_delta = log_precision[name].double()
        squares = parameters[name].detach().double().square()
        if name in curvature.kron:
            log_det = kronecker(curvature.kron[name], log_delta.exp(), temperature).logdet()
        else:
            log_det = (diag.double() / temperature + log_delta.exp()).log().sum()
        total = total - 0.5 * ((log_delta.exp() * squares).sum() + log_det - log_delta.sum())
    return total


def one_at_a_time(model, inputs, targets, labels="ef"):
    """Return exact diagonals from gradients of single samples; any model, no vmap.

    Each sample is a batch of itself twice, of which one loss is taken: at batch size one torch's
    BatchNorm takes wrong gradients from tokens.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for x, y in zip(inputs, targets, strict=True):
        logits = model(torch.stack([x, x]))[0]
        weights = {int(y): 1.0}
        if labels == "ggn":
            weights = dict(enumerate(logits.detach().softmax(0).tolist()))
        for label, weight in weights.items():
            loss = -logits.log_softmax(0)[label]
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient.square()
    return total
