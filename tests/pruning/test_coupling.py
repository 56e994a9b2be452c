"""What torch-pruning 1.6.1 follows or cuts wrongly is an error that names the layer."""

import pytest
import torch
from torch import nn

from spamprune.errors import PruningError
from spamprune.pruning.importance import ScoreImportance
from tests.pruning.test_importance import IMAGE, Branches, Exotic, Root, random_scores


def test_indices_that_torch_pruning_gets_wrong_are_an_error_that_names_the_layer():
    """torch-pruning 1.6.1 loses its offsets where a concatenation is flattened."""

    class Flattened(Branches):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12 * 16, 6)

        def forward(self, x):
            y = self.norm(self.stem(x)).relu()
            y = torch.cat([y + self.mix(self.deep(y)), self.other(x)], 1)
            return self.head(self.fc(y.flatten(1)).relu())

    model = Flattened()
    group = Root(Flattened, torch.randn(1, 3, 4, 4), "stem")(model)
    with pytest.raises(PruningError, match=r"stem: .*offsets of \[8, 4\] channels within 192"):
        ScoreImportance(random_scores(model))(group)


class Parts(nn.Module):
    """Reads the two parts of a split in an order that torch-pruning 1.6.1 mistakes, or not."""

    def __init__(self, swapped):
        super().__init__()
        self.swapped = swapped
        self.fc = nn.Linear(4, 6)
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x):
        a, b = self.fc(x).chunk(2, 1)
        return self.a(a) + self.b(b) if self.swapped else self.b(b) + self.a(a)


def test_parts_of_a_split_that_torch_pruning_mistakes_for_each_other_are_an_error():
    right = Root(lambda: Parts(False), torch.randn(2, 4), "fc")
    model = right.make()
    scores = random_scores(model)
    got = ScoreImportance(scores)(right(model))
    expected = scores["fc.weight"].sum(1) + scores["fc.bias"]
    expected += torch.cat([scores["a.weight"].sum(0), scores["b.weight"].sum(0)])
    torch.testing.assert_close(got, expected)
    wrong = Root(lambda: Parts(True), torch.randn(2, 4), "fc")
    with pytest.raises(PruningError, match=r"fc: .*order of the parts"):
        ScoreImportance(scores)(wrong(wrong.make()))


class GroupedQuery(nn.Module):
    """Four query heads share two heads of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 2).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 2).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t[:, :, None].expand(b, 2, 2, n, 2).reshape(b, 4, n, 2) for t in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, n, 8))


def test_heads_that_are_shared_are_an_error_by_name():
    root = Root(GroupedQuery, torch.randn(1, 3, 8), "q")
    model = root.make()
    with pytest.raises(PruningError, match=r"q: .*grouped-query attention.*ignored_layers"):
        ScoreImportance(random_scores(model))(root(model))


@pytest.mark.parametrize(
    ("root", "name"),
    [
        (Root(Exotic, IMAGE, "rnn"), "rnn: .*outputs of this LSTM"),
        (
            Root(
                lambda: nn.Sequential(
                    nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)
                ),
                IMAGE,
                "0",
            ),
            "1: .*inputs of this ConvTranspose2d",
        ),
        (
            Root(
                lambda: nn.Sequential(
                    nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 4, 4]), nn.Conv2d(4, 2, 1)
                ),
                IMAGE,
                "0",
            ),
            "1: .*this LayerNorm",
        ),
        (
            Root(
                lambda: nn.Sequential(
                    nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
                ),
                torch.randn(2, 4),
                "0",
            ),
            "1: .*this ParametrizedLinear",
        ),
    ],
)
def test_layers_that_cannot_be_scored_are_named(root, name):
    model = root.make()
    with pytest.raises(PruningError, match=name + r".*ignored_layers"):
        ScoreImportance(random_scores(model))(root(model))
