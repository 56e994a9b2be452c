import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spamprune import scores
from spamprune.errors import PruningError
from spamprune.models.classic import fc_cancer, lenet
from spamprune.pruning import cost
from spamprune.pruning.compaction import apply, masked, verify
from spamprune.pruning.plan import Target, check_reachable, plan
from tests.pruning.test_importance import Branches, resnet


def image():
    return torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lenet()


def magnitudes(model):
    return {name: s.square() for name, s in scores.magnitude(model).items()}


@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.05, 0.99) | st.just(0.0))
def test_uniform_removes_the_papers_count_from_each_layer(ratio):
    torch.manual_seed(0)
    model = lenet()
    widths = plan(model, image(), magnitudes(model), Target(ratio=ratio)).widths()
    for layer, n in {"conv1": 6, "conv2": 16, "conv3": 120, "fc": 84}.items():
        assert widths[layer] == n - int(ratio * n + 1e-9)


def test_the_units_with_the_least_importance_go(network):
    values = {n: torch.ones_like(p) for n, p in network.named_parameters()}
    values["conv1.weight"][[1, 4]] = 0
    found = plan(network, image(), values, Target(ratio=0.4))
    assert next(g for g in found.groups if g.layer == "conv1").pruned == (1, 4)


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize(
    "target",
    [Target(ratio=0.5), Target(macs=0.3), Target(params=0.05), Target(ratio=0.95)],
    ids=str,
)
def test_compaction_agrees_with_the_mask_and_the_target_is_met(network, ranking, target):
    before = copy.deepcopy(network.state_dict())
    found = plan(network, image(), magnitudes(network), target, ranking=ranking)
    small = apply(network, found)
    assert verify(network, small, found, torch.randn(32, 1, 28, 28)) <= 1e-5
    assert small(image()).shape == (1, 10)
    key, wanted = target.named()
    if key == "macs":
        assert found.achieved[key] == cost.macs(small, image()) / cost.macs(network, image())
        assert found.achieved[key] <= wanted
    elif key == "params":
        assert found.achieved[key] == cost.params(small) / cost.params(network)
        assert found.achieved[key] <= wanted
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_budget_is_met_by_the_mildest_pruning(network):
    found = plan(network, image(), magnitudes(network), Target(params=0.3), ranking="uniform")
    gone = sum(len(g.pruned) for g in found.groups)
    total = sum(g.units for g in found.groups)
    # one unit less everywhere is over the budget
    milder = plan(
        network, image(), magnitudes(network), Target(ratio=(gone - 4) / total), ranking="uniform"
    )
    small = apply(network, milder)
    assert cost.params(small) / cost.params(network) > 0.3


@pytest.mark.parametrize("make", [Branches, resnet, fc_cancer])
def test_other_networks_agree_with_their_masks(make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():  # fresh normalisation hides errors
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    shape = {"Branches": (3, 8, 8), "MLP": (30,)}.get(type(model).__name__, (3, 64, 64))
    example = torch.randn(1, *shape)
    found = plan(model, example, magnitudes(model), Target(ratio=0.5))
    small = apply(model, found)
    assert cost.params(small) < 0.5 * cost.params(model)
    assert verify(model, small, found, torch.randn(16, *shape)) <= 1e-4


def test_verify_catches_a_wrong_compaction(network):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    small = apply(network, found)
    with torch.no_grad():
        small.conv1.weight[0] += 0.01
    with pytest.raises(PruningError, match="differs from its masked original"):
        verify(network, small, found, torch.randn(32, 1, 28, 28))


def test_masking_zeroes_biases_too(network):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    gone = list(next(g for g in found.groups if g.layer == "fc").pruned)
    zeroed = masked(network, found)
    assert (zeroed.fc.weight[gone] == 0).all()
    assert (zeroed.fc.bias[gone] == 0).all()
    assert (zeroed.head.weight[:, gone] == 0).all()


def test_no_layer_is_pruned_to_nothing_and_the_plan_says_so(network):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.99), min_units=2)
    assert found.widths() == {"conv1": 2, "conv2": 2, "conv3": 2, "fc": 2}
    assert len(found.notes) == 4
    assert "conv1: at its minimum, 2 of 6 units" in found.notes


def test_what_is_left_whole_or_too_narrow_is_said(network):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5), min_units=1000)
    assert found.achieved == {"ratio": 0.0}
    assert "fc: at its minimum, 84 of 84 units" in found.notes
    with pytest.raises(PruningError, match=r"ratio 0\.001 removes no unit"):
        plan(network, image(), magnitudes(network), Target(ratio=0.001))


def test_a_coarse_step_below_the_budget_is_noted(network):
    found = plan(network, image(), magnitudes(network), Target(macs=0.1), ranking="uniform")
    assert found.achieved["macs"] < 0.098
    assert any("nearest step below 0.1" in note for note in found.notes)


def test_layer_norms_over_pruned_units_are_not_compared():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    found = plan(model, torch.randn(1, 6), magnitudes(model), Target(ratio=0.5))
    assert not found.comparable
    small = apply(model, found)
    assert verify(model, small, found, torch.randn(9, 6)) > 1e-3


@pytest.mark.parametrize("target", [Target(macs=0.01), Target(params=0.001)])
def test_reachability_is_known_before_training(network, target):
    check_reachable(network, image(), [Target(ratio=0.99), Target(macs=0.1)])
    with pytest.raises(PruningError, match="cannot be reached"):
        check_reachable(network, image(), [target])


def test_a_budget_out_of_reach_is_an_error_that_says_what_remains(network):
    with pytest.raises(PruningError, match=r"macs: 0\.01 cannot be reached.*0\.0[5-9]"):
        plan(network, image(), magnitudes(network), Target(macs=0.01))


@pytest.mark.parametrize("bad", [{}, {"macs": 0.5, "ratio": 0.5}, {"ratio": 1.0}, {"macs": 0.0}])
def test_impossible_targets_are_refused(bad):
    with pytest.raises(PruningError):
        Target(**bad)


def test_unknown_layers_are_refused_with_suggestions(network):
    with pytest.raises(PruningError, match=r"'heads'.*'head'"):
        plan(network, image(), magnitudes(network), Target(ratio=0.5), ignored=["heads"])


def test_a_plan_for_another_width_is_refused(network):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    small = apply(network, found)
    with pytest.raises(PruningError, match="expects 6 units in 'conv1', the model has 3"):
        apply(small, found)
