"""Models by name: sizes, suggestions, and the fit of model and data."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from spamprune.errors import ModelError
from spamprune.models import Source, check_fits, check_name, create, source_of


def test_remembers_architecture_without_weights_or_place() -> None:
    model = create("lenet", num_classes=3, pretrained=False, pretrained_cfg=None)
    assert source_of(model) == Source("lenet", {"num_classes": 3})
    assert source_of(nn.Linear(1, 1)) is None


def test_caller_seeds() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(create("fc_cancer").get_parameter("head.weight"))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lenett", "'lenet'"),
        ("ResNet50", "'resnet50'"),
        ("resnet10t.c3", "'resnet10t.c3_in1k'"),
        ("§§§", "valid: bmr_lenet, bmr_lenet_cifar, bmr_mixer, bmr_mlp, bmr_vit, fc_cancer"),
        ("hf-hub:someone/lenet", "unknown model"),
        ("local-dir:lenet", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_unknown_names_get_suggestions(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match="unknown model") as caught:
        check_name(name)
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["lenet", "resnet50", "resnet50.a1_in1k"])
def test_known_names_pass(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("lenet", {"nope": 1}, ("'lenet'", "'nope'")),
        ("test_resnet", {"nope": 1}, ("'test_resnet'", "'nope'")),
        ("lenet", {"num_classes": "many"}, ("'lenet'", "many")),
        ("lenet", {"name": "x"}, ("'lenet'", "'name'")),
        ("lenet", {"pretrained": True}, ("'lenet'", "pretrained")),
        ("lenet", {"checkpoint_path": "x.pth"}, ("'lenet'", "checkpoint_path")),
    ],
)
def test_wrong_arguments(name: str, kwargs: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        create(name, **kwargs)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("shape", "classes", "words"),
    [
        ((3, 28, 28), 10, ("'lenet'", "(3, 28, 28)", "10 classes")),
        ((1, 28, 28), 7, ("'lenet'", "(1, 28, 28)", "7 classes", "(1, 10)")),
    ],
)
def test_misfits_are_named(shape: tuple[int, ...], classes: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        check_fits(create("lenet"), shape, classes)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message


def test_fit_leaves_modes_statistics_and_random_state() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    model[1].eval()
    state, mean = torch.get_rng_state(), model[1].running_mean.clone()
    check_fits(model, (1, 5, 5), 18)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, mean)


def test_ours_are_in_timms_registry_once_asked_for() -> None:
    """In a process of its own: here they may be registered already."""
    code = (
        "import timm, spamprune.models as models\n"
        "assert not timm.is_model('fixup_resnet18')\n"
        "models.register_all()\n"
        "assert timm.create_model('fixup_resnet18', width=4).training\n"
        "names = timm.list_models(module=models.build.OURS)\n"
        "assert {'lenet', 'fixup_wrn16_4', 'mixer_mnist', 'bmr_vit'} <= set(names), names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
