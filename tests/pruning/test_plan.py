import copy
import dataclasses
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spamprune as sp
from spamprune import scores
from spamprune.errors import PruningError
from spamprune.models.classic import fc_cancer, lenet
from spamprune.pruning import cost
from spamprune.pruning.compaction import Plan, apply, difference, masked, verify
from spamprune.pruning.plan import Target, check_reachable, plan
from tests.pruning.test_importance import Branches, resnet
from tests.pruning.test_trace import Net


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


def stored_bytes(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("ranking", ["uniform", "global", "per_cost", "isomorphic"])
@pytest.mark.parametrize(
    "target",
    [
        Target(ratio=0.5),
        Target(macs=0.3),
        Target(params=0.05),
        Target(bytes=0.3),
        Target(ratio=0.95),
    ],
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
    elif key in ("params", "bytes"):
        measure = cost.params if key == "params" else stored_bytes
        assert found.achieved[key] == measure(small) / measure(network)
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


class Several(nn.Module):
    """Has outputs of several scales, such as class scores beside boxes in pixels."""

    def __init__(self, *scales):
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in scales)
        self.scales = scales

    def forward(self, x):
        x = self.hidden(x).relu()
        return [scale * head(x) for scale, head in zip(self.scales, self.heads, strict=True)]


@pytest.mark.parametrize("scales", [(1, 1e4), (1e4, 1)], ids=str)
@pytest.mark.parametrize("damage", [0.5, float("nan")])
def test_verify_catches_it_in_every_output(scales, damage):
    torch.manual_seed(0)
    model = Several(*scales)
    inputs = torch.randn(16, 4)
    found = plan(model, inputs[:1], magnitudes(model), Target(ratio=0.5))
    small = apply(model, found)
    assert verify(model, small, found, inputs) <= 1e-5
    with torch.no_grad():
        small.heads[scales.index(1)].bias[0] += damage
    with pytest.raises(PruningError, match="differs from its masked original"):
        verify(model, small, found, inputs)


def test_a_difference_is_relative_to_each_output_s_largest_entry():
    first = [torch.tensor([2.0, -4.0]), torch.tensor([1e3]), torch.zeros(2)]
    assert difference(first, first) == 0
    for i, (change, expected) in enumerate([(1, 0.25), (1, 1e-3), (1e-6, 1e-6)]):
        second = [t.clone() for t in first]
        second[i] += change
        assert difference(first, second) == pytest.approx(expected)
        second[i][0] = torch.nan
        assert math.isnan(difference(first, second))
        assert math.isnan(difference(second, first))
    infinite = [torch.tensor([torch.inf, 1.0])]
    assert difference(infinite, infinite) == 0
    assert difference([torch.zeros(1)], [torch.ones(1)]) == 1e12


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="another way before 2.9")
def test_networks_are_compared_in_full_precision(network):
    """A GPU rounds to TF32 where the shape suits it, so that they would be further apart."""
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    small, seen = apply(network, found), []
    small.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    verify(network, small, found, image())
    assert seen == ["ieee"]
    assert torch.backends.cudnn.allow_tf32


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
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5), min_units=20)
    assert "conv1: at its minimum, 6 of 6 units" in found.notes


@pytest.mark.parametrize("ranking", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (Target(ratio=0.001), {}, r"ratio 0\.001 removes no unit: ask for more$"),
        (Target(ratio=0.5), {"min_units": 1000}, "no unit: lower min_units or ask for more$"),
        (Target(ratio=0.5), {"round_to": 128}, "no unit: lower round_to or ask for more$"),
        (Target(ratio=0.5), {"ratios": {"*": 0.005}}, "no unit: change ratios$"),
        (Target(macs=0.5), {"ratios": {"*": 0.1}}, r"cannot be reached.* remains; change ratios$"),
        (Target(macs=0.1), {"min_units": 80}, "remains; lower min_units or ask for less$"),
    ],
)
def test_what_removes_too_little_is_refused_with_its_cause(
    network, ranking, target, settings, message
):
    with pytest.raises(PruningError, match=message):
        plan(network, image(), magnitudes(network), target, ranking=ranking, **settings)
    with pytest.raises(PruningError, match=message):
        check_reachable(network, image(), [target], ranking=ranking, **settings)


