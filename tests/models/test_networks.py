"""What holds for every network of ours: sizes, training, curvature, pruning, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import spamprune as sp
from spamprune.errors import ModelError
from spamprune.models import check_fits, create
from spamprune.models.build import OURS
from spamprune.pruning.units import DEFAULT_KINDS, KINDS, Kind
from tests.bayes import reference
from tests.models.cases import CASES, shaken, small

#: Whose residual stream passes through LayerNorm, so that its mask and compaction differ.
LAYER_NORM = {"vit_mnist", "mixer_mnist", "vit_tiny_cifar", "mixer_s_cifar", "bmr_vit", "bmr_mixer"}
INNER = tuple(kind for kind in KINDS if kind != "width")


def test_every_network_has_a_case() -> None:
    create("lenet")  # registers them all
    assert sorted(timm.list_models(module=OURS)) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_full_size(name: str) -> None:
    case = CASES[name]
    model = create(name)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    check_fits(model, case.shape, case.classes)
    count = f"{case.parameters:,}".replace(",", " ")
    assert f"{count} parameters" in (timm.model_entrypoint(name).__doc__ or "")


@pytest.mark.parametrize("name", CASES)
def test_small_size_and_other_classes(name: str) -> None:
    case = CASES[name]
    check_fits(create(name, **case.small, num_classes=7), case.small_shape, 7)


@pytest.mark.parametrize("name", ["lenet", "fixup_wrn16_4", "vit_mnist", "resnet18_cifar"])
def test_there_are_no_pretrained_weights(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' has no pretrained weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", CASES)
def test_steps_lower_the_loss_and_move_every_parameter(name: str) -> None:
    model, inputs, targets = small(name, samples=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # tanh and averages make for small gradients
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if "bmr_lenet" in name else 1e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("name", CASES)
def test_exact_curvature(name: str) -> None:
    model, inputs, targets = small(name)
    shaken(model)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=2)
    posterior = sp.fit_posterior(
        model, loader, prior=1.0, curvature=sp.CurvatureMethod(estimator="exact")
    )
    precision = posterior.precision()
    for key, squares in reference.one_at_a_time(model, inputs, targets).items():
        torch.testing.assert_close(precision[key], squares + 1, rtol=1e-9, atol=1e-12)
    assert not [key for key, how in posterior.coverage().items() if "one sample" in how]


@pytest.mark.parametrize("kinds", [DEFAULT_KINDS, INNER], ids=["default", "inner"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_the_units_go(name: str, kinds: tuple[Kind, ...], tmp_path: Path) -> None:
    model, inputs, targets = small(name)
    shaken(model)
    dense = model(inputs)
    scores = {n: p.detach().square() for n, p in model.named_parameters()}
    plan = sp.plan(model, inputs[:1], scores, sp.Target(ratio=0.5), kinds=kinds)
    pruned = sp.apply(model, plan)
    residual = sp.verify(model, pruned, plan, inputs, tolerance=1e-8)
    assert plan.comparable == (name not in LAYER_NORM or kinds == INNER)
    assert residual <= 1e-8 or not plan.comparable
    assert not torch.allclose(pruned(inputs), dense)
    assert all(len(g.pruned) == g.units // 2 for g in plan.groups)
    assert [note for note in plan.notes if "left whole" in note] == []

    F.cross_entropy(pruned(inputs), targets).backward()
    assert all(p.grad is not None for p in pruned.parameters())

    loaded = sp.load(sp.save(pruned, tmp_path / "small"))
    assert torch.equal(loaded.eval()(inputs), pruned.eval()(inputs))


@pytest.mark.parametrize("name", ["fixup_resnet18", "fixup_wrn16_4"])
def test_scalars_survive_pruning(name: str) -> None:
    model, inputs, _ = small(name)
    shaken(model)
    scores = {n: p.detach().square() for n, p in model.named_parameters()}
    pruned = sp.apply(model, sp.plan(model, inputs[:1], scores, sp.Target(ratio=0.5)))
    after = dict(pruned.named_parameters())
    scalars = {n: p for n, p in model.named_parameters() if p.shape == (1,)}
    assert len(scalars) == {"fixup_resnet18": 4 * 5 + 2, "fixup_wrn16_4": 3 * 5 + 2}[name]
    for key, scalar in scalars.items():
        assert torch.equal(after[key], scalar)
