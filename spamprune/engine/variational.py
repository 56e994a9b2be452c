"""Mean-field variational inference as a way of training, with pruning by model reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spamprune.bayes.likelihood import Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior, load_posterior
from spamprune.bayes.reduction import furthest, layers, pruned_of, surplus
from spamprune.bayes.variational import MeanField
from spamprune.engine.bench import Bench
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import Tuned
from spamprune.engine.objective import likelihood_of
from spamprune.errors import PruningError
from spamprune.pruning.masks import Masks, gone_first, sparsity_of
from spamprune.pruning.recalibrate import recalibrate
from spamprune.recipe.schema import Variational
from spamprune.report.results import EpochRecord, Inference, Reduced

#: Training samples that a reduction measures the bound on.
BOUND_SAMPLES = 10_000


@dataclass(frozen=True)
class ByBound:
    """The evidence lower bound as what is trained on, and reductions that prune between epochs.

    A reduction takes of what it proposes as much as leaves the bound, which it claims to raise, no
    lower than it was. All that training changes is in the field, masks included.

    Attributes:
        field: The trained module.
        likelihood: That the bound is of.
        due: After which epochs weights go.
        iterations: Steps towards the odds that each layer learns.
    """

    field: MeanField
    likelihood: Likelihood
    due: Iterable[int] = ()
    iterations: int = 4

    def penalty(self) -> Tensor:
        """Return KL/N."""
        return self.field.penalty()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: the prior is in the bound."""

    def after_epoch(self, epoch: int, loader: Iterable[tuple[Tensor, Tensor]]) -> Tuned | None:
        """Remove the weights whose removal the evidence favours, when that is due."""
        if epoch not in self.due:
            return None
        field, old = self.field, self.field.masks()
        bound = partial(self._bound, epoch, loader)
        gains, before = field.gains(), bound()
        (*_, last) = layers(gains)
        surpluses = surplus(gains, whole=[last], pruned=old, iterations=self.iterations)
        proposed = {name: s <= 0 for name, s in surpluses.items()}
        # In the order of ΔF the bound falls at once: first come weights near zero which data know
        # best, and together they matter. In that of OPD it rises, and then falls.
        order = {name: -score for name, score in gone_first(field.opd(), old).items()}
        stays = furthest(order, proposed, lambda masks: bound(masks) >= before)
        field.prune(stays)
        reduced = Reduced(
            proposed=sparsity_of(proposed),
            sparsity=sparsity_of(stays),
            pruned=pruned_of(stays),
            before=before,
            after=bound(),
        )
        return Tuned(reduced.after, field.mean_log_precision(), reduced)

    def _bound(
        self,
        epoch: int,
        loader: Iterable[tuple[Tensor, Tensor]],
        masks: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Return the bound under further masks; the same draws and samples within an epoch."""
        with torch.random.fork_rng(), self.field.reduced(masks or self.field.masks()):
            torch.manual_seed(epoch)
            return self.field.elbo(loader, self.likelihood, samples=BOUND_SAMPLES)

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the field holds all."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore nothing."""


def train_field(
    bench: Bench,
    settings: Variational,
    model: nn.Module,
    job: Job,
    note: Callable[[EpochRecord], None],
) -> tuple[Posterior, list[EpochRecord], Inference, Masks]:
    """Train a field on ``model``, leave the posterior means there, and fit the posterior.

    Returns:
        The posterior, a record per epoch, what inference gives besides the means, and which weights
        reductions left.
    """
    field = MeanField(model, len(bench.data.train), prior=settings.prior)
    likelihood = likelihood_of(bench.config.loss)
    method = ByBound(field, likelihood)
    if settings.reduction is not None:
        due = settings.reduction.due(job.epochs)
        method = ByBound(field, likelihood, due, settings.reduction.iterations)
    history = fit(field, method, job, bench.accelerator, note)
    path = bench.folder / "posterior.safetensors"
    if not path.exists():
        torch.manual_seed(bench.seed)  # of the draws that the bound takes
        field.posterior(bench.data.train.loader(job.batch_size), likelihood).save(path)
    field.collapse()
    # running statistics are those of drawn weights
    recalibrate(model, bench.data.train.loader(job.batch_size, seed=bench.seed))
    inference = bench.once("inference", Inference, partial(_infer, bench, settings, field))
    return load_posterior(path).on(model), history, inference, field.masks()


def restore(model: nn.Module, settings: Variational, state: Mapping[str, Tensor]) -> None:
    """Set a network to the posterior means of the field whose state a checkpoint holds."""
    field = MeanField(model, 1, prior=settings.prior)
    field.load_state_dict(state)
    field.collapse()


def check_reduction(model: nn.Module) -> None:
    """Raise unless reduction can prune a network.

    Raises:
        PruningError: All of it is one layer, which stays whole.
    """
    if len(layers(named_parameters(model))) < 2:
        raise PruningError(
            "reduction leaves the last layer whole, and the network has no other: leave it out"
        )


def _infer(bench: Bench, settings: Variational, field: MeanField) -> Inference:
    torch.manual_seed(bench.seed)
    averaged = Averaged(field, settings.draws)
    masks = field.masks()
    return Inference(
        draws=settings.draws,
        averaged=bench.quality(averaged, bench.data.test),
        sparsity=sparsity_of(masks),
        pruned=pruned_of(masks),
    )


class Averaged(nn.Module):
    """Bayesian predictions as a network: logits are log probabilities averaged over draws.

    Args:
        field: What weights are drawn from.
        draws: How often.
    """

    def __init__(self, field: MeanField, draws: int):
        super().__init__()
        self.field, self.draws = field, draws

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to log probabilities ``(B, C)``."""
        probabilities = self.field.predict(inputs, self.draws)
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
