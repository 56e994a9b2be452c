"""The engine on whole networks of timm and of the papers, with random heads and norms."""

from functools import partial

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer

import spamprune.models.classic  # noqa: F401 - registers the papers' networks
from spamprune.bayes.curvature import exact, sketch
from tests.bayes import reference
from tests.bayes.test_exact import assert_equal

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
#: name: (timm's name or class, arguments, shape of an input); of fewer layers than timm's.
NETWORKS = {
    "resnet18": ("resnet18", {"layers": (1, 1, 1, 1)}, (3, 32, 32)),
    "vit_tiny, fused attention": ("vit_tiny_patch16_224", VIT, (3, 32, 32)),
    "vit_tiny, eager attention": ("vit_tiny_patch16_224", VIT, (3, 32, 32)),
    "mixer_s32": (
        MlpMixer,
        {"img_size": 64, "patch_size": 32, "num_blocks": 2, "embed_dim": 512},
        (3, 64, 64),
    ),
    "convnext_atto": ("convnext_atto", {"depths": (1, 1, 1, 1)}, (3, 32, 32)),
    "mobilenetv3_small_050": ("mobilenetv3_small_050", {}, (3, 32, 32)),
    "efficientnet_b0": ("efficientnet_b0", {}, (3, 32, 32)),
    "swin_tiny": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)},
        (3, 56, 56),
    ),
    "deit3_small": ("deit3_small_patch16_224", VIT, (3, 32, 32)),
    "beit_base": ("beit_base_patch16_224", VIT, (3, 32, 32)),
    "regnety_002": ("regnety_002", {}, (3, 32, 32)),
    "densenet121": ("densenet121", {"block_config": (3, 3, 3, 3)}, (3, 32, 32)),
    "nf_resnet26": (
        "nf_resnet26",
        {"depths": (2, 1, 1, 1), "channels": (256, 512, 512, 512)},
        (3, 32, 32),
    ),
    "levit_128s": ("levit_128s", {"img_size": 64, "depth": (1, 1, 1)}, (3, 64, 64)),
    "lenet": ("lenet", {}, (1, 28, 28)),
    "lenet_cifar": ("lenet_cifar", {}, (3, 32, 32)),
    "fc_cancer": ("fc_cancer", {}, (30,)),
}


def network(name, samples=3, **changes):
    """Return a network in float64 and evaluation mode with nothing at zero, inputs, targets."""
    source, arguments, shape = NETWORKS[name]
    classes = {} if name.startswith(("lenet", "fc")) else {"num_classes": 3}
    create = partial(timm.create_model, source) if isinstance(source, str) else source
    torch.manual_seed(0)
    model = create(**classes, **arguments | changes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = "eager" not in name
        if hasattr(module, "attention_bias_cache"):
            module.training = True
    inputs = torch.randn(samples, *shape, dtype=torch.float64)
    return model, inputs, torch.arange(samples) % 2


@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_diagonals_of_every_parameter(name, labels):
    model, inputs, targets = network(name)
    found = exact(model, [(inputs, targets)], n_data=len(inputs), labels=labels)
    assert_equal(found.diag, reference.one_at_a_time(model, inputs, targets, labels))
    assert not [n for n, how in found.how.items() if "one sample" in how]


def test_the_sketch_is_unbiased_on_a_vision_transformer():
    model, inputs, targets = network("vit_tiny, fused attention", samples=8, depth=1)
    truth = reference.one_at_a_time(model, inputs, targets)
    sums = {n: torch.zeros_like(t) for n, t in truth.items()}
    squares = {n: torch.zeros_like(t) for n, t in truth.items()}
    draws = 400
    for seed in range(draws):
        found = sketch(model, [(inputs, targets)], n_data=8, seed=seed).diag
        for name, diag in found.items():
            sums[name] += diag
            squares[name] += diag**2
    outside = total = 0
    for name, expected in truth.items():
        mean = sums[name] / draws
        error = ((squares[name] / draws - mean**2).clamp(min=0) / (draws - 1)).sqrt()
        noise = 1e-12 * expected.max() + 1e-30
        outside += int(((mean - expected).abs() > 4 * error + noise).sum())
        total += expected.numel()
    assert outside <= 0.001 * total