def test_a_ratio_that_some_scores_can_meet_is_reachable():
    """Of two layers one loses all eight units that go, or each fewer than a multiple of eight."""
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    first["2.bias"].fill_(1)
    target, settings = Target(ratio=0.25), {"ranking": "global", "round_to": 8}
    check_reachable(model, torch.randn(1, 6), [target], **settings)
    assert plan(model, torch.randn(1, 6), first, target, **settings).widths() == {"0": 8, "2": 16}
    with pytest.raises(PruningError, match="removes no unit"):
        check_reachable(model, torch.randn(1, 6), [target], round_to=8)


def test_slips_in_the_call_are_named(network):
    values = magnitudes(network)
    with pytest.raises(PruningError, match=r"target 0\.6 is no Target"):
        plan(network, image(), values, 0.6)
    with pytest.raises(PruningError, match=r"the example is a tuple: give the tensor"):
        plan(network, (image(),), values, Target(ratio=0.5))
    with pytest.raises(PruningError, match=r"target macs='0\.5' is out of range"):
        Target(macs="0.5")
    with pytest.raises(PruningError, match=r"no layer '\.\*' to ignore: valid: act1, bn1"):
        plan(resnet(), torch.randn(1, 3, 32, 32), {}, Target(ratio=0.5), ignored=[".*"])


def test_a_coarse_step_below_the_budget_is_noted(network):
    found = plan(network, image(), magnitudes(network), Target(macs=0.1), ranking="uniform")
    assert found.achieved["macs"] < 0.098
    assert any("nearest step below 0.1" in note for note in found.notes)


def test_per_cost_ranks_by_importance_over_what_a_unit_saves():
    """A unit of layer 0 saves 16 MACs and one of layer 2 saves 12; what they cost alternates."""
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    values = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    values["0.bias"], values["2.bias"] = (
        16 * torch.arange(1.0, 17, 2),
        12 * torch.arange(2.0, 13, 2),
    )
    by_ranking = {
        ranking: plan(model, torch.randn(1, 10), values, Target(macs=0.6), ranking=ranking)
        for ranking in ("per_cost", "global")
    }
    assert {r: found.widths() for r, found in by_ranking.items()} == {
        "per_cost": {"0": 5, "2": 4},
        "global": {"0": 6, "2": 3},
    }
    assert [g.pruned for g in by_ranking["per_cost"].groups] == [(0, 1, 2), (0, 1)]
    assert (
        plan(model, torch.randn(1, 10), values, Target(ratio=0.5), ranking="per_cost").widths()
        == plan(model, torch.randn(1, 10), values, Target(ratio=0.5), ranking="global").widths()
    )


@pytest.mark.parametrize("ranking", ["global", "per_cost"])
def test_a_costly_unit_that_goes_last_gives_back_what_went_before_it(network, ranking):
    """A filter of conv1 is 6 % of LeNet's MACs: once one goes, the other layers need not all."""
    values = {n: torch.full_like(p, 1e-3) for n, p in network.named_parameters()}
    values["conv1.weight"] = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 1, 5, 5) * 1e3
    found = plan(network, image(), values, Target(macs=0.38), ranking=ranking)
    assert found.widths()["conv1"] == 5
    assert sum(found.widths().values()) > 5 + 3  # the others are not at their minimum
    assert 0.36 < found.achieved["macs"] <= 0.38
    small = apply(network, found)
    assert found.achieved["macs"] == cost.macs(small, image()) / cost.macs(network, image())


def test_where_fixed_ratios_do_it_all_nothing_is_given_back():
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    found = plan(
        model,
        torch.randn(1, 10),
        magnitudes(model),
        Target(macs=0.9),
        ranking="global",
        ratios={"0": 0.5},
    )
    assert found.widths() == {"0": 4}


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
    with pytest.raises(
        PruningError, match=r"6 positions in dimension 0 of 'conv1\.weight'.* has 3"
    ):
        apply(small, found)


