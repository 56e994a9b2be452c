from itertools import pairwise

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spamprune.errors import PosteriorError, PruningError
from spamprune.pruning.masks import (
    apply_masks,
    global_masks,
    held,
    iterative_masks,
    lamp,
    sparsity_of,
)


@given(n=st.integers(1, 40), m=st.integers(1, 40), sparsity=st.floats(0, 0.999), ties=st.booleans())
def test_exactly_the_asked_fraction_goes_and_it_is_the_lowest(n, m, sparsity, ties):
    generator = torch.Generator().manual_seed(n * 41 + m)
    scores = {
        "a": torch.rand(n, generator=generator),
        "b": torch.rand(m, generator=generator).view(1, m),
    }
    if ties:
        scores = {k: v.round(decimals=1) for k, v in scores.items()}
    masks = global_masks(scores, sparsity)
    kept = torch.cat([scores[k][masks[k]] for k in scores])
    gone = torch.cat([scores[k][~masks[k]] for k in scores])
    assert len(gone) == round(sparsity * (n + m))
    assert sparsity_of(masks) == pytest.approx(len(gone) / (n + m))
    if len(gone) and len(kept):
        assert gone.max() <= kept.min()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(PruningError, match=str(sparsity)):
        global_masks({"a": torch.rand(3)}, sparsity)


def test_scores_that_are_not_numbers_are_refused_by_name():
    with pytest.raises(PruningError, match="'b'"):
        global_masks({"a": torch.rand(3), "b": torch.tensor([1.0, float("nan")])}, 0.5)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, f: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=f),
        lambda p, f: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=f),
    ],
)
def test_masks_hold_under_momentum_and_decay_and_end_with_the_block(make, foreach):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = make(model.parameters(), foreach)

    def step():
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()

    step()  # momentum is in flight when the masks come
    masks = global_masks({n: p.detach().abs() for n, p in model.named_parameters()}, 0.6)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with held(model, masks, optimizer):
        for _ in range(5):
            step()
            for name, p in model.named_parameters():
                assert (p[~masks[name]] == 0).all()
    kept = masks["0.weight"]
    assert not torch.equal(model[0].weight[kept], before["0.weight"][kept])
    step()
    assert (model[0].weight[~kept] != 0).any()


def test_masks_of_another_model_are_refused():
    with pytest.raises(PosteriorError, match="'weight'"):
        apply_masks(nn.Linear(3, 2), {"bias": torch.ones(2, dtype=torch.bool)})


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_lamp_divides_by_all_that_is_no_smaller(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    found = lamp(scores)
    for name, score in scores.items():
        for p, value in enumerate(score.tolist()):
            if (score == value).sum() == 1:
                above = sum(v for v in score.tolist() if v >= value)
                assert found[name][p].item() == pytest.approx(value / above, rel=1e-12)
        assert found[name].max() == 1
        assert torch.equal(found[name].argsort(stable=True), score.argsort(stable=True))


@given(scale=st.floats(1e-6, 1e6), sparsity=st.floats(0, 0.8))
def test_lamp_does_not_see_the_scale_of_a_layer_and_keeps_all_layers(scale, sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(5, 6, generator=generator).double() for n in "abc"}
    masks = global_masks(lamp(scores), sparsity)
    scaled = global_masks(lamp({**scores, "b": scale * scores["b"]}), sparsity)
    assert all(torch.equal(masks[n], scaled[n]) for n in masks)
    assert all(mask.any() for mask in masks.values())


def test_lamp_of_squared_magnitudes_is_that_of_torch_pruning():
    torch.manual_seed(0)
    squares = torch.randn(20).square()
    theirs = tp.importance.LAMPImportance()._lamp(squares.clone())  # it writes on its input
    torch.testing.assert_close(lamp({"w": squares})["w"].float(), theirs)


def test_lamp_of_nothing_is_nothing_and_of_signs_is_refused():
    found = lamp({"zero": torch.zeros(3), "some": torch.tensor([0.0, 2.0])})
    assert found["zero"].tolist() == [0, 0, 0]
    assert found["some"].tolist() == [0, 1]
    with pytest.raises(PruningError, match="'b' are negative"):
        lamp({"a": torch.rand(3), "b": torch.tensor([1.0, -1.0])})


def _squares(model):
    return {n: p.detach() ** 2 for n, p in model.named_parameters()}


@given(sparsity=st.floats(0, 0.999), rounds=st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_rounds_of_masks_are_nested_and_end_at_the_sparsity(sparsity, rounds):
    torch.manual_seed(0)
    model, left = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3)), []
    before = {n: p.clone() for n, p in model.named_parameters()}
    fixed = {n: torch.randn_like(p) for n, p in before.items()}

    def score(pruned):
        left.append(torch.cat([p.detach().flatten() != 0 for p in pruned.parameters()]))
        return {n: (-1) ** len(left) * s for n, s in fixed.items()}  # the order turns each time

    masks = iterative_masks(model, score, sparsity, rounds=rounds)
    left.append(torch.cat([mask.flatten() for mask in masks.values()]))
    total = left[0].numel()
    for k, (coarse, fine) in enumerate(pairwise(left), start=1):
        assert not (fine & ~coarse).any()
        assert (~fine).sum() == round((1 - (1 - sparsity) ** (k / rounds)) * total)
    assert len(left) == rounds + 1
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_rounds_start_at_what_masks_have_left():
    torch.manual_seed(0)
    model, left = nn.Linear(40, 25, bias=False), []
    before = global_masks({n: torch.rand_like(p) for n, p in model.named_parameters()}, 0.5)
    apply_masks(model, before)

    def score(pruned):
        left.append(torch.cat([p.detach().flatten() != 0 for p in pruned.parameters()]))
        return {n: p.detach().abs() for n, p in pruned.named_parameters()}

    masks = iterative_masks(model, score, 0.98, rounds=2, start=before)
    assert [kept.sum().item() for kept in left] == [500, 100]  # halves: √(0.5 · 0.02) = 0.1
    assert sum(mask.sum().item() for mask in masks.values()) == 20
    assert all(bool((before[n] | ~mask).all()) for n, mask in masks.items())
    already = iterative_masks(model, score, 0.3, rounds=2, start=before)
    assert all(torch.equal(already[n], mask) for n, mask in before.items())


def test_masks_that_leave_nothing_are_no_start():
    model = nn.Linear(3, 2)
    nothing = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    with pytest.raises(PruningError, match="leave no weight"):
        iterative_masks(model, _squares, 0.5, start=nothing)


def test_one_round_is_one_shot():
    model = nn.Linear(6, 7)
    masks = iterative_masks(model, _squares, 0.6, rounds=1)
    expected = global_masks(_squares(model), 0.6)
    assert all(torch.equal(masks[n], expected[n]) for n in masks)


def test_no_round_is_no_schedule():
    with pytest.raises(PruningError, match="not 0"):
        iterative_masks(nn.Linear(2, 2), _squares, 0.5, rounds=0)
