"""The three ways to sum a convolution's inputs must give the very same matrix."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spamprune.bayes.curvature import outer
from spamprune.bayes.curvature.rules import Convolution


@st.composite
def convolutions(draw):
    """A convolution with any padding, and the size of images that its kernel fits."""
    dims = draw(st.integers(1, 3))
    axes = []
    for _ in range(dims):
        kernel, stride, step = (draw(st.integers(1, n)) for n in (3, 2, 2))
        padding = draw(st.integers(-1, 3)), draw(st.integers(-1, 3))
        span = step * (kernel - 1) + 1
        least = max(1, span - sum(padding), 1 + sum(max(-n, 0) for n in padding))
        axes.append((kernel, stride, padding, step, draw(st.integers(least, least + 3))))
    kernel, stride, padding, dilation, size = zip(*axes, strict=True)
    groups = draw(st.integers(1, 2))
    return Convolution(kernel, ((0, 0),) * dims, stride, padding, dilation, groups), size


def both(rule, size, way):
    data = torch.randn(3, 2, 4, *size, dtype=torch.float64)
    expected = outer.Columns(rule, rule.copies)
    for part in (data[:1], data[1:]):
        expected.add(part)
        way.add(part)
    return way.total(), expected.total()


def axes_of(rule, size):
    return [outer._Axis.of(rule, axis, n) for axis, n in enumerate(size)]


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_kernel_that_slides_at_the_end_finds_the_same(case, slid):
    rule, size = case
    way = outer.Slid(rule, axes_of(rule, size), slid[: len(size)])
    found, expected = both(rule, size, way)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_products_at_offsets_are_those_of_columns(case):
    rule, size = case
    rule = replace(rule, stride=(1,) * len(size), groups=1)
    axes = axes_of(rule, size)
    assume(all(axis.parts for axis in axes))  # else nothing meets the image, and there is no rule
    found, expected = both(rule, size, outer.Offsets(rule, axes))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "groups", "size", "stride", "slid"),
    [
        (64, 1, 8, 1, None),
        (64, 1, 8, 2, (False, False)),
        (16, 1, 56, 1, (False, False)),
        (1, 1, 24, 1, (True, False)),
        (64, 1, 2, 1, (True, True)),
        (64, 64, 4, 2, (True, True)),
    ],
)
def test_the_cheapest_way(channels, groups, size, stride, slid):
    rule = Convolution((3, 3), ((0, 0),) * 2, (stride,) * 2, ((1, 1),) * 2, (1, 1), groups)
    way = outer.inputs_of(rule, torch.zeros(2, 1, channels, size, size))
    assert getattr(way, "slid", None) == slid


@pytest.mark.parametrize("features", [1, 96, 97, 250])
def test_a_symmetric_product_is_whole_once_mirrored(features):
    columns = torch.randn(2, features, 5, dtype=torch.float64)
    found = outer.mirror(outer.add_products(outer.add_products(None, columns), columns))
    torch.testing.assert_close(found, 2 * columns @ columns.mT)