class Blocks(nn.Module):
    """Convolutions with norms, grouped ones, tied widths, attention and a wide layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.back = nn.Conv2d(24, 16, 1)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        y = y + self.back(self.grouped(self.wide(y)).relu())
        y = y.flatten(2).mT
        y = y + self.attend(y, y, y, need_weights=False)[0]
        return self.head(self.fc(y.mean(1)).relu())


def blocks():
    torch.manual_seed(0)
    return Blocks().double().eval()


def photo():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("key", ["macs", "params", "bytes"])
@pytest.mark.parametrize("ranking", ["uniform", "global", "per_cost", "isomorphic"])
@pytest.mark.parametrize("kinds", [("hidden",), ("heads", "groups", "width", "hidden")])
def test_budgets_are_those_of_the_compacted_network(key, ranking, kinds):
    model, example = blocks(), photo()
    measure = {
        "macs": lambda m: cost.macs(m, example),
        "params": cost.params,
        "bytes": stored_bytes,
    }[key]
    wanted = {"macs": 0.998}.get(key, 0.9) if kinds == ("hidden",) else 0.5
    found = plan(
        model, example, magnitudes(model), Target(**{key: wanted}), ranking=ranking, kinds=kinds
    )
    small = apply(model, found)
    assert measure(small) / measure(model) == pytest.approx(found.achieved[key], rel=1e-12)
    assert found.achieved[key] <= wanted
    assert verify(model, small, found, photo()) <= 1e-10


def test_a_latency_budget_is_measured_on_pruned_networks(network, monkeypatch):
    timed = []

    def latency(model, example):  # real clocks vary on a busy machine
        timed.append(model)
        return 0.001 * cost.macs(model, example)

    monkeypatch.setattr("spamprune.pruning.search.cost.latency", latency)
    found = plan(network, image(), magnitudes(network), Target(latency=0.6), ranking="global")
    same = plan(network, image(), magnitudes(network), Target(macs=0.6), ranking="global")
    assert found.groups == same.groups
    assert found.achieved["latency"] == pytest.approx(same.achieved["macs"])
    assert timed.count(network) == len(timed) / 2  # each time beside the dense network


class Counted(nn.Module):
    """Counts the units of one layer where no operation shows it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        if len(self.fc1.weight.tolist()) != 12:
            raise RuntimeError("twelve units")
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@pytest.mark.parametrize("key", ["latency", "evidence"])
def test_what_fails_is_left_whole_before_a_search_that_runs_networks(key, monkeypatch):
    model, data = Counted(), [(torch.randn(40, 8), torch.randint(3, (40,)))]
    monkeypatch.setattr("spamprune.pruning.search.cost.latency", cost.macs)
    target = Target(latency=0.8)
    if key == "evidence":
        posterior = sp.fit_posterior(model, data, n_data=40)
        target = Target(evidence=sp.Evidence(model, posterior, data))
    check_reachable(model, data[0][0][:1], [target])
    found = plan(model, data[0][0][:1], magnitudes(model), target, ranking="global")
    assert found.widths().get("fc1", 12) == 12
    assert found.widths()["fc2"] < 12
    assert any(note.startswith("fc1: left whole: ") and "twelve" in note for note in found.notes)


@settings(max_examples=15, deadline=None)
@given(ratio=st.floats(0.3, 0.9), multiple=st.sampled_from([1, 2, 4, 8]))
def test_what_remains_is_a_multiple(ratio, multiple):
    model = blocks()
    found = plan(model, photo(), magnitudes(model), Target(ratio=ratio), round_to=multiple)
    small = apply(model, found)
    for layer in (small.stem, small.grouped, small.attend.out_proj):
        assert layer.weight.shape[0] % multiple == 0
    assert small.fc.out_features % multiple == 0
    plain = plan(model, photo(), magnitudes(model), Target(ratio=ratio))
    assert all(found.widths()[k] >= v for k, v in plain.widths().items())


def test_ratios_by_pattern_hold_whatever_the_target_asks():
    model = blocks()
    found = plan(
        model, photo(), magnitudes(model), Target(ratio=0.5), ratios={"f*": 0.75, "stem*": 0.0}
    )
    assert found.widths()["fc"] == 10
    assert found.widths()["stem"] == 16
    budget = plan(model, photo(), magnitudes(model), Target(params=0.8), ratios={"fc": 0.25})
    assert budget.widths()["fc"] == 30
    assert cost.params(apply(model, budget)) <= 0.8 * cost.params(model)
    with pytest.raises(PruningError, match=r"no layer to prune is called 'fcc'.*'fc'"):
        plan(model, photo(), magnitudes(model), Target(ratio=0.5), ratios={"fcc": 0.5})
    with pytest.raises(PruningError, match=r"ratio 1\.5 of 'fc' is out of range"):
        plan(model, photo(), magnitudes(model), Target(ratio=0.5), ratios={"fc": 1.5})


