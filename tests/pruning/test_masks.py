import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spamprune.errors import PosteriorError, PruningError
from spamprune.pruning.masks import apply_masks, global_masks, held, sparsity_of


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
