import pytest
import torch
import torch.nn.functional as F

from spamprune.errors import ModelError
from spamprune.models import create


def test_the_lenet_by_hand():
    """Tanh and average pooling on the image within two rows of zeros."""
    torch.manual_seed(0)
    model = create("bmr_lenet")
    inputs = torch.randn(2, 1, 28, 28)
    x = F.pad(inputs, (2, 2, 2, 2))
    assert x.shape[-2:] == (32, 32)
    for conv in (model.conv1, model.conv2):
        x = F.avg_pool2d(torch.tanh(F.conv2d(x, conv.weight, conv.bias)), 2)
    x = x.flatten(1)
    for layer in (model.fc1, model.fc2):
        x = torch.tanh(x @ layer.weight.T + layer.bias)
    expected = x @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_mlp_by_hand():
    model = create("bmr_mlp", in_features=6, widths=(5, 4))
    inputs = torch.randn(3, 1, 2, 3)
    x = inputs.flatten(1)
    for layer in (model.fc1, model.fc2):
        x = x @ layer.weight.T + layer.bias
        x = x * torch.sigmoid(x)
    expected = x @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(inputs), expected)


def test_sizes_of_the_papers_code():
    """PROTOCOLS, section E."""
    mlp, lenet, vit, mixer = (create(f"bmr_{name}") for name in ("mlp", "lenet", "vit", "mixer"))
    assert [m.out_features for m in mlp if hasattr(m, "out_features")] == [500] * 4 + [10]
    assert lenet.fc1.in_features == 16 * 25
    assert create("bmr_lenet_cifar").fc1.in_features == 48 * 25
    assert (len(vit.blocks), vit.blocks[0].attn.num_heads, vit.embed_dim) == (6, 8, 256)
    assert vit.blocks[0].mlp.fc1.out_features == 512
    assert len(mixer.blocks) == 6
    assert mixer.blocks[0].mlp_tokens.fc1.out_features == 512
    assert mixer.blocks[0].mlp_channels.fc1.out_features == 512


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ModelError, match="img_size 6 is too small"):
        create("bmr_lenet", img_size=6, padding=0)