def test_ignored_layers_keep_their_outputs():
    model = blocks()
    found = plan(model, photo(), magnitudes(model), Target(ratio=0.5), ignored=["wide", "f?"])
    assert found.widths() == {"stem": 8, "attend:heads": 2}
    small = apply(model, found)
    assert (small.wide.out_channels, small.fc.out_features) == (24, 40)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: nn.ConvTranspose2d(8, 12, 2, bias=False), {"0": 4}),
        (lambda: nn.Conv2d(8, 12, 2, bias=False), {"0": 4}),
    ],
)
def test_outputs_of_transposed_layers_are_theirs_too(make, kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), make(), nn.ReLU(), nn.Conv2d(12, 2, 1))
    found = plan(
        model, torch.randn(1, 3, 8, 8), magnitudes(model), Target(ratio=0.5), ignored=["2"]
    )
    assert found.widths() == kept


def test_isomorphic_ranking_lets_layers_of_one_kind_compete_and_no_others():
    """Two convolutions share a pool; the linear layer, all worthless, only loses its own share."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 8),
        nn.Linear(8, 2),
    )  # fmt: skip
    values = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    values["4.weight"][:] = values["4.bias"][:] = values["5.weight"][:] = 0
    values["0.weight"][:6] = values["0.bias"][:6] = values["1.weight"][:, :6] = 0.0
    example = torch.randn(1, 3, 4, 4)
    found = plan(model, example, values, Target(ratio=0.5), ranking="isomorphic")
    assert found.widths() == {"0": 2, "1": 6, "2": 4, "4": 4}
    assert plan(
        model, example, values, Target(ratio=0.5), ranking="uniform"
    ).widths() == dict.fromkeys(("0", "1", "2", "4"), 4)


def test_layers_of_given_ratios_take_no_part_in_an_isomorphic_ranking():
    torch.manual_seed(0)
    sizes = [6, 10, 10, 10, 2]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    values = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    found = plan(
        model, torch.randn(1, 6), values, Target(ratio=0.5), ranking="isomorphic", ratios={"1": 0}
    ).widths()
    assert found.get("1", 10) == 10
    assert found["0"] + found["2"] == 10


def test_what_saves_nothing_goes_last_however_low_its_score():
    """A gain summed away costs no MACs; nor is its score, minus an evidence, positive."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.gain = nn.Embedding(10, 12), nn.Parameter(torch.ones(12))
            self.hidden, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.hidden(x).relu()) + (self.table.weight * self.gain).sum()

    model = Summed()
    values = {n: -torch.rand_like(p) for n, p in model.named_parameters()}
    found = plan(model, torch.randn(1, 6), values, Target(macs=0.7), ranking="per_cost")
    assert [g.layer for g in found.groups if g.pruned] == ["hidden"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "globall"}, "no ranking 'globall': one of uniform"),
        ({"kinds": ["hidden", "heds"]}, "no kind 'heds': one of heads"),
        ({"round_to": 0}, "round_to is 0"),
        ({"min_units": -1}, "min_units is -1"),
        ({"ignored": "conv1"}, r"ignored is one string, 'conv1': give a list, \['conv1'\]"),
        ({"kinds": "hidden"}, r"kinds is one string, 'hidden': give a list, \['hidden'\]"),
    ],
)
def test_arguments_are_checked(network, options, message):
    with pytest.raises(PruningError, match=message):
        plan(network, image(), magnitudes(network), Target(ratio=0.5), **options)
    with pytest.raises(PruningError, match=message):
        check_reachable(network, image(), [Target(ratio=0.5)], **options)


