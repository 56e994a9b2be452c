from itertools import pairwise

import pytest
import torch
from torch import nn

from spamprune import scores
from spamprune.errors import PruningError
from spamprune.pruning.masks import global_masks, iterative_masks


def _mlp(*widths):
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


def _like(*shape):
    return [(torch.randn(3, *shape), torch.zeros(3, dtype=torch.long))]


def test_scores_are_products_of_all_paths():
    torch.manual_seed(0)
    model = _mlp(4, 6, 5, 2)
    a, b, c = (p.detach().double().abs() for p in model.parameters())
    ones_in, ones_out = torch.ones(4).double(), torch.ones(2).double()
    found = scores.synflow(model, _like(4))
    expected = {
        "0.weight": a * torch.outer(ones_out @ c @ b, ones_in),
        "2.weight": b * torch.outer(ones_out @ c, a @ ones_in),
        "4.weight": c * torch.outer(ones_out, b @ a @ ones_in),
    }
    torch.testing.assert_close(found, expected)


def test_flow_is_conserved_from_layer_to_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=False)),
    )
    sums = [s.sum() for s in scores.synflow(model, _like(3, 8, 8)).values()]
    torch.testing.assert_close(torch.stack(sums), sums[0].expand(3))


def test_neither_signs_nor_data_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    first = scores.synflow(model, _like(2, 4, 4))
    with torch.no_grad():
        for p in model.parameters():
            p *= torch.randn_like(p).sign()
        model[1].running_mean.normal_()
    second = scores.synflow(model, _like(2, 4, 4))
    torch.testing.assert_close(first, second)
    assert all(s.any() for n, s in first.items() if n != "1.bias")


def test_a_deep_network_does_not_overflow_and_a_deeper_one_is_refused():
    model = _mlp(*[4] * 300)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    flow = scores.synflow(model, _like(4))["0.weight"].sum()
    assert flow == pytest.approx(4.0**300, rel=1e-9)  # beyond float32
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(100.0)
    with pytest.raises(PruningError, match="the synaptic flow of Sequential is inf"):
        scores.synflow(model, _like(4))


def test_a_network_that_passes_nothing_on_is_refused():
    model = _mlp(4, 4, 2)
    nn.init.zeros_(model[2].weight)
    with pytest.raises(PruningError, match="tells weights nothing"):
        scores.synflow(model, _like(4))


def test_tokens_are_refused():
    model = nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.randint(0, 10, (3, 2))
    with pytest.raises(PruningError, match=r"its inputs are torch\.int64"):
        scores.synflow(model, [(tokens, torch.zeros(3, dtype=torch.long))])


def test_tied_and_frozen_weights_pass_signals_on():
    torch.manual_seed(0)
    model = _mlp(4, 4, 4, 2)
    model[2].weight = model[0].weight
    model[4].weight.requires_grad_(False)
    w, c = model[0].weight.detach().double().abs(), model[4].weight.detach().double().abs()
    found = scores.synflow(model, _like(4))
    assert list(found) == ["0.weight"]
    torch.testing.assert_close(found["0.weight"].sum(), 2 * (c @ w @ w).sum())


def test_scored_again_and_again_no_layer_collapses():
    """Tanaka et al. 2020, theorem 3: the schedule keeps every layer, one shot does not."""
    torch.manual_seed(0)
    model = _mlp(8, 200, 200, 4)
    data, sparsity = _like(8), 1 - 30 / (8 * 200 + 200 * 200 + 200 * 4)

    def kept(masks):
        return [int(mask.sum()) for mask in masks.values()]

    one_shot = kept(global_masks(scores.synflow(model, data), sparsity))
    schedule = kept(iterative_masks(model, lambda m: scores.synflow(m, data), sparsity))
    assert sum(one_shot) == sum(schedule) == 30
    assert min(one_shot) == 0
    assert min(schedule) > 0
