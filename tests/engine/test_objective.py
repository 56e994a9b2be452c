from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from spamprune.bayes.spam import SpaM
from spamprune.data import load
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
from spamprune.engine.objective import (
    CROSS_ENTROPY,
    Teacher,
    check_loss,
    likelihood_of,
    objective_of,
)
from spamprune.errors import TrainingError
from spamprune.recipe.schema import Distil, Loss, Optimiser

DIGITS = load("digits", validation=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def batch(samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 1, 8, 8), torch.randint(10, (samples,))


def soft(targets: Tensor, smoothing: float) -> Tensor:
    return F.one_hot(targets, 10) * (1 - smoothing) + smoothing / 10


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of target distributions, written out."""
    return -(targets * model(inputs).log_softmax(1)).sum(1).mean()


def test_plain_and_smoothed_losses_are_cross_entropies() -> None:
    model, (inputs, targets) = network(), batch(7)
    torch.testing.assert_close(
        CROSS_ENTROPY(model, inputs, targets), mean_loss(model, inputs, soft(targets, 0))
    )
    smoothed = objective_of(Loss(label_smoothing=0.2), 10)
    expected = mean_loss(model, inputs, soft(targets, 0.2))
    torch.testing.assert_close(smoothed(model, inputs, targets), expected)
    # the loss of the posterior is the very same
    losses = likelihood_of(Loss(label_smoothing=0.2, mixup=1.0)).losses(model(inputs), targets)
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize("samples", [8, 7, 1])
def test_mixup_averages_a_batch_with_its_reverse(samples: int) -> None:
    """The last sample of an odd batch stays alone; smoothing comes first; inputs stay."""
    model, (inputs, targets) = network(), batch(samples)
    before = inputs.clone()
    objective = objective_of(Loss(mixup=0.4, label_smoothing=0.1), 10)
    np.random.seed(5)
    found = objective(model, inputs, targets)
    np.random.seed(5)
    np.random.rand()  # whether to mix at all
    share = np.random.beta(0.4, 0.4)
    even = samples // 2 * 2
    pairs = torch.arange(even).flip(0)
    x, y = inputs.clone(), soft(targets, 0.1)
    x[:even] = share * inputs[:even] + (1 - share) * inputs[pairs]
    y[:even] = share * soft(targets, 0.1)[:even] + (1 - share) * soft(targets, 0.1)[pairs]
    torch.testing.assert_close(found, mean_loss(model, x, y))
    assert torch.equal(inputs, before)


def test_cutmix_swaps_a_rectangle_and_labels_by_its_area() -> None:
    inputs, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8), torch.arange(4)
    seen: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        seen.append(x)
        return model(x)

    model = network()
    wrapped = nn.Module()
    wrapped.forward = record  # type: ignore[method-assign]
    np.random.seed(2)
    found = objective_of(Loss(cutmix=1.0), 10)(wrapped, inputs, targets)
    (x,) = seen
    swapped = x[0, 0] == 3
    rows, columns = swapped.any(1), swapped.any(0)
    assert swapped.any()
    assert torch.equal(swapped, rows[:, None] & columns)
    share = 1 - swapped.float().mean()
    y = share * soft(targets, 0) + (1 - share) * soft(targets.flip(0), 0)
    torch.testing.assert_close(found, mean_loss(model, x, y))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_by_its_definition(temperature: float) -> None:
    student, (inputs, targets) = network(), batch(6)
    torch.manual_seed(9)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    weight = 0.3
    told = Distil(weight=weight, temperature=temperature)
    objective = objective_of(Loss(label_smoothing=0.1), 10, Teacher(teacher, told))
    student = student.double()
    inputs = inputs.double()
    found = objective(student, inputs, targets)
    p = (teacher(inputs) / temperature).softmax(1)
    q = (student(inputs) / temperature).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = (1 - weight) * mean_loss(student, inputs, soft(targets, 0.1))
    expected = expected + weight * temperature**2 * divergence
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_network_learns_nothing_from_itself() -> None:
    model, (inputs, targets) = network(), batch(6)
    objective = objective_of(Loss(), 10, Teacher(copy.deepcopy(model), Distil(weight=1.0)))
    loss = objective(model, inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad is not None and p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_teacher_and_student_see_the_same_mixed_inputs() -> None:
    model, (inputs, targets) = network(), batch(6)
    seen: list[Tensor] = []
    teacher = copy.deepcopy(model)
    for net in (model, teacher):
        net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective_of(Loss(mixup=1.0), 10, Teacher(teacher, Distil()))(model, inputs, targets)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], inputs)


def train(epochs: int, seed: int = 0, checkpoint: Path | None = None) -> nn.Module:
    model = network()
    loss = Loss(mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    job = Job(
        DIGITS.train,
        epochs,
        64,
        Optimiser(lr=0.05, schedule="constant"),
        seed=seed,
        objective=objective_of(loss, 10),
        checkpoint=checkpoint,
    )
    spam = SpaM(model, len(DIGITS.train), burn_in=None)
    fit(model, ByPrior(spam), job, Accelerator(cpu=True))
    return model


def test_mixing_is_a_function_of_seed_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)
    whole = train(4)
    train(2, checkpoint=tmp_path / "c.safetensors")
    np.random.rand(3)
    resumed = train(4, checkpoint=tmp_path / "c.safetensors")
    other = train(4, seed=1)
    for a, b, c in zip(whole.parameters(), resumed.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_cutmix_needs_images() -> None:
    check_loss(Loss(mixup=1.0), (30,))
    check_loss(Loss(cutmix=1.0), (1, 8, 8))
    with pytest.raises(TrainingError, match=r"loss\.cutmix needs images"):
        check_loss(Loss(cutmix=1.0), (30,))
