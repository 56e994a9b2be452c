"""Sums of squared per-sample gradients, by the cheapest exact formula, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from spamprune.bayes.curvature.rules import Depthwise, MatrixRule, Rule

#: Bytes of per-sample gradients held at once: they should stay in a core's cache.
_SLICE = 2**20
#: Bytes of unfolded inputs held at once.
COLUMNS = 2**23


def at_least_single(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32, in which sums over data sets are safe."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def zero_total(parameter: Tensor) -> Tensor:
    """Return a total to sum a parameter's squares in: float32, or float64 for float64."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def slices(samples: int, bytes_per_sample: int, budget: int) -> list[slice]:
    """Cut ``samples`` into slices that fit a budget of bytes, of one sample at least."""
    step = max(1, budget // max(1, bytes_per_sample))
    return [slice(start, start + step) for start in range(0, samples, step)]


def sum_of_squares(rule: Rule, gradient: Tensor, data: tuple[Tensor, ...], elements: int) -> Tensor:
    """Return the sum over samples of a target's squared per-sample gradients.

    Args:
        rule: How the gradients are got.
        gradient: At the operation's output, split.
        data: What the rule needs, split.
        elements: Number of elements of the target.

    Returns:
        Shape (elements,), in float32 at least.
    """
    gradient = at_least_single(gradient)
    data = tuple(map(at_least_single, data))
    width = max((x[0].numel() for x in (gradient, *data)), default=0) * gradient.element_size()
    if isinstance(rule, MatrixRule) and not isinstance(rule, Depthwise):
        total = gradient.new_zeros(())
        for part in slices(len(gradient), width * rule.copies, COLUMNS):
            total = total + _matrix_squares(rule, gradient[part], *(x[part] for x in data))
        return rule.restore(total).flatten()
    total = gradient.new_zeros(elements)
    for part in slices(len(gradient), max(width, 4 * elements), _SLICE):
        total += rule.per_sample(gradient[part], *(x[part] for x in data)).square_().sum(0)
    return total


def _matrix_squares(rule: MatrixRule, gradient: Tensor, *data: Tensor) -> Tensor:
    """Return ``Σ_s (rows_s columns_sᵀ)²``, shape (groups, out, in)."""
    rows, columns = rule.matrices(gradient, *data)
    samples, groups, out, positions = rows.shape
    elements = groups * out * columns.shape[2]
    if positions == 1:
        left, right = rows.squeeze(-1).square(), columns.squeeze(-1).square()
        return left.permute(1, 2, 0) @ right.transpose(0, 1)
    if positions <= 3 and elements > 2**14:
        return _few_positions(rows, columns)
    total = rows.new_zeros(groups, out, columns.shape[2])
    for part in slices(samples, elements * rows.element_size(), _SLICE):
        found = rows[part] @ columns[part].mT
        if len(found) == 1:
            total.addcmul_(found[0], found[0])
        else:
            total += found.square_().sum(0)
    return total


def _few_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """Expand the square of a sum over few positions into one product of matrices (Gram's trick).

    ``(Σ_t g_t a_t)² = Σ_{t≤u} (2 − [t=u]) (g_t g_u)(a_t a_u)``: one entry for each pair, so that no
    per-sample gradient is ever formed.
    """
    pairs = [(t, u) for t in range(rows.shape[-1]) for u in range(t, rows.shape[-1])]
    left = torch.cat([rows[..., t] * rows[..., u] * (1 + (t != u)) for t, u in pairs])
    right = torch.cat([columns[..., t] * columns[..., u] for t, u in pairs])
    return left.permute(1, 2, 0) @ right.transpose(0, 1)
