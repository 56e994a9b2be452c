"""Slow, obvious references."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap


def per_sample_gradients(model, inputs, targets):
    """Return for each parameter the gradient of each sample's loss, shape (B, *shape)."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def loss(parameters, x, y):
        outputs = functional_call(model, parameters | rest, (x[None],))
        return F.cross_entropy(outputs, y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)


def squared(model, inputs, targets):
    """Return the exact empirical Fisher's diagonal, summed over the samples."""
    return {n: g.square().sum(0) for n, g in per_sample_gradients(model, inputs, targets).items()}


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
