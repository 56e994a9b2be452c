from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from spamprune.errors import PosteriorError, PruningError
from spamprune.models.classic import lenet
from spamprune.pruning.masks import apply_masks
from spamprune.pruning.semi_structured import (
    compressed,
    is_semi_structured,
    semi_structured_masks,
)


def _scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def _sparse(model):
    apply_masks(model, semi_structured_masks(model, _scores(model))[0])
    return model


@given(seed=st.integers(0, 999), ties=st.booleans())
def test_the_two_best_of_each_four_inputs_stay(seed, ties):
    model = nn.Linear(12, 3)
    scores = _scores(model, seed)
    if ties:
        scores = {n: s.round(decimals=1) for n, s in scores.items()}
    masks, notes = semi_structured_masks(model, scores)
    assert notes == []
    assert masks["bias"].all()
    for row in range(3):
        for start in range(0, 12, 4):
            keep = masks["weight"][row, start : start + 4]
            score = scores["weight"][row, start : start + 4]
            assert keep.sum() == 2
            assert score[keep].min() >= score[~keep].max()


def test_scores_decide_and_not_magnitudes():
    model = nn.Linear(4, 1, bias=False)
    scores = {"weight": torch.tensor([[4.0, 1.0, 3.0, 2.0]])}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 9.0, -0.1, 9.0]]))
    assert semi_structured_masks(model, scores)[0]["weight"].tolist() == [
        [True, False, True, False]
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_thinned_along_their_input_channels(layout):
    model = nn.Conv2d(8, 2, 3).to(memory_format=layout)
    scores = {
        n: s.to(memory_format=layout) if s.dim() == 4 else s for n, s in _scores(model).items()
    }
    mask = semi_structured_masks(model, scores)[0]["weight"]
    for out, first, y, x in product(range(2), (0, 4), range(3), range(3)):
        score = scores["weight"][out, first : first + 4, y, x]
        expected = score >= score.sort().values[2]
        assert torch.equal(mask[out, first : first + 4, y, x], expected)


def test_what_has_no_fours_is_left_whole_and_named():
    model = lenet()
    masks, notes = semi_structured_masks(model, _scores(model))
    assert notes == [
        "conv1.weight: left whole: 1 inputs are no multiple of 4",
        "conv2.weight: left whole: 6 inputs are no multiple of 4",
    ]
    whole = {"conv1.weight", "conv2.weight"} | {n for n in masks if n.endswith("bias")}
    assert {n for n, mask in masks.items() if mask.all()} == whole
    assert all(mask.float().mean() == 0.5 for n, mask in masks.items() if n not in whole)


def test_only_matrices_are_thinned():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(8, 4))
            self.table = nn.Embedding(8, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.grouped = nn.Conv2d(8, 4, 1, groups=2)

    model = Model()
    scores = {n: s for n, s in _scores(model).items() if "frozen" not in n}
    masks, notes = semi_structured_masks(model, scores)
    assert notes == []
    thinned = {n for n, mask in masks.items() if not mask.all()}
    assert thinned == {"attention.in_proj_weight", "attention.out_proj.weight", "grouped.weight"}


def test_attention_with_projections_of_their_own_is_thinned_as_well():
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    masks, notes = semi_structured_masks(model, _scores(model))
    assert notes == ["v_proj_weight: left whole: 6 inputs are no multiple of 4"]
    thinned = {n for n, mask in masks.items() if not mask.all()}
    assert thinned == {"q_proj_weight", "k_proj_weight", "out_proj.weight"}


def test_a_network_without_fours_is_refused():
    with pytest.raises(PruningError, match="weight: left whole: 3 inputs"):
        semi_structured_masks(nn.Linear(3, 4), _scores(nn.Linear(3, 4)))
    with pytest.raises(PruningError, match="no trainable linear layers"):
        semi_structured_masks(nn.LayerNorm(4), _scores(nn.LayerNorm(4)))


def test_bad_scores_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(PosteriorError, match="the set of scores lacks parameter 'bias'"):
        semi_structured_masks(model, {"weight": torch.rand(4, 4)})
    with pytest.raises(PruningError, match="'bias' are not numbers"):
        semi_structured_masks(
            model, {"weight": torch.rand(4, 4), "bias": torch.full((4,), torch.nan)}
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_loses_nothing_when_it_compresses_such_weights(dtype):
    weight = _sparse(nn.Linear(128, 64)).weight.detach().to(dtype)
    packed, positions = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (64, 64)
    back = conversions.sparse_semi_structured_to_dense_cutlass(packed, positions)
    assert torch.equal(back, weight)


def test_is_semi_structured():
    assert is_semi_structured(torch.tensor([[0.0, 1, 0, 1]]))
    assert is_semi_structured(torch.zeros(2, 8))
    assert not is_semi_structured(torch.tensor([[0.0, 1, 1, 1]]))
    assert not is_semi_structured(torch.zeros(2, 6))
    kernels = torch.zeros(1, 4, 1, 4)
    kernels[0, :2] = 1  # two channels at every place
    assert is_semi_structured(kernels)
    kernels = torch.zeros(1, 4, 1, 4)
    kernels[..., 0] = 1  # four channels at one place
    assert not is_semi_structured(kernels)


def test_without_a_gpu_compression_says_why_not():
    model = _sparse(nn.Sequential(nn.Linear(64, 64))).half()
    with pytest.raises(PruningError, match=r"0\.weight: stored densely: .*cpu is not supported"):
        compressed(model)


def test_float32_is_refused_because_torch_would_drop_weights():
    weight = _sparse(nn.Linear(64, 64)).weight.detach()
    there = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*there), weight)
    with pytest.raises(PruningError, match=r"not for torch\.float32"):
        compressed(_sparse(nn.Linear(64, 64)))


def test_a_dense_network_is_refused():
    with pytest.raises(PruningError, match="apply semi_structured_masks first"):
        compressed(nn.Linear(64, 64).half())


def test_what_cannot_be_compressed_is_named(monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight * 1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4)).half()
    before = _sparse(model)[2].weight
    small, notes = compressed(model)
    assert notes == [
        "0.weight: stored densely: torch compresses those of nn.Linear, not of Conv2d",
    ]
    assert small[2].weight is not before
    assert model[2].weight is before
    assert before.requires_grad
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch compresses 2:4 on a GPU only")
def test_compressed_layers_compute_the_same():
    torch.manual_seed(0)
    model = _sparse(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)))
    model = model.half().cuda()
    inputs = torch.randn(64, 256, device="cuda").half()
    small, notes = compressed(model)
    assert notes == []
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-2, atol=1e-3)