def test_frozen_parameters_have_no_score_but_go_with_their_units():
    model = blocks()
    for name in ("stem.weight", "norm.weight"):
        model.get_parameter(name).requires_grad_(False)
    found = plan(model, photo(), magnitudes(model), Target(ratio=0.5))
    small = apply(model, found)
    assert not small.stem.weight.requires_grad
    assert small.fc.weight.requires_grad
    assert small.stem.out_channels == 8
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(PruningError, match="nothing in its group is trainable"):
        plan(model, photo(), {}, Target(ratio=0.5))


class Numbers(nn.Module):
    """A number in its code, a check of its own and two layers that nothing holds."""

    def __init__(self):
        super().__init__()
        self.viewed = nn.Linear(6, 128)
        self.checked = nn.Linear(128, 64)
        self.free = nn.Linear(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        y = self.viewed(x).view(len(x), 8, 16).softmax(1).flatten(1)
        y = self.checked(y).relu()
        if y.shape[1] != 64:
            raise RuntimeError("I want 64")
        return self.head(self.free(y).relu())


def test_layers_whose_code_does_not_follow_are_left_whole_by_name():
    torch.manual_seed(0)
    model = Numbers()
    found = plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5))
    assert found.widths() == {"free": 16}
    assert any(n.startswith("viewed: ") and "8 is a plain number" in n for n in found.notes)
    assert any(n.startswith("checked: ") and "I want 64" in n for n in found.notes)
    assert apply(model, found)(torch.randn(2, 6)).shape == (2, 3)


def test_two_layers_that_fail_only_together_lose_one():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            y, z = self.a(x), self.b(x)
            assert 8 in (y.shape[-1], z.shape[-1]), "one of them must be 8"
            return self.c(y) + self.d(z)

    torch.manual_seed(0)
    model = Either()
    found = plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5))
    assert found.widths() == {"a": 4}
    assert [n for n in found.notes if n.startswith("b: ") and "one of them must be 8" in n]


def halves(m, x):
    y = m.a(x).relu()
    for _ in range(0, y.shape[1], 4):
        y = y / 2
    return m.d(m.c(m.b(y).relu()))


def adds_what_is_alike(m, x):
    y = m.a(x)
    z = m.b(y).relu()
    return m.d(m.c(z + y if z.shape == y.shape else z))


@pytest.mark.parametrize(
    ("forward", "width", "left", "why"),
    [
        (halves, 12, {"b": 12, "c": 4}, "it calls linear in place of "),
        (adds_what_is_alike, 8, {"b": 8, "c": 4}, "it calls add in place of linear"),
    ],
)
def test_what_makes_the_code_go_another_way_stays(forward, width, left, why):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 16), "b": nn.Linear(16, width), "c": nn.Linear(width, 8)}
    model = Net(forward, d=nn.Linear(8, 3), **layers)
    ratios = {"a": 0.5, "b": 0.0}
    found = plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5), ratios=ratios)
    assert found.widths() == left
    assert any(n.startswith("a: left whole: ") and why in n for n in found.notes)


def test_what_code_keeps_for_later_calls_is_no_other_way():
    kept = {}

    def forward(m, x):
        y = m.a(x)
        if y.shape[1] not in kept:
            kept[y.shape[1]] = torch.arange(len(y))[:, None] + 1
        return m.c(y.relu() / kept[y.shape[1]])

    model = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    found = plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5))
    assert found.widths() == {"a": 4}
    assert not found.notes


def test_where_the_code_goes_the_same_way_a_plan_runs_two_networks_once():
    runs = []

    def forward(m, x):
        runs.append(m.a.out_features)
        y = m.a(x)
        y[:, 0] = 0.0
        return m.c(y.view(*y.shape).relu())

    model = Net(forward, a=nn.Linear(6, 9), c=nn.Linear(9, 3))
    plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5))
    assert runs == [9, 5]


def test_an_odd_number_of_heads_goes_no_other_way():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 6, batch_first=True)
    model = Net(lambda m, x: m.h(m.a(*[m.c(x)] * 3)[0]), a=attention, c=nn.Linear(6, 24))
    model.h = nn.Linear(24, 3)
    found = plan(model, torch.randn(2, 5, 6), magnitudes(model), Target(ratio=0.5))
    assert found.widths() == {"a:heads": 3, "c": 12, "a.out_proj": 12}


