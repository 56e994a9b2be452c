"""Mean-field variational inference: a Gaussian for every weight, for any network.

Every weight is ``w = γ w̃`` with ``w̃ ~ N(0, 1)`` a priori and ``w̃ ~ N(μ, σ²)`` a posteriori; the
scale γ is learned with it, see :mod:`spamprune.bayes.scales`. Training minimises the negative
evidence lower bound per sample, ``mean loss + KL/N``, with one draw of the weights per batch
(Blundell et al. 2015).

One draw for a whole batch makes for noisy gradients: :mod:`spamprune.bayes.noise` has each sample
draw its own where it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spamprune.bayes import noise, reparameterised
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.curvature.batches import pair
from spamprune.bayes.curvature.squares import at_least_single
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import check_positive, check_shapes, named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.bayes.reduction import layers
from spamprune.bayes.reparameterised import Weight
from spamprune.bayes.scales import Horseshoe, LayerScale, softplus_inverse
from spamprune.errors import PosteriorError
from spamprune.modules import call_with, check_python, device_of, evaluation_mode

#: σ at the start, as in the paper's code.
_START = 0.1


class MeanField(nn.Module):
    """A network with a distribution over its weights, to be trained in its place.

    ``loss = F.cross_entropy(field(x), y) + field.penalty()`` in any training loop; optimise
    ``field.parameters()``. In evaluation mode the weights are the posterior means. The network's
    own parameters are where the means start; they take no part in training, and :meth:`collapse`
    sets them to the means. Dropout is best left out.

    Args:
        network: The network. It is registered as a part, so that modes, devices and buffers follow.
        n_data: N, the number of training samples.
        prior: ``"gaussian"`` has one learned scale for each layer; ``"horseshoe"`` one for each
            row too, with heavy tails.

    Raises:
        PosteriorError: There is nothing to train, there are no data, the prior is unknown, the
            network is TorchScript, or an embedding has something in its row for padding, which is
            taken to be zero.
    """

    def __init__(
        self,
        network: nn.Module,
        n_data: int,
        *,
        prior: Literal["gaussian", "horseshoe"] = "gaussian",
    ):
        super().__init__()
        kinds = {"gaussian": LayerScale, "horseshoe": Horseshoe}
        if prior not in kinds:
            raise PosteriorError(f"unknown prior {prior!r}: one of {', '.join(kinds)}")
        check_positive(n_data=n_data)
        check_python(network, PosteriorError)
        parameters = named_parameters(network)
        if not parameters:
            raise PosteriorError("the network has no trainable parameters: set requires_grad")
        self.network, self.n_data = network, n_data
        self._layers = list(layers(parameters).values())
        self._names = [name for names in self._layers for name in names]
        self._uses: dict[bool, noise.Uses] = {}  # in training and out of it
        self.scales = nn.ModuleList(
            kinds[prior]([parameters[n].detach() for n in names], last=names is self._layers[-1])
            for names in self._layers
        ).to(next(iter(parameters.values())))
        padding = _padding(network)
        self.means, self.spreads = nn.ParameterList(), nn.ParameterList()
        with torch.no_grad():
            for name, scale in zip(self._names, self._scales(draw=False), strict=True):
                value = parameters[name].detach()
                self.means.append(nn.Parameter((value / scale).contiguous()))
                self.spreads.append(nn.Parameter(torch.full_like(value, softplus_inverse(_START))))
                mask = torch.ones_like(value, dtype=torch.bool)
                if id(parameters[name]) in padding:
                    mask[padding[id(parameters[name])]] = False
                self.register_buffer("mask:" + name.replace(".", ":"), mask)

    def _own(self) -> dict[str, nn.Parameter]:
        """Return the network's own parameters by name, which may have been frozen since."""
        own = dict(self.network.named_parameters())
        return {name: own[name] for name in self._names}

    def _mask(self, name: str) -> Tensor:
        return self.get_buffer("mask:" + name.replace(".", ":"))

    def masks(self) -> dict[str, Tensor]:
        """Return which weights stay, by name."""
        return {name: self._mask(name) for name in self._names}

    def _scales(self, *, draw: bool) -> list[Tensor]:
        """Return γ for every parameter, of a shape that broadcasts to its own."""
        return [scale for layer in self.scales for scale in cast(LayerScale, layer)(draw=draw)]

    def _posteriors(self) -> dict[str, Weight]:
        """Return the distributions of the weights by name, under drawn scales."""
        rows = zip(self._names, self._scales(draw=True), self.means, self.spreads, strict=True)
        return {
            name: Weight(mean, spread, scale, self._mask(name))
            for name, scale, mean, spread in rows
        }

    def draw(self) -> dict[str, Tensor]:
        """Return weights drawn from the posterior, by name."""
        return {name: torch.add(*weight.draw()) for name, weight in self._posteriors().items()}

    def _centre(self) -> dict[str, Tensor]:
        """Return the posterior means by name, at the medians of the scales."""
        rows = zip(self._names, self._scales(draw=False), self.means, strict=True)
        return {name: scale * mean * self._mask(name) for name, scale, mean in rows}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs: in training mode under drawn weights, else at the means."""
        if self.training:
            return self._drawn(inputs)
        return call_with(self.network, self._centre(), inputs)

    def _drawn(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs under drawn weights."""
        mode = self.network.training
        if mode not in self._uses:
            self._uses[mode] = noise.uses(self.network, self._own(), inputs)
        with noise.PerSample(self._posteriors(), self._uses[mode], len(inputs)) as drawn:
            return call_with(self.network, drawn.tensors, inputs)

    def divergence(self) -> Tensor:
        """Return KL(q‖p) of weights and scales in nats, ≥ 0."""
        total = torch.stack([cast(LayerScale, scale).divergence() for scale in self.scales]).sum()
        for name, mean, spread in zip(self._names, self.means, self.spreads, strict=True):
            # what is pruned is as the prior
            total = total + reparameterised.divergence(mean, spread, self._mask(name))
        return total

    @torch.no_grad()
    def gains(self) -> dict[str, Tensor]:
        """Return ``ΔF = ln q(0)/p(0)`` in nats for the removal of each weight, by name.

        It is that of w̃: a scale takes no side. See :func:`spamprune.bayes.reduction.surplus`.
        """
        return {
            name: -sigma.log() - 0.5 * (mean / sigma).square()
            for name, mean, spread in zip(self._names, self.means, self.spreads, strict=True)
            for sigma in [F.softplus(spread.double())]
        }

    @torch.no_grad()
    def opd(self) -> dict[str, Tensor]:
        """Return ``P θ² = (μ/σ)²`` by name, which no scale changes."""
        return {
            name: (mean / F.softplus(spread.double())).square()
            for name, mean, spread in zip(self._names, self.means, self.spreads, strict=True)
        }

    def mean_log_precision(self) -> list[float]:
        """Return the mean log δ of each parameter tensor, scales at their medians."""
        return [-2 * scale.log().mean().item() for scale in self._scales(draw=False)]

    def penalty(self) -> Tensor:
        """Return KL/N, to be added to the mean loss of a batch."""
        return self.divergence() / self.n_data

    @contextmanager
    def reduced(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold further weights at zero for as long as a ``with`` block lasts.

        Args:
            masks: By name, True where a weight stays.

        Raises:
            PosteriorError: The masks are those of another network.
        """
        check_shapes(self._own(), masks, "the set of masks")
        before = {name: mask.clone() for name, mask in self.masks().items()}
        try:
            for name, mask in self.masks().items():
                mask &= masks[name]
            yield
        finally:
            for name, mask in self.masks().items():
                mask.copy_(before[name])

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Hold weights at zero from now on; what was pruned before stays so.

        Args:
            masks: By name, True where a weight stays.

        Raises:
            PosteriorError: The masks are those of another network.
        """
        check_shapes(self._own(), masks, "the set of masks")
        for name, mean, spread in zip(self._names, self.means, self.spreads, strict=True):
            mask = self._mask(name)
            mask &= masks[name]
            # the data no longer tell of them: their posterior is the prior
            mean.masked_fill_(~mask, 0.0)
            spread.masked_fill_(~mask, softplus_inverse(1.0))

    @torch.no_grad()
    def predict(self, inputs: Tensor, samples: int = 100) -> Tensor:
        """Return class probabilities averaged over weights, in evaluation mode.

        Args:
            inputs: A batch.
            samples: How many times the weights are drawn.

        Returns:
            Shape (B, C, …), classes in dimension 1; float32 at least.

        Raises:
            PosteriorError: The number of samples is not positive.
        """
        check_positive(samples=samples)
        with evaluation_mode(self.network):
            total = torch.zeros((), device=inputs.device)
            for _ in range(samples):
                outputs = call_with(self.network, self.draw(), inputs)
                total = total + at_least_single(outputs).softmax(1)
        return total / samples

    @torch.no_grad()
    def elbo(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        likelihood: Likelihood = CLASSIFICATION,
        samples: int | None = None,
    ) -> float:
        """Return the evidence lower bound in nats, with one draw of the weights per batch.

        Args:
            loader: The training data.
            likelihood: Of the targets.
            samples: Stop once this many were seen and scale up to N; all by default.

        Raises:
            PosteriorError: The loader gave another number of samples than N, where all are wanted,
                or none at all.
        """
        loss, seen, device = 0.0, 0, device_of(self.network)
        with evaluation_mode(self.network):
            for batch in loader:
                inputs, targets = pair(batch)
                outputs = self._drawn(inputs.to(device))
                loss += likelihood.losses(outputs, targets.to(device)).double().sum().item()
                seen += len(inputs)
                if samples is not None and seen >= samples:
                    break
        if samples is not None and seen:
            loss *= self.n_data / seen
        elif seen != self.n_data:
            raise PosteriorError(
                f"the loader gave {seen} samples and n_data is {self.n_data}: give the training set"
            )
        return -loss - self.divergence().item()

    @torch.no_grad()
    def collapse(self) -> nn.Module:
        """Set the network to the posterior means, and return it.

        Running statistics of a BatchNorm stay those of drawn weights:
        :func:`spamprune.pruning.recalibrate.recalibrate` averages them anew.
        """
        own = self._own()
        for name, mean in self._centre().items():
            own[name].copy_(mean)
        return self.network

    @torch.no_grad()
    def posterior(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        likelihood: Likelihood = CLASSIFICATION,
    ) -> Posterior:
        """Set the network to the posterior means, and return the posterior around them.

        Scales are taken at their medians. Pruned weights are zero, with the prior's precision.

        Args:
            loader: The training data.
            likelihood: Of the targets.

        Returns:
            A diagonal posterior whose curvature is ``P − δ`` and whose evidence is the lower bound.
        """
        bound = self.elbo(loader, likelihood)
        self.collapse()
        diag, prior = {}, {}
        for name, scale, spread in zip(
            self._names, self._scales(draw=False), self.spreads, strict=True
        ):
            prior[name] = scale.square().reciprocal().expand(spread.shape).contiguous()
            # data only ever narrow a posterior: what is wider than the prior is noise
            excess = (F.softplus(spread).square().reciprocal() - 1).clamp(min=0)
            diag[name] = prior[name] * excess * self._mask(name)
        loss = -bound - self.divergence().item()
        curvature = Curvature(diag, loss, self.n_data, "variational", "mean-field")
        return Posterior(curvature, prior, 1.0, bound)


def _padding(network: nn.Module) -> dict[int, int]:
    """Return the rows of embeddings that gradients never reach, by the id of the weight.

    Nothing would hold what is drawn for them. A weight that another module uses too is not meant.

    Raises:
        PosteriorError: Such a row is not zero, as which it would count.
    """
    found = {}
    held = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.padding_idx is not None
            and held[id(module.weight)] == 1
        ):
            if module.weight[module.padding_idx].any():
                raise PosteriorError(
                    f"{name}: the row for padding is not zero: set it to zero, or set padding_idx "
                    "to None"
                )
            found[id(module.weight)] = module.padding_idx
    return found
