"""Networks through which torch-pruning 1.6.1 follows channels, in their order or not."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import nn

from spamprune.errors import PruningError
from spamprune.pruning.importance import ScoreImportance

IMAGES = (2, 3, 8, 8)


class Between(nn.Module):
    """A convolution, an operation, and a layer that reads what comes of it."""

    def __init__(self, operation, reader=None):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.operation = operation
        self.reader = reader or nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        y = self.reader(self.operation(self.first(x).relu())).relu()
        return self.head(y.mean((2, 3)) if y.ndim == 4 else y)


class Two(nn.Module):
    """Two convolutions side by side, concatenated, and an operation."""

    def __init__(self, operation):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.operation = operation
        self.reader = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        y = self.operation(torch.cat([self.one(x), self.other(x)], 1))
        return self.head(self.reader(y).relu().mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, y):
        z = self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1).flatten(1)).relu())
        return y * z.sigmoid().view(len(y), -1, 1, 1)


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.out = nn.Conv2d(14, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = self.first(x).relu()
        return self.head(self.out(torch.cat([y, self.up(self.down(y).relu())], 1)).relu())


class ChannelsLast(nn.Module):
    """ConvNeXt's block without its normalisation, whose statistics a mask would change."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, y):
        z = self.narrow(F.gelu(self.wide(self.deep(y).permute(0, 2, 3, 1)))) * self.scale
        return y + z.permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A patch embedding as a ViT has it: class token, positions, features along the last axis."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.position
        return self.head((y + self.narrow(F.gelu(self.wide(y))))[:, 0])


class Mixed(nn.Module):
    """A linear layer over tokens, which torch-pruning 1.6.1 takes for one over channels."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(y.transpose(1, 2)).transpose(1, 2).mean(1))


def shuffled(groups):
    return lambda y: (
        y.view(len(y), groups, -1, *y.shape[2:]).transpose(1, 2).reshape(len(y), -1, *y.shape[2:])
    )


def last_flattened(y):
    return y.permute(0, 2, 3, 1).flatten(1)


def reversed_by_index(y):
    return y[:, torch.arange(y.shape[1] - 1, -1, -1)]


LOST = {
    "shuffle by views": lambda: Between(shuffled(4)),
    "channel shuffle": lambda: Between(nn.ChannelShuffle(4)),
    "flattened with channels last": lambda: Between(last_flattened, nn.Linear(1024, 12)),
    "plus itself flipped": lambda: Between(lambda y: y + y.flip(1)),
    "rolled": lambda: Between(lambda y: y.roll(3, 1)),
    "concatenated with itself flipped": lambda: Between(
        lambda y: torch.cat([y, y.flip(1)], 1), nn.Conv2d(32, 12, 1)
    ),
    "reversed by index": lambda: Between(reversed_by_index),
    "shuffle of two branches": lambda: Two(shuffled(2)),
    "swap of two branches": lambda: Two(lambda y: y.roll(8, 1)),
    "mixed tokens": Mixed,
}

KEPT = {
    "nothing": lambda: Between(nn.Identity()),
    "flattened": lambda: Between(nn.Flatten(), nn.Linear(1024, 12)),
    "pooled and flattened": lambda: Between(
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Linear(256, 12)
    ),
    "flipped and rolled in space": lambda: Between(lambda y: y + y.flip(3).roll(2, 2)),
    "flipped twice": lambda: Between(lambda y: y.flip(1).relu().flip(1)),
    "concatenated with itself": lambda: Between(
        lambda y: torch.cat([y, y], 1), nn.Conv2d(32, 12, 1)
    ),
    "batch norm": lambda: Between(nn.BatchNorm2d(16)),
    "instance norm": lambda: Between(nn.InstanceNorm2d(16, affine=True)),
    "two branches": lambda: Two(nn.Identity()),
    "squeeze and excitation": lambda: Between(Excited()),
    "channels last and back": lambda: Between(ChannelsLast()),
    "U-net": Unet,
    "tokens": Tokens,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
}


def made(make):
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))  # no two alike, so that each tells where it went
    return model


def pruned(model, shape):
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    importance = ScoreImportance(scores)
    heads = [
        m
        for m in model.modules()
        if 5 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]
    with warnings.catch_warnings(action="ignore"):  # of parameters outside layers
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(1, *shape[1:]).double(),
            importance,
            pruning_ratio=0.5,
            ignored_layers=heads,
        )
        pruner.step()


@pytest.mark.parametrize("case", LOST)
def test_networks_through_which_the_order_of_channels_is_lost_are_refused(case):
    model = made(LOST[case])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=r"loses the order of the channels of .*ignored_layers"):
        pruned(model, IMAGES)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("case", KEPT)
def test_where_the_order_is_kept_the_pruned_network_is_the_masked_one(case):
    model = made(KEPT[case])
    masked = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32).double() if "net" in case else torch.randn(IMAGES).double()
    pruned(model, images.shape)
    left = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in masked.named_parameters():
            p.mul_(torch.isin(p, left[name]))
        assert sum(p.numel() for p in left.values()) < sum(p.numel() for p in masked.parameters())
        torch.testing.assert_close(model(images), masked(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_the_permutations_of_attention_and_of_normalisations_are_followed(name):
    model = made(lambda: timm.create_model(name, num_classes=5))
    example = torch.randn(1, 3, 224, 224).double()
    importance = ScoreImportance({n: p.detach().abs() for n, p in model.named_parameters()})
    with warnings.catch_warnings(action="ignore"):
        graph = tp.DependencyGraph().build_dependency(model, example)
    groups = list(graph.get_all_groups())
    assert all(importance(group).isfinite().all() for group in groups)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_group_is_accepted_when_its_reader_has_been_cut_along_with_another(frozen):
    model = made(KEPT["two branches"]).float()
    model.reader.requires_grad_(not frozen)
    importance = ScoreImportance({n: p.detach().abs() for n, p in model.named_parameters()})
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(IMAGES))
    for layer in (model.one, model.other, model.one):
        units = list(range(layer.out_channels))
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, units)
        assert len(importance(group)) == len(units)
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, [1, 2]).prune()
    assert model(torch.zeros(IMAGES)).shape == (2, 5)
