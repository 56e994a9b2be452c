import torch
from torch import nn

from spamprune.modules import call_with


class Twice(nn.Module):
    """One layer in two places, with a norm."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_a_module_in_two_places_gets_its_own_parameters_back():
    model = Twice().eval()
    own = dict(model.named_parameters())
    others = {name: 2 * p.detach() for name, p in own.items()}
    inputs = torch.randn(4, 3)
    got = call_with(model, others, inputs)
    reference = Twice().eval()
    reference.load_state_dict(others, strict=False)
    torch.testing.assert_close(got, reference(inputs))
    assert all(p is own[name] for name, p in model.named_parameters())
    assert model.first.weight is own["first.weight"]


def test_given_buffers_are_used_and_the_model_s_own_stay():
    model = Twice().eval()
    mean = model.norm.running_mean
    given = {"norm.running_mean": torch.full((3,), 5.0)}
    inputs = torch.randn(4, 3)
    plain = model(inputs)
    assert not torch.allclose(call_with(model, given, inputs), plain)
    assert model.norm.running_mean is mean
    torch.testing.assert_close(model(inputs), plain)
