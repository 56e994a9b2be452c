"""Sums of scores over units, beside loops over single entries."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from spamprune.pruning.slices import Slice, sum_over_units

SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(
    before=SHAPES,
    size=st.integers(1, 5),
    after=SHAPES,
    units=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    turned=st.booleans(),
    data=st.data(),
)
def test_sums_are_those_of_single_entries(before, size, after, units, dtype, turned, data):
    shape, dim = (*before, size, *after), len(before)
    score = torch.randn(shape[::-1] if turned else shape, dtype=torch.float64).to(dtype)
    score = score.permute(*range(score.dim())[::-1]) if turned else score
    taken = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    unit = data.draw(st.lists(st.integers(0, units - 1), min_size=len(taken), max_size=len(taken)))
    expected = torch.zeros(units, dtype=torch.float64)
    for position, u in zip(taken, unit, strict=True):
        expected[u] += sum(score.select(dim, position).flatten().double().tolist())
    piece = Slice("w", dim, torch.tensor(taken, dtype=torch.long), torch.tensor(unit).long())
    found = sum_over_units([piece], {"w": score}, units, torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
