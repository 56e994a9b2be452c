"""What a step of training minimises: the mean loss of a batch, before the prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from spamprune.bayes.likelihood import Classification
from spamprune.errors import TrainingError
from spamprune.recipe.schema import Distil, Loss


@dataclass(frozen=True)
class Teacher:
    """A network to learn from.

    Attributes:
        model: Its logits are taken as they come: it must be in evaluation mode.
        distil: How much its word counts.
    """

    model: nn.Module
    distil: Distil


@dataclass(frozen=True)
class Objective:
    """The mean loss of a batch.

    Cross-entropy of targets that may be smoothed and mixed (mixup, Zhang et al. 2018; CutMix, Yun
    et al. 2019), and, with a teacher, knowledge distillation (Hinton et al. 2015): with weight w
    and temperature T the loss is ``(1 − w)·CE + w·T²·KL(teacher ‖ student)``, where KL is between
    probabilities softened by T. The teacher sees the same mixed inputs as the student.

    Mixing draws from numpy's global generator, as timm does it.

    Attributes:
        label_smoothing: Weight of the uniform distribution in the targets.
        mixup: timm's, which smooths labels too; None mixes nothing.
        teacher: Whom to learn from besides.
    """

    label_smoothing: float = 0.0
    mixup: Mixup | None = None
    teacher: Teacher | None = None

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar in nats.

        Args:
            model: Maps inputs to logits ``(B, C)``.
            inputs: ``(B, …)``; left as they are.
            targets: Class indices ``(B,)``.
        """
        smoothing = self.label_smoothing
        if self.mixup is not None:
            inputs, targets = _mixed(self.mixup, inputs, targets)
            smoothing = 0.0  # the mixed targets are smoothed already
        logits = model(inputs).float()  # autocast may leave them in bfloat16
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        weight, temperature = self.teacher.distil.weight, self.teacher.distil.temperature
        with torch.no_grad():
            soft = (self.teacher.model(inputs).float() / temperature).log_softmax(1)
        student = (logits / temperature).log_softmax(1)
        divergence = F.kl_div(student, soft, reduction="batchmean", log_target=True)
        return (1 - weight) * loss + weight * temperature**2 * divergence


#: The default: as it is, of labels as they are.
CROSS_ENTROPY = Objective()


def objective_of(loss: Loss, classes: int, teacher: Teacher | None = None) -> Objective:
    """Return the objective that a recipe asks for."""
    mixup = None
    if loss.mixup or loss.cutmix:
        mixup = Mixup(
            mixup_alpha=loss.mixup,
            cutmix_alpha=loss.cutmix,
            label_smoothing=loss.label_smoothing,
            num_classes=classes,
        )
    return Objective(loss.label_smoothing, mixup, teacher)


def likelihood_of(loss: Loss) -> Classification:
    """Return the likelihood that the evidence, the posterior and criteria are of.

    That of the data themselves: mixed samples are none, and curvature needs one label for each.
    Smoothing stays: Laplace's approximation is about the minimum of what was trained, and weights
    that fit smoothed labels have large gradients of the unsmoothed loss, which the empirical Fisher
    would take for curvature. So evidences compare only where the smoothing is the same.
    """
    return Classification(label_smoothing=loss.label_smoothing)


def check_loss(loss: Loss, shape: tuple[int, ...]) -> None:
    """Raise unless samples of a shape can be mixed as a recipe asks.

    Raises:
        TrainingError: They are no images, and CutMix is asked for.
    """
    if loss.cutmix and len(shape) != 3:
        raise TrainingError(
            f"loss.cutmix needs images, and samples have shape {shape}: use mixup, or neither"
        )


def _mixed(mixup: Mixup, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return mixed inputs and targets ``(B, C)``.

    timm mixes the first sample with the last and so on, in place and in even batches only: the
    last sample of an odd one stays by itself.
    """
    even = len(targets) // 2 * 2
    mixed, soft = mixup(inputs[:even].clone(), targets[:even])
    if even == len(targets):
        return mixed, soft
    last = mixup_target(targets[even:], mixup.num_classes, smoothing=mixup.label_smoothing)
    return torch.cat([mixed, inputs[even:]]), torch.cat([soft, last])
