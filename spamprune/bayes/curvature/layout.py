"""Where the samples of a batch lie in a tensor, found by changing one sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spamprune.errors import PosteriorError


@dataclass(frozen=True)
class Layout:
    """Samples lie along one axis, which may be folded with another, as windows or tokens are.

    Attributes:
        axis: Along which samples lie.
        inner: Whether a folded axis runs through the samples fastest.
    """

    axis: int
    inner: bool

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Return a view of shape (samples, folded, *other axes).

        Raises:
            PosteriorError: The axis does not hold as much of each sample.
        """
        front = tensor.movedim(self.axis, 0)
        if len(front) % samples:
            raise PosteriorError(
                f"an operation has {len(front)} rows for {samples} samples: which ones it sees "
                "depends on the data; use estimator 'sketch', which follows no operations"
            )
        if self.inner:
            return front.unflatten(0, (-1, samples)).transpose(0, 1)
        return front.unflatten(0, (samples, -1))


def find_layout(before: Tensor, after: Tensor, samples: int, changed: int) -> Layout | None:
    """Return where samples lie, from a tensor before and after one sample was changed.

    Args:
        before: A tensor of the forward pass of a batch.
        after: The same with the sample ``changed`` replaced.
        samples: Size of the batch.
        changed: Index of that sample.

    Returns:
        None if no axis holds the change in just one sample, e.g. as samples are mixed.
    """
    if before.shape != after.shape:
        return None
    moved = before != after
    if not moved.any():  # hides behind a constant: the usual place, which the check then proves
        moved = moved.clone()
        if moved.numel() == 0 or moved.dim() == 0 or len(moved) % samples:
            return None
        return Layout(0, inner=False)
    for axis, size in enumerate(moved.shape):
        if size % samples:
            continue
        rows = moved.movedim(axis, 0).flatten(1).any(1) if moved.dim() > 1 else moved
        for inner in (False, True):
            mine = Layout(0, inner).split(rows, samples)
            if not mine[:changed].any() and not mine[changed + 1 :].any():
                return Layout(axis, inner)
    return None