def test_a_way_that_the_data_choose_may_be_another():
    ways = []

    def forward(m, x):
        y = m.a(x).relu()
        ways.append(bool(y.sum() < 0.95 * whole))
        return m.c(y * 2 if ways[-1] else y)

    torch.manual_seed(0)
    model, example = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3)), torch.randn(2, 6)
    whole = model.a(example).relu().sum()
    found = plan(model, example, magnitudes(model), Target(ratio=0.5))
    assert (found.widths(), ways) == ({"a": 4}, [False, True])


def test_a_network_that_looks_at_its_data_is_pruned_along_the_way_it_took():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x).relu()
            if y.sum() > 1e9:
                y = y + self.b(y)
            return self.c(y)

    torch.manual_seed(0)
    model = Looks()
    found = plan(model, torch.randn(2, 6), magnitudes(model), Target(ratio=0.5))
    assert found.widths()["a"] == 4


def test_a_plan_is_json_and_works_in_another_process(tmp_path):
    model = blocks()
    found = plan(model, photo(), magnitudes(model), Target(macs=0.5), round_to=2)
    assert Plan.from_json(found.to_json()) == found
    (tmp_path / "plan.json").write_text(found.to_json())
    code = (
        "import sys, torch, json\n"
        "from tests.pruning.test_plan import blocks\n"
        "from spamprune.pruning.compaction import Plan, apply\n"
        "small = apply(blocks(), Plan.from_json(open(sys.argv[1]).read()))\n"
        "print(json.dumps({n: list(t.shape) for n, t in small.state_dict().items()}))\n"
        "small(torch.randn(1, 3, 8, 8).double()).sum().backward()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "plan.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {n: list(t.shape) for n, t in apply(model, found).state_dict().items()}
    assert json.loads(done.stdout) == expected
    assert found.summary().keys().isdisjoint({"cuts", "attributes", "scalings"})


HOSTILE = {
    "not JSON": lambda d: "{",
    "no object": lambda d: "[]",
    "an unknown key": lambda d: d | {"code": "import os"},
    "an unknown ranking": lambda d: d | {"ranking": "chaos"},
    "a unit that is no number": lambda d: d | {"groups": [d["groups"][0] | {"pruned": ["a"]}]},
    "a missing part": lambda d: {k: v for k, v in d.items() if k != "groups"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plan_is_refused(network, name):
    good = json.loads(plan(network, image(), magnitudes(network), Target(ratio=0.5)).to_json())
    bad = HOSTILE[name](good)
    with pytest.raises(PruningError, match=r"this is no plan: .* at "):
        Plan.from_json(bad if isinstance(bad, str) else json.dumps(bad))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tensor": "conv9.weight"}, r"'conv9\.weight': did you mean 'conv"),
        ({"dim": 7}, "dimension 7 of"),
        ({"dim": -1}, "dimension -1 of"),
        ({"size": 5}, "expects 5 positions"),
        ({"gone": (6,)}, "names positions that dimension 0"),
        ({"gone": (-1,)}, "names positions that dimension 0"),
        ({"gone": tuple(range(6))}, "leaves nothing of dimension 0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(network, change, why):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    cut = dataclasses.replace(found.cuts[0], **change)
    for use in (apply, masked):
        with pytest.raises(PruningError, match=why):
            use(network, dataclasses.replace(found, cuts=(cut,)))


@pytest.mark.parametrize(
    "attributes",
    [
        {"": {"forward": 1}},
        {"": {"training": 0}},
        {"": {"__class__": 1}},
        {"conv1": {"weight": 1}},
        {"conv1": {"bias_of_mine": 1}},
        {"conv1": {"_parameters": [1]}},
        {"nowhere": {"groups": 1}},
    ],
    ids=str,
)
def test_a_plan_sets_nothing_but_sizes(network, attributes):
    found = plan(network, image(), magnitudes(network), Target(ratio=0.5))
    with pytest.raises(PruningError, match=r"no size of the model|module 'nowhere'"):
        apply(network, dataclasses.replace(found, attributes=attributes))


def test_a_model_that_cannot_be_copied_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 8), nn.Linear(8, 2))
    model(torch.randn(1, 4))
    with pytest.raises(PruningError, match="Sequential cannot be copied"):
        plan(model, torch.randn(1, 4), magnitudes(model), Target(ratio=0.5))
