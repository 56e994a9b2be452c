import pytest
import torch
from torch import nn

from spamprune.pruning import cost


class Shared(nn.Module):
    """One module in two places, and a class token that one module hands to another."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.first = self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.last.weight.requires_grad_(False)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.last(self.second(torch.relu(self.first(x))))


def test_macs_are_counted_and_the_model_is_left_as_it_was():
    model = Shared()
    model.first.training = False
    before = {
        path: dict(module._parameters)
        for path, module in model.named_modules(remove_duplicate=False)
    }
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    assert cost.macs(model, torch.randn(1, 2, 4)) == 3 * (16 + 16 + 8)
    for path, module in model.named_modules(remove_duplicate=False):
        assert all(module._parameters[key] is p for key, p in before[path].items())
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training
    assert not model.first.training


def test_attention_is_counted_with_its_products():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 5
    projections = tokens * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8)
    products = 2 * tokens * tokens * 8
    assert cost.macs(layer, torch.randn(1, tokens, 8)) == projections + products


def test_tied_and_zero_parameters():
    model = Shared()
    assert cost.params(model) == 4 + 20 + 10
    with torch.no_grad():
        model.first.weight[0] = 0
    assert cost.nonzero(model) == 4 + 20 + 10 - 4


def test_latency_is_a_time():
    assert 0 < cost.latency(nn.Linear(2, 2), torch.randn(1, 2), repeats=3) < 10


def test_a_failing_model_is_left_as_it_was():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        cost.macs(model, torch.randn(1, 3))
    assert all(p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(8, 12, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_recurrent_layers_multiply_every_step_by_their_matrices(kind, options):
    model = Recurrent(kind, **options)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert cost.macs(model, torch.randn(3, 5, 8)) == 3 * 5 * weights


def test_recurrent_layers_of_a_gpu_are_counted_alike():
    class Fused(nn.Module):
        """Calls what torch calls on CUDA, with no values, so that it runs anywhere."""

        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(8, 12, num_layers=2, bidirectional=True, device="meta")

        def forward(self, x):
            state = x.new_empty(4, 3, 12)
            sizes = (12, 0, 2)  # of the state and of its projection, and how many layers
            flags = (False, 0.0, False, True)  # batch first, dropout, training, bidirectional
            weights = list(self.layer.parameters())
            return torch.ops.aten._cudnn_rnn(
                *(x, weights, 4, None, state, state, 2, *sizes, *flags, [], None)
            )

    model = Fused()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert cost.macs(model, torch.randn(5, 3, 8, device="meta")) == 3 * 5 * weights
