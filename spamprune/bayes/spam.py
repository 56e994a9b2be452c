"""SpaM: training under a prior that the marginal likelihood tunes (paper, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spamprune.bayes import evidence
from spamprune.bayes.curvature import Curvature, CurvatureMethod, fit_curvature
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood, Regression
from spamprune.bayes.parameters import check_positive, named_parameters
from spamprune.bayes.posterior import Posterior, posterior_from
from spamprune.bayes.prior import Prior, Structure
from spamprune.errors import PosteriorError, nearest

Update = Literal["adam", "exact", "mackay"]

#: Starts of the names of optimisers that look like Adam or SGD and step otherwise: rectified,
#: without bias correction, scaled by layer or orthogonalised; or that wrap another one.
_OTHERS = ("lookahead", "radam", "adopt", "lars", "novograd", "nvnovograd", "muon")


@dataclass(frozen=True)
class EvidenceStep:
    """What one evidence update did: log evidence in nats before and after it."""

    epoch: int
    before: float
    after: float


class SpaM:
    """A prior, its penalty for your loss, and its evidence updates, for any training loop.

    Training minimises ``mean loss + T · ½ Σ δθ² / N`` with δ held fixed; when an update is due, the
    curvature is refitted and δ moves to larger evidence. MAP training is the same object with
    ``burn_in=None``: δ stays at ``precision``.

    Use either :meth:`penalty`, added to the loss, or :meth:`shrink`, called after each optimiser
    step. They have the same minimum; ``shrink`` is stable for any δ, where the gradient of the
    penalty diverges once ``lr · δ T/N`` exceeds 2. Where gradients are clipped, take the penalty:
    ``shrink`` cannot see by how much they are, and the prior would be too strong by as much.

    Args:
        model: The network to train.
        n_data: N, the number of training samples.
        prior: How prior precisions are tied.
        curvature: How the curvature of the loss is computed. Updates see ``curvature.samples``
            samples: 10 000 by default (docs/curvature.md has why they do), but all where a method
            is given that does not say. The final posterior sees all.
        likelihood: Of the targets. A :class:`~spamprune.bayes.likelihood.Regression` has the
            variance of its noise learned with the prior; train on the mean of its ``losses``.
        precision: δ₀.
        temperature: T; larger is sparser.
        burn_in: Epochs before the first update; None means never.
        every: Epochs between updates.
        last: No update after this epoch, so that the weights settle under a fixed prior.
        update: ``"adam"`` takes ``steps`` Adam steps on log δ (the paper's); ``"mackay"`` as many
            steps of a fixed point; ``"exact"`` jumps to the optimum of a parameterwise prior.
        steps: Steps of an update.
        lr: Learning rate of Adam's.
        damping: For ``"exact"``: weight of the old log δ in the new one.
        seed: Of what the curvature draws.
        masks: False where a weight is pruned, by name; read at each update, so they may change in
            place. Pruned weights are zero and no parameters any more: their curvature counts as
            zero, which takes them out of the evidence and of every tied sum. Left in, they would
            pull tied precisions up, as weights that the data determine to be zero.

    Raises:
        PosteriorError: A setting is unknown or out of range, a mask is of no parameter, or
            ``"exact"`` is asked of a prior that is not parameterwise, or of Kronecker factors.
    """

    def __init__(
        self,
        model: nn.Module,
        n_data: int,
        *,
        prior: Structure = "parameterwise",
        curvature: CurvatureMethod = CurvatureMethod(samples=10_000),  # noqa: B008 - frozen
        likelihood: Likelihood = CLASSIFICATION,
        precision: float = 1.0,
        temperature: float = 1.0,
        burn_in: int | None = 0,
        every: int = 5,
        last: int | None = None,
        update: Update = "adam",
        steps: int = 100,
        lr: float = 0.1,
        damping: float = 0.0,
        seed: int = 0,
        masks: Mapping[str, Tensor] | None = None,
    ):
        if update not in get_args(Update):
            known = ", ".join(get_args(Update))
            raise PosteriorError(f"unknown update {update!r}: one of {known}")
        if update == "exact" and prior != "parameterwise":
            raise PosteriorError(f"update 'exact' needs a parameterwise prior, not {prior!r}")
        if update == "exact" and curvature.structure == "kron":
            raise PosteriorError("update 'exact' needs structure 'diag': use 'adam' for 'kron'")
        check_positive(n_data=n_data, temperature=temperature, every=every, steps=steps, lr=lr)
        if not 0 <= damping < 1:
            raise PosteriorError(f"damping must be at least 0 and less than 1, not {damping}")
        self.model = model
        self.n_data = n_data
        self.prior = Prior(model, prior, precision)
        self.curvature, self.likelihood = curvature, likelihood
        self.temperature = temperature
        self.burn_in, self.every, self.last = burn_in, every, last
        self.update_rule: Update = update
        self.steps, self.lr, self.damping = steps, lr, damping
        self.seed, self.masks = seed, masks
        self._parameters = named_parameters(model)
        for name in masks or ():
            if name not in self._parameters:
                raise PosteriorError(
                    f"a mask is of {name!r}, which is no trainable parameter of the model: "
                    f"{nearest(name, self._parameters)}"
                )
        self._refresh()

    def _refresh(self) -> None:
        """Cache ``δ T/N``, the strength of the penalty per sample, in parameter order."""
        precision = self.prior.precision()
        scale = self.temperature / self.n_data
        self._strength = {n: (d * scale).contiguous() for n, d in precision.items()}

    def _check_same(self, now: dict[str, nn.Parameter]) -> None:
        """Raise unless the prior was made for these parameters."""
        then = self._parameters
        changed = sorted(name for name in now | then if now.get(name) is not then.get(name))
        if changed:
            raise PosteriorError(
                f"{', '.join(changed)}: frozen, unfrozen or replaced since the prior was made, "
                "which does not act on them as on the others: make a new SpaM after such a change, "
                "as after pruning"
            )

    def _check_there(self) -> None:
        """Raise unless the model still has the parameters that the prior acts on."""
        own = self.model.named_parameters()
        self._check_same({name: p for name, p in own if name in self._parameters})

    def penalty(self) -> Tensor:
        """Return ``T · ½ Σ δθ² / N``, to be added to the mean loss; δ is held fixed.

        Raises:
            PosteriorError: The model has other parameters by now, as after pruning.
        """
        self._check_there()
        terms = [(self._strength[name] * p.square()).sum() for name, p in self._parameters.items()]
        return 0.5 * torch.stack(terms).sum()

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the prior after an optimiser step, implicitly: ``θ ← θ / (1 + η δ T/N)``.

        η is the step that the optimiser takes along a constant gradient, ``lr/(1 − momentum)``
        for SGD and ``lr/(√v̂ + ε)`` for Adam, so that a fixed point is a minimum of the penalised
        loss. The step is stable for every δ.

        Raises:
            PosteriorError: The optimiser is neither SGD without dampening nor of the Adam family,
                or moves other parameters, parameters have less than 32 bits, or the model has
                others by now, as after pruning.
        """
        self._check_there()
        # what is frozen by now stays where it is, as under the penalty
        names = {id(p): name for name, p in self._parameters.items() if p.requires_grad}
        moved = [(g, p) for g in optimizer.param_groups for p in g["params"] if id(p) in names]
        if not moved:
            raise PosteriorError(
                "the optimiser moves none of the model's parameters: make it of model.parameters()"
            )
        for _, parameter in moved:
            if torch.finfo(parameter.dtype).bits < 32:
                raise PosteriorError(
                    f"{names[id(parameter)]} is {parameter.dtype}, in which a step of the prior "
                    "rounds to nothing: add penalty() to the loss, or keep float32 parameters and "
                    "compute in bfloat16 by torch.autocast"
                )
        for group, parameter in moved:
            step = _step(optimizer, group, parameter)
            parameter /= 1 + step * self._strength[names[id(parameter)]]

    def due(self, epoch: int) -> bool:
        """Return whether an evidence update belongs after epoch ``epoch`` (counted from 1)."""
        if self.burn_in is None or epoch <= self.burn_in:
            return False
        if self.last is not None and epoch > self.last:
            return False
        return epoch % self.every == 0

    def update(self, epoch: int, loader: Iterable[tuple[Tensor, Tensor]]) -> EvidenceStep | None:
        """Refit the curvature and move the prior to larger evidence, when that is due.

        Args:
            epoch: Epochs finished so far.
            loader: The training data, without augmentation that should not count.

        Returns:
            The evidence before and after, or None when no update was due.

        Raises:
            PosteriorError: There are masks, and the curvature is Kronecker-factored, or the model's
                trainable parameters are others than those the prior was made for.
        """
        if not self.due(epoch):
            return None
        curvature = self._fit_curvature(loader, self.seed + epoch, self.curvature)
        before = self._log_evidence(curvature)
        given = (self.prior, self._parameters, curvature)
        if self.update_rule == "exact":
            evidence.maximise(*given, damping=self.damping, temperature=self.temperature)
        elif self.update_rule == "mackay":
            evidence.mackay(*given, steps=self.steps, temperature=self.temperature)
        else:
            evidence.ascend(*given, steps=self.steps, lr=self.lr, temperature=self.temperature)
        after = self._log_evidence(curvature)
        self._refresh()
        if isinstance(self.likelihood, Regression):
            self.likelihood = self._with_noise(self.likelihood, curvature, loader)
        return EvidenceStep(epoch, before, after)

    def _fit_curvature(
        self, loader: Iterable[tuple[Tensor, Tensor]], seed: int, method: CurvatureMethod
    ) -> Curvature:
        if self.masks is not None and method.structure == "kron":
            raise PosteriorError(
                "Kronecker factors cannot leave out the weights that masks do: use structure 'diag'"
            )
        self._check_same(named_parameters(self.model))
        curvature = fit_curvature(
            self.model,
            loader,
            n_data=self.n_data,
            method=method,
            likelihood=self.likelihood,
            seed=seed,
        )
        for name, mask in (self.masks or {}).items():
            if name not in curvature.kron:
                curvature.diag[name].masked_fill_(~mask, 0)
        return curvature

    def _with_noise(
        self,
        likelihood: Regression,
        curvature: Curvature,
        loader: Iterable[tuple[Tensor, Tensor]],
    ) -> Regression:
        """Return the likelihood with the noise that maximises the evidence under the new prior."""
        first = next(iter(loader), None)
        if first is None:
            raise PosteriorError("the loader is used up: give one that begins anew each time")
        outputs = self.n_data * first[1][0].numel()
        constant = 0.5 * outputs * math.log(2 * math.pi * likelihood.noise)
        squares = 2 * likelihood.noise * (curvature.loss - constant)
        effective = evidence.effective_parameters(
            curvature, self.prior.precision(), self.temperature
        )
        return likelihood.relearned(squares, outputs, self.temperature * effective)

    def posterior(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Posterior:
        """Fit the posterior at the current parameters, on all of ``loader``."""
        whole = replace(self.curvature, samples=None)
        curvature = self._fit_curvature(loader, self.seed, whole)
        return posterior_from(self.model, curvature, self.prior, self.temperature)

    def _log_evidence(self, curvature: Curvature) -> float:
        delta = self.prior.precision()
        return evidence.log_evidence(self._parameters, curvature, delta, self.temperature)

    def mean_log_precision(self) -> list[float]:
        """Return the mean log δ of each parameter tensor, of what is not masked, if anything."""
        found = []
        for name, delta in self.prior.precision().items():
            mask = (self.masks or {}).get(name)
            left = delta if mask is None or not mask.any() else delta[mask]
            found.append(left.log().mean().item())
        return found

    def inherit(self, other: SpaM, cut: Callable[[str, Tensor], Tensor]) -> None:
        """Take over what ``other`` learned on a larger network, from which this one was cut.

        Args:
            other: Of the same settings.
            cut: See :meth:`~spamprune.bayes.prior.Prior.inherit`.
        """
        self.prior.inherit(other.prior, cut)
        self.likelihood = other.likelihood
        self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what training changes: the prior's log precisions, and the noise if learned."""
        state = self.prior.state_dict()
        if isinstance(self.likelihood, Regression):
            state["noise"] = torch.tensor(self.likelihood.noise, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            PosteriorError: The state is that of another prior, or of another kind of targets.
        """
        state = dict(state)
        noise = state.pop("noise", None)
        if (noise is not None) != isinstance(self.likelihood, Regression):
            raise PosteriorError("the saved prior belongs to another kind of likelihood")
        self.prior.load_state_dict(state)
        if noise is not None:
            self.likelihood = Regression(noise.item())
        self._refresh()


def _step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
) -> Tensor | float:
    """Return the step per unit of a constant gradient, for optimisers whose step is known."""
    kinds = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    if not any(kind.startswith(_OTHERS) for kind in kinds):
        if "nesterov" in group and group.get("dampening") == 0:
            return group["lr"] / (1 - group["momentum"])
        if optimizer.state and parameter not in optimizer.state and "betas" in group:
            return 0.0  # it has had no gradient yet
        state = optimizer.state[parameter]
        if "betas" in group and "exp_avg_sq" in state and "step" in state:
            correction = math.sqrt(1 - group["betas"][1] ** float(state["step"]))
            squares = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # amsgrad divides by these
            return group["lr"] / (squares.sqrt() / correction + group["eps"])
    raise PosteriorError(
        f"no implicit prior step for {type(optimizer).__name__} as it is set: add spam.penalty() "
        "to the loss instead"
    )
