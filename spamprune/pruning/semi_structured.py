"""N:M sparsity: of each M weights along the input dimension N stay; GPUs compute with 2:4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spamprune.bayes.parameters import check_shapes, named_parameters
from spamprune.copies import copied
from spamprune.errors import PruningError
from spamprune.pruning.masks import Masks, check_numbers


def semi_structured_masks(
    model: nn.Module, scores: Mapping[str, Tensor], *, n: int = 2, m: int = 4
) -> tuple[Masks, list[str]]:
    """Return masks that keep the ``n`` best-scored of each ``m`` weights of every matrix.

    Matrices are the weights of linear layers and convolutions and the input projections of
    ``nn.MultiheadAttention``. Groups follow each other along the input dimension, in a convolution
    along its input channels at each place of the kernel: what sparse tensor cores multiply by. Of
    equal scores the earlier goes. All other parameters are kept.

    Args:
        model: The network.
        scores: A score for every trainable parameter, by name.
        n: How many weights of a group stay, fewer than ``m``.
        m: How many weights a group has.

    Returns:
        Boolean tensors shaped like the scores, True where a weight stays, and notes on the matrices
        that are left whole.

    Raises:
        PosteriorError: The scores do not fit the network.
        PruningError: A score is not a number, or no matrix has inputs in groups of ``m``.
    """
    if not 0 < n < m:
        raise PruningError(f"{n}:{m} is no pattern: give 0 < n < m, such as 2 of 4")
    check_shapes(named_parameters(model), scores, "the set of scores")
    check_numbers(scores)
    masks = {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}
    matrices = [name for name, _, _ in _matrices(model) if name in scores]
    notes = []
    for name in matrices:
        inputs_last = scores[name].movedim(1, -1)
        inputs = inputs_last.shape[-1]
        if inputs % m:
            notes.append(f"{name}: left whole: {inputs} inputs are no multiple of {m}")
            continue
        groups = inputs_last.reshape(-1, m)
        worst = groups.argsort(dim=1, stable=True)[:, : m - n]
        keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, worst, value=False)
        masks[name] = keep.view(inputs_last.shape).movedim(-1, 1).contiguous()
    if len(notes) == len(matrices):
        why = "; ".join(notes) or "it has no trainable linear layers or convolutions"
        raise PruningError(f"nothing of {type(model).__name__} can be made {n}:{m} sparse: {why}")
    return masks, notes


def compressed(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return a copy whose 2:4 sparse linear layers hold compressed weights, for inference.

    torch multiplies by such weights on NVIDIA GPUs of compute capability 8.0 or later, in half
    precision, if both sizes are multiples of 16 to 64. The copy cannot be trained or saved as an
    artifact; save the original.

    Args:
        model: A network under the masks of :func:`semi_structured_masks`, in its final precision
            and place.

    Returns:
        The copy, and notes on the 2:4 sparse matrices that are stored densely, with the reason.

    Raises:
        PruningError: No layer can be compressed.
    """
    small = copied(model).requires_grad_(False)
    stored, notes = 0, []
    for name, module, weight in list(_matrices(small)):
        if not is_semi_structured(weight):
            continue
        try:
            module.weight = nn.Parameter(_compressed(module, weight), requires_grad=False)
            stored += 1
        except RuntimeError as error:
            notes.append(f"{name}: stored densely: {' '.join(str(error).split())}")
    if not stored:
        why = "; ".join(notes) or "no matrix is 2:4 sparse, apply semi_structured_masks first"
        raise PruningError(f"nothing of {type(model).__name__} can be compressed to 2:4: {why}")
    return small, notes


def _compressed(module: nn.Module, weight: Tensor) -> Tensor:
    """Return ``weight`` in torch's compressed form, or raise a RuntimeError that says why not."""
    if type(module) is not nn.Linear:  # a subclass may do other things with its weight
        raise RuntimeError(f"torch compresses those of nn.Linear, not of {type(module).__name__}")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        # torch takes float32 too, but as 1:2, and would drop weights that 2:4 keeps
        raise RuntimeError(f"torch has 2:4 for float16 and bfloat16, not for {weight.dtype}")
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())


def is_semi_structured(weight: Tensor) -> bool:
    """Return whether each four weights along the input dimension have two zeros."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1) <= 2).all())


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the weights that inputs are multiplied by, outputs first: name, module, weight."""
    names = {p: name for name, p in model.named_parameters()}
    for module in model.modules():
        weights: list[object] = []
        if isinstance(module, nn.MultiheadAttention):
            weights = [module.in_proj_weight]  # or, where keys and values have their own sizes:
            weights += [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        elif isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):
            weights = [module.weight]  # transposed convolutions have their inputs first
        for weight in weights:
            if isinstance(weight, nn.Parameter) and weight in names:
                yield names.pop(weight), module, weight
